"""Training: from documents and messages to a model."""
