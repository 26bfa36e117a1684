"""Read a log with no service running: records, what is wrong with them, one line for each operation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from abyssal.sandbox.errors import LogError
from abyssal.sandbox.log.blobs import Blobs
from abyssal.sandbox.log.frames import Fault, Frame, scan
from abyssal.sandbox.log.records import ROOT, Broken, Record, chain

FILE = "trajectory.log"
BLOBS = "blobs"


@dataclass(frozen=True)
class LogFile:
    """What a log's folder holds.

    Attributes:
        records: those before the first thing that is wrong.
        good: bytes of the file that they take.
        fault: a torn tail or damage, or None.
        broken: a record that was changed, or None.
        blobs: streams and files.
    """

    records: Sequence[Record]
    good: int
    fault: Fault | None
    broken: Broken | None
    blobs: Blobs

    @property
    def head(self) -> str:
        """Hash of the last record."""
        return self.records[-1].hash if self.records else ROOT

    def check(self, head: str | None = None) -> None:
        """Insist that all is as it was written; a torn tail was never promised to anybody and is fine.

        Args:
            head: the hash of the last record, as somebody else kept it.
        Raises:
            LogError: the log is damaged or was changed.
        """
        if self.fault is not None and self.fault.kind == "damaged":
            raise LogError(
                f"the log is damaged at byte {self.fault.offset} ({self.fault.why});"
                f" {len(self.records)} records before it are whole"
            )
        if self.broken is not None:
            raise LogError(f"the log was tampered with: {self.broken.why}")
        if head is not None and head != self.head:
            raise LogError(
                f"the log was tampered with: it ends in {self.head[:16]}, and {head[:16]} was kept when it was closed"
            )


def read_log(path: Path) -> LogFile:
    """Read the log in a folder, or the file itself.

    Raises:
        LogError: there is none.
    """
    file = path / FILE if path.is_dir() else path
    try:
        data = file.read_bytes()
    except OSError as error:
        raise LogError(f"no log can be read at {file} ({error.strerror}): give a sandbox's folder or its log") from None
    frames: list[Frame] = []
    fault: Fault | None = None
    for found in scan(data):
        if isinstance(found, Fault):
            fault = found
        else:
            frames.append(found)
    records: list[Record] = []
    broken: Broken | None = None
    for item in chain([frame.payload for frame in frames]):
        if isinstance(item, Broken):
            broken = item
        else:
            records.append(item)
    good = frames[len(records) - 1].end if records else 0
    return LogFile(records, good, fault, broken, Blobs(file.parent / BLOBS))


def operations(records: Sequence[Record]) -> Iterator[Mapping[str, Any]]:
    """One entry for each operation, in the order of their beginnings: what was asked, what came of it."""
    results = {record.op_id: record for record in records if record.kind in ("op.result", "op.resolved")}
    for record in records:
        if record.kind == "op.intent":
            result = results.get(record.op_id)
        elif record.kind.startswith("file."):
            result = replace(record, res={name: value for name, value in record.res.items() if name != "place"})
        else:
            continue
        yield {
            "sandbox": record.sandbox,
            "seq": record.seq,
            "op_id": record.op_id,
            "t": record.t,
            "actor": record.actor,
            "incarnation": record.incarnation,
            "rollout": record.rollout,
            "req": record.req,
            "res": result.res if result is not None else {"state": "unknown"},
            "place": (record.res or {}).get("place"),
            "result_seq": result.seq if result is not None else None,
        }
