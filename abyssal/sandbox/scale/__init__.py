"""Sandboxes of many hosts: an edge on each, and whatever places work there borrowed from others."""
