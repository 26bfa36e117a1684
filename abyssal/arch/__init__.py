"""The numbers of a model, without torch: configuration, presets, layer schedule and tensors."""
