"""The checkpoint's number formats and the roundings that the reference simulates (architecture.md 3.3, 3.6)."""
