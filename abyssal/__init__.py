"""Abyssal: the whole of DeepSeek-V4, in Python."""

__version__ = "0.1.0"
