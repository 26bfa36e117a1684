"""Sandboxes' connections, over the guest agent's wire: no sandbox has an interface (sandbox.md 7)."""
