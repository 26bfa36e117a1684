"""One file per operation: its contract, its plain meaning, and the choice of who computes it."""
