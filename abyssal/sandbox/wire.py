"""Frames between host and guest agent (`guest/agent.h` has the same numbers).

A frame is its length (of what follows), its kind, the number of the operation that it belongs to, and a payload:
bytes, or fields `key=value` that each end in NUL. Paths and arguments are bytes on Linux; text here stands for them
with surrogates for what is no UTF-8.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

VERSION = 1
HEAD = struct.Struct("<IBI")  # length, kind, operation
LONGEST = (1 << 20) + 5
STDIN_WINDOW = 65536
READ_MOST = 262144
STREAM_WINDOW = 65536  # bytes of a connection that may be on their way, in either direction
STREAMS_MOST = 128  # connections at once
GUEST_NUMBERS = 1 << 31  # from here on, numbers are given by the guest
TOKEN_HEAD = b"\xff" * 4  # a length that no frame has: a token at the place of a frame is none
TOKEN_SIZE, MARK_SIZE = 32, 8


class Kind(IntEnum):
    """What a frame says; below 64 from the host, above from the guest."""

    HELLO = 1
    EXEC = 2
    STDIN = 3
    EOF = 4
    SIGNAL = 5
    RESIZE = 6
    CREDIT = 7
    SETTLE = 8
    JOIN = 9
    READ = 16
    WRITE = 17
    CHUNK = 18
    CLOSE = 19
    STAT = 20
    LIST = 21
    MKDIR = 22
    MOVE = 23
    REMOVE = 24
    LINK = 25
    ABORT = 26
    SYNC = 32
    BYE = 33
    RUNNING = 34
    LISTEN = 40
    CONNECT = 41
    SEND = 42
    FINISH = 43
    GRANT = 44
    DROP = 45
    READY = 64
    STARTED = 65
    OUT = 66
    ERR = 67
    EXITED = 68
    TOOK = 69
    DATA = 70
    OK = 71
    FAIL = 72
    LISTED = 73
    OPERATION = 74
    ACCEPTED = 80
    RECEIVED = 81
    FINISHED = 82
    TAKEN = 83
    DROPPED = 84


Fields = list[tuple[str, str]]


@dataclass(frozen=True)
class Frame:
    """One frame: its kind, its operation, its payload."""

    kind: int
    op: int
    data: bytes = b""

    def fields(self) -> Fields:
        """The payload as fields, in order."""
        return list(read_fields(self.data))

    def values(self) -> dict[str, str]:
        """The payload as fields; of a repeated key the last."""
        return dict(read_fields(self.data))


def encode(kind: Kind, op: int, data: bytes = b"") -> bytes:
    """A frame as bytes."""
    return HEAD.pack(len(data) + 5, kind, op) + data


def fields(items: Iterable[tuple[str, object]]) -> bytes:
    """Fields as a payload.

    Raises:
        ValueError: a value holds NUL, which no argument, path or variable can.
    """
    parts = []
    for key, value in items:
        text = f"{key}={value}"
        if "\0" in text:
            raise ValueError(f"{text!r} holds a NUL byte, which no argument, path or variable may")
        parts.append(text.encode("utf-8", "surrogateescape") + b"\0")
    return b"".join(parts)


def read_fields(data: bytes) -> Iterator[tuple[str, str]]:
    """Fields of a payload; what is none is passed over."""
    for part in data.split(b"\0"):
        key, sign, value = part.decode("utf-8", "surrogateescape").partition("=")
        if sign:
            yield key, value


class Decoder:
    """Bytes as they come, into frames.

    Raises:
        ValueError: (from `feed`) a length that no frame has; the stream is of no use any more.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are whole now."""
        self._buffer += data
        while len(self._buffer) >= HEAD.size:
            length, kind, op = HEAD.unpack_from(self._buffer)
            if not 5 <= length <= LONGEST:
                raise ValueError(f"a frame of {length} bytes; 5 to {LONGEST} are possible")
            if len(self._buffer) < 4 + length:
                return
            yield Frame(kind, op, bytes(self._buffer[HEAD.size : 4 + length]))
            del self._buffer[: 4 + length]
