"""Messages in, events out: one protocol for every wire and every engine."""
