"""Secrets in the log: each value is replaced by a keyed tag before anything is hashed or stored (sandbox.md 6)."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any


class Hiding:
    """Replaces secret values.

    The tag is a MAC, so equal values give equal tags, requests compare equal after a restart, and nobody without
    the key can try values out.

    Args:
        key: of this host; it never lies beside the log.
        secrets: names and values.
    """

    def __init__(self, key: bytes, secrets: Mapping[str, str]):
        pairs = [
            (value.encode(), f"<secret {name} {hmac.new(key, value.encode(), hashlib.sha256).hexdigest()[:16]}>")
            for name, value in secrets.items()
            if value
        ]
        # longest first: one secret may lie inside another
        self._pairs = [(value, tag.encode()) for value, tag in sorted(pairs, key=lambda pair: -len(pair[0]))]

    def data(self, data: bytes) -> bytes:
        """Whole bytes."""
        for value, tag in self._pairs:
            data = data.replace(value, tag)
        return data

    def value(self, value: Any) -> Any:
        """All texts of a JSON value, keys too."""
        if not self._pairs:
            return value
        if isinstance(value, str):
            return self.data(value.encode(errors="surrogateescape")).decode(errors="surrogateescape")
        if isinstance(value, Mapping):
            return {self.value(key): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value

    def stream(self) -> HidingStream:
        """For bytes that come in pieces."""
        return HidingStream(self, [value for value, _ in self._pairs])


class HidingStream:
    """Holds back what may be the beginning of a secret until more has come."""

    def __init__(self, hiding: Hiding, values: list[bytes]):
        self._hiding, self._values = hiding, values
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What can be told by now."""
        if not self._values:
            return data
        data = self._hiding.data(self._held + data)
        begun = max(self._begun(data, value) for value in self._values)
        self._held = data[len(data) - begun :]
        return data[: len(data) - begun]

    def end(self) -> bytes:
        """What was held back."""
        held, self._held = self._held, b""
        return held

    @staticmethod
    def _begun(data: bytes, value: bytes) -> int:
        """Bytes at the end of the data that begin the value."""
        for count in range(min(len(value) - 1, len(data)), 0, -1):
            if data.endswith(value[:count]):
                return count
        return 0
