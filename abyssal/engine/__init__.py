"""Token ids in, token ids out; no text."""
