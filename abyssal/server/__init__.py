"""Wires over `chat`: HTTP requests in, one event stream out."""
