"""Runs on several processes: parameters and experts spread over them, on torch's own engine (training.md 7)."""
