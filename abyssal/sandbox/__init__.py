"""Sandboxes: four substrates behind one call, an ordered durable log, replay."""
