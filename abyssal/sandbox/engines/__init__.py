"""Engines: what runs sandboxes, one a module."""
