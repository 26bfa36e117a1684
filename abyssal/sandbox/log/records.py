"""Records of the log: their fields, their one spelling, and the chain of hashes (sandbox.md 6)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

VERSION = 1
ROOT = "0" * 64  # what stands before the first record
Kind = Literal[
    "create", "ready", "op.intent", "op.result", "op.resolved",
    "tty.open", "tty.in", "tty.out", "tty.close",
    "file.read", "file.list", "file.stat", "file.download",
    "net.policy", "net.denied", "port", "limit", "pause", "resume", "snapshot", "restore", "fork",
    "ttl", "violation", "agent.lost", "adopt", "log.cut", "expire", "destroy",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
State = Literal["done", "failed", "cancelled", "unknown"]
JSON = Any


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        sandbox: its id.
        seq: from 0, no gaps.
        incarnation: counts starts, restores and forks.
        kind: what happened.
        op_id: of the operation it belongs to, or None.
        actor: who asked: the id of a token, never the token.
        t: wall clock, RFC 3339 in UTC.
        mono_ns: of the machine's clock that never goes back, for durations within a boot.
        rollout: job, episode, turn, tool_call_id, as the caller gave them.
        req, req_sha256: what was asked, and the digest of its canonical spelling.
        res: what came of it.
        parent: {sandbox, seq, hash} that this sandbox was forked or restored from.
        prev, hash: of the record before, and of this one.
        v: of this layout.
    """

    sandbox: str
    seq: int
    incarnation: int
    kind: Kind
    op_id: str | None
    actor: str
    t: str
    mono_ns: int
    rollout: Mapping[str, JSON] | None
    req: JSON
    req_sha256: str | None
    res: JSON
    parent: Mapping[str, JSON] | None
    prev: str
    hash: str = ""
    v: int = VERSION

    def sealed(self) -> Record:
        """The same with its hash."""
        return replace(self, hash=self.digest())

    def digest(self) -> str:
        """What `hash` has to be."""
        return sha256(canonical({name: value for name, value in vars(self).items() if name != "hash"}))

    def payload(self) -> bytes:
        """Its bytes in the log."""
        return canonical(vars(self))


def canonical(value: JSON) -> bytes:
    """JSON in one spelling: keys sorted, no blank space, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256(data: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Broken:
    """A record that checks as a frame and yet cannot be what was written: somebody changed it."""

    seq: int
    why: str


def parse(payload: bytes) -> Record:
    """A record out of its bytes.

    Raises:
        ValueError: it is none.
    """
    fields = json.loads(payload)
    if not isinstance(fields, dict) or fields.get("v") != VERSION:
        raise ValueError(f"a record of version {VERSION} is expected")
    try:
        return Record(**fields)
    except TypeError as error:
        raise ValueError(f"a record's fields are expected ({error})") from None


def chain(payloads: Sequence[bytes], prev: str = ROOT, seq: int = 0) -> Iterator[Record | Broken]:
    """Records in order, checked against each other; a `Broken`, if there is one, comes last."""
    for payload in payloads:
        try:
            record = parse(payload)
        except ValueError as error:
            yield Broken(seq, f"record {seq} cannot be read: {error}")
            return
        if record.seq != seq:
            yield Broken(seq, f"record {seq} calls itself {record.seq}: records were taken out, added or moved")
            return
        if record.prev != prev:
            yield Broken(seq, f"record {seq} does not follow the one before: its chain of hashes is broken")
            return
        if record.digest() != record.hash or record.payload() != payload:
            yield Broken(seq, f"record {seq} is not what was hashed: it was changed")
            return
        yield record
        prev, seq = record.hash, seq + 1
