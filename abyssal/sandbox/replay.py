"""Replay: show a log, run it again and compare, or branch off it (sandbox.md 6).

`view` shows what was recorded and is always exact. `rerun` asks a new sandbox for the same operations in the same
order and compares what can be compared; it claims nothing beyond its table. `branch` makes a sandbox that stands
where another stood.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from abyssal.sandbox import shapes
from abyssal.sandbox.api import Spec
from abyssal.sandbox.errors import NotFound, SandboxError, SandboxLost
from abyssal.sandbox.log.reader import operations
from abyssal.sandbox.log.records import Record, sha256
from abyssal.sandbox.operation import Asked
from abyssal.sandbox.perform import READS
from abyssal.sandbox.service import Answer, Service, Wanted

Verdict = Literal["equal", "different", "not comparable"]
Normaliser = Callable[[bytes], bytes]
# what the edge does, and not the sandbox's programs; a rerun leaves it out
_EDGE = frozenset({"snapshot", "fork", "ttl", "pause", "resume"})
_CLOCKS = re.compile(
    rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?|\b\d+(\.\d+)? ?(s|ms|us|seconds)\b"
)


def clocks(data: bytes) -> bytes:
    """Times and durations made equal."""
    return _CLOCKS.sub(b"<time>", data)


def addresses(data: bytes) -> bytes:
    """Addresses in memory made equal."""
    return re.sub(rb"0x[0-9a-f]{6,16}", b"<address>", data)


NORMALISERS: Mapping[str, Normaliser] = {"clocks": clocks, "addresses": addresses}


@dataclass(frozen=True)
class Row:
    """One operation of a rerun: what was asked, how it compares, and why."""

    seq: int
    op: str
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Rerun:
    """A rerun: the new sandbox, and a row for each operation."""

    sandbox: str
    rows: Sequence[Row]

    def count(self, verdict: Verdict) -> int:
        """Rows of a verdict."""
        return sum(row.verdict == verdict for row in self.rows)

    def json(self) -> dict[str, Any]:
        """As JSON."""
        verdicts: tuple[Verdict, ...] = ("equal", "different", "not comparable")
        counts = {verdict.replace(" ", "_"): self.count(verdict) for verdict in verdicts}
        return {"sandbox": self.sandbox, **counts, "rows": [asdict(row) for row in self.rows]}


async def view(service: Service, sandbox: str) -> Sequence[Mapping[str, Any]]:
    """The operations of a sandbox as recorded; nothing runs."""
    return list(operations(await _records(service, sandbox)))


async def rerun(
    service: Service,
    sandbox: str,
    *,
    normalisers: Sequence[str] = (),
    until: int | None = None,
    ttl: float = 900.0,
    actor: str = "local",
) -> Rerun:
    """Run a sandbox's operations again in a new one, and compare.

    Args:
        service: of the sandbox.
        sandbox: its id; its log is enough.
        normalisers: names of `NORMALISERS`, for streams.
        until: leave out operations from this place in the log on.
        ttl: of the new sandbox, which is the caller's to stop.
        actor: who asks.
    Raises:
        Unsupported: the engine that ran it is not there.
    """
    chosen = []
    for name in normalisers:
        if name not in NORMALISERS:
            raise NotFound(f"no normaliser {name!r}: choose from {', '.join(NORMALISERS)}")
        chosen.append(NORMALISERS[name])
    records = await _records(service, sandbox)
    child = await _fresh(service, records, ttl, actor)
    rows = []
    for entry in operations(records):
        if until is None or entry["seq"] < until:
            rows.append(await _compare(service, sandbox, child, entry, chosen, Asked(actor=actor)))
    return Rerun(child, rows)


async def branch(service: Service, sandbox: str, seq: int, *, keep_places: bool = False, actor: str = "local") -> str:
    """A new sandbox that stands where this one stood before a place in its log.

    It begins from the newest snapshot before that place, or anew, and runs the operations in between again.

    Args:
        service: of the sandbox.
        sandbox: its id.
        seq: of the first record that does not count.
        keep_places: all operations run again, and keep their places in their streams, so that a client that comes
            back to the new sandbox finds them.
        actor: who asks.
    Returns:
        the id of the new sandbox, which is the caller's to stop.
    Raises:
        SandboxLost: an operation in between comes out different, so the state cannot be reached.
    """
    info = await service.info(sandbox)
    records = await _records(service, sandbox)
    snapshots = {name: place for name, place in info["snapshots"].items() if place < seq and not keep_places}
    start = max(snapshots.values(), default=-1)
    if snapshots:
        name = max(snapshots, key=lambda name: snapshots[name])
        spec = _spec(records)
        child = (await service.create(Wanted(spec, snapshot=name), Asked(actor=actor)))["id"]
    else:
        child = await _fresh(service, records, _spec(records).ttl, actor)
    try:
        for entry in operations(records):
            if start < entry["seq"] < seq and (keep_places or entry["req"]["op"] not in READS):
                place = entry["place"] if keep_places else None
                asked = Asked(actor=actor)
                if place is not None:
                    asked = Asked(stream=place[0], ordinal=place[1], actor=actor)
                row = await _compare(service, sandbox, child, entry, [], asked)
                if row.verdict == "different":
                    raise SandboxLost(f"the state before record {seq} cannot be reached: record {row.seq} {row.why}")
    except BaseException:
        await service.destroy(child)
        raise
    return str(child)


async def _records(service: Service, sandbox: str) -> Sequence[Record]:
    return [Record(**record) async for record in service.log(sandbox)]


def _spec(records: Sequence[Record]) -> Spec:
    return shapes.spec(records[0].req["spec"])


async def _fresh(service: Service, records: Sequence[Record], ttl: float, actor: str) -> str:
    """A sandbox that stands where this one began."""
    spec, parent = shapes.spec({**records[0].req["spec"], "ttl": ttl}), records[0].parent
    if parent is not None and "snapshot" not in parent:  # a fork
        return await branch(service, parent["sandbox"], parent["seq"] + 1, actor=actor)
    snapshot = None if parent is None else parent["snapshot"]
    info = await service.create(Wanted(spec, records[0].req["engine"], snapshot), Asked(actor=actor))
    return str(info["id"])


async def _compare(
    service: Service,
    sandbox: str,
    child: str,
    entry: Mapping[str, Any],
    normalisers: Sequence[Normaliser],
    asked: Asked,
) -> Row:
    req, old = dict(entry["req"]), entry["res"]
    name = str(req["op"])

    def row(verdict: Verdict, why: str = "") -> Row:
        return Row(entry["seq"], name, verdict, why)

    if name in _EDGE:
        return row("not comparable", "is the edge's business and was left out")
    if "tty" in req or "of" in req or req.get("stdin") or "stdin" in name:
        return row("not comparable", "took input while it ran")
    if old["state"] == "cancelled":
        return row("not comparable", "was ended from outside, so it was left out")
    data = None
    if "data" in req:
        data = (await service.stored(sandbox, entry["op_id"], "input")).data
        del req["data"]
    try:
        answer: Answer | None = await service.call(child, req, asked, data)
        failure = None
    except SandboxError as error:
        answer, failure = None, shapes.error_json(error)
    if old["state"] == "unknown":
        return row("not comparable", "its outcome was never learnt")
    if old.get("declared"):
        return row("not comparable", "its outcome was declared and not observed")
    if failure is not None or "error" in old:
        before = old.get("error", {}).get("type", "no error")
        after = "no error" if failure is None else failure["type"]
        return row("equal") if before == after else row("different", f"gave {after}, before {before}")
    assert answer is not None
    return await _streams(service, sandbox, entry, answer, row, normalisers)


async def _streams(
    service: Service,
    sandbox: str,
    entry: Mapping[str, Any],
    answer: Answer,
    row: Callable[..., Row],
    normalisers: Sequence[Normaliser],
) -> Row:
    old, new = entry["res"], answer.res
    for field in ("exit_code", "timed_out", "sha256", "mode"):
        if old.get(field) != new.get(field):
            return row("different", f"{field} is {new.get(field)}, before {old.get(field)}")
    if "value" in old and _timeless(old["value"]) != _timeless(new["value"]):
        return row("different", "lists other files")
    cut = False
    for name in ("stdout", "stderr", "data"):
        if name not in old or old[name]["sha256"] == new[name]["sha256"]:
            continue
        if old[name]["truncated_from"] != new[name]["truncated_from"] or old[name]["truncated_from"] is not None:
            cut = True
            continue
        before = (await service.stored(sandbox, entry["op_id"], name)).data
        after = answer.streams[name].data
        if entry["req"]["op"] == "file.download" and _members(before) == _members(after):
            continue  # the archives differ in times alone
        for normaliser in normalisers:
            before, after = normaliser(before), normaliser(after)
        if before != after:
            return row("different", f"{name} differs from byte {_first(before, after)} on")
    return row("not comparable", "output was longer than is kept") if cut else row("equal")


def _members(archive: bytes) -> Sequence[tuple[Any, ...]]:
    """What an archive holds, without times."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        found = []
        for member in tar:
            file = tar.extractfile(member) if member.isreg() else None
            content = b"" if file is None else file.read()
            found.append((member.name, member.type, member.mode, member.linkname, sha256(content)))
        return found


def _first(before: bytes, after: bytes) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )


def _timeless(value: Any) -> Any:
    """Facts of files without their times."""
    if isinstance(value, Mapping):
        return {name: item for name, item in value.items() if name != "mtime"}
    return [_timeless(item) for item in value]
