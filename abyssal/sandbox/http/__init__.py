"""Sandboxes over HTTP: the routes of sandbox.md 5, their server, their client, and the shape of E2B."""
