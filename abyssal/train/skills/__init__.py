"""What a release can do: held-out items through the engine and prompt format that serve (training.md 7 and 8.3)."""
