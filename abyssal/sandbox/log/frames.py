"""Frames of the log file: where one record ends, and whether its bytes are as they were written (sandbox.md 6).

    frame = "abyL" | length | CRC32C of these eight bytes | CRC32C of the payload | payload

A writer that is killed leaves a beginning of what it wrote; a machine that loses power may leave zeros behind it.
Both are a torn tail, which nobody was promised, and it is cut. Everything else that does not check is damage and is
never cut: a length that was hit by a flipped bit would otherwise take all records behind it along.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import crc32c

MAGIC = b"abyL"
_HEAD = struct.Struct(">4sI")
_CHECKS = struct.Struct(">II")
HEADER = _HEAD.size + _CHECKS.size
LONGEST = 64 << 20  # a record, not a stream: those lie in blobs


@dataclass(frozen=True)
class Frame:
    """A payload that checks, and where its frame begins and ends."""

    offset: int
    end: int
    payload: bytes


@dataclass(frozen=True)
class Fault:
    """What stands behind the last frame that checks.

    Attributes:
        kind: "torn" was never acknowledged and may be cut, "damaged" was.
        offset: where it begins.
        size: bytes from there to the end of the file.
        why: in words.
    """

    kind: Literal["torn", "damaged"]
    offset: int
    size: int
    why: str


def frame(payload: bytes) -> bytes:
    """The bytes to append for a payload."""
    head = _HEAD.pack(MAGIC, len(payload))
    return head + _CHECKS.pack(crc32c.crc32c(head), crc32c.crc32c(payload)) + payload


def scan(data: bytes, start: int = 0) -> Iterator[Frame | Fault]:
    """Frames in order; a `Fault`, if there is one, comes last."""
    offset = start
    while offset < len(data):
        found = _frame_at(data, offset)
        yield found
        if isinstance(found, Fault):
            return
        offset = found.end


def _frame_at(data: bytes, offset: int) -> Frame | Fault:
    size = len(data) - offset

    def fault(kind: Literal["torn", "damaged"], why: str) -> Fault:
        if kind == "torn" and _frame_behind(data, offset + 1):
            return Fault("damaged", offset, size, f"{why}, but whole records follow")
        return Fault(kind, offset, size, why)

    if size < HEADER:
        whole = MAGIC.startswith(data[offset : offset + len(MAGIC)])
        if whole or data.endswith(b"\0"):
            return fault("torn", f"a frame's head was cut after {size} bytes")
        return fault("damaged", "the last bytes are no frame's head")
    if not _header_checks(data, offset):
        if data.endswith(b"\0"):
            return fault("torn", "zeros in place of a frame's head")
        return fault("damaged", "a frame's head does not check")
    length = _HEAD.unpack_from(data, offset)[1]
    end = offset + HEADER + length
    if end > len(data):
        return fault("torn", f"a frame of {length} bytes was cut after {size - HEADER}")
    payload = data[offset + HEADER : end]
    if crc32c.crc32c(payload) != _CHECKS.unpack_from(data, offset + _HEAD.size)[1]:
        if end == len(data) and payload.endswith(b"\0"):
            return fault("torn", "zeros in place of a frame's end")
        return fault("damaged", "a frame's payload does not check")
    return Frame(offset, end, payload)


def _header_checks(data: bytes, offset: int) -> bool:
    head = data[offset : offset + _HEAD.size]
    if len(head) < _HEAD.size or len(data) < offset + HEADER:
        return False
    magic, length = _HEAD.unpack(head)
    return (
        magic == MAGIC
        and length <= LONGEST
        and crc32c.crc32c(head) == _CHECKS.unpack_from(data, offset + _HEAD.size)[0]
    )


def _frame_behind(data: bytes, start: int) -> bool:
    """Whether a frame's head checks anywhere from here on."""
    while (start := data.find(MAGIC, start)) >= 0:
        if _header_checks(data, start):
            return True
        start += 1
    return False
