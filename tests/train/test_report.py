"""The report card of a real run, read back; and metrics in TensorBoard's own files."""

from __future__ import annotations

import json
import struct
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from abyssal.base.errors import CheckpointError, InputError
from abyssal.train.report import SCORES, card_of, write_report
from abyssal.train.run import run
from abyssal.train.sinks import flat, sink
from tests.train import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small run, whose lines went to TensorBoard too."""
    path = tmp_path_factory.mktemp("report") / "tiny" / "pretrain"
    trainer = tiny.trainer()
    with sink("tensorboard", path, {}) as show:
        assert run(trainer, path, show=show)
    return path


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Tags(HTMLParser):
    """Which tags are open at the end, and how many of each there were."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        links = [value or "" for name, value in attrs if name in ("src", "href")]
        self.sources += [link for link in links if not link.startswith("#")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_card_says_what_the_run_did(folder: Path) -> None:
    (folder / SCORES).write_text(json.dumps({"retrieval": {"4096": 0.5, "note": "a|b"}}), encoding="utf-8")
    page = write_report(folder)
    lines = lines_of(folder)
    card = (folder / "report.md").read_text(encoding="utf-8")
    assert f"| tokens | {lines[-1]['tokens']:,} |" in card
    assert f"| steps | {tiny.STEPS} of {tiny.STEPS} |" in card
    assert "| retrieval.4096 | 0.5 |" in card and "a\\|b" in card
    assert "| schedule.dense_until | 0.4 |" in card
    assert "| Muon orthogonalised in | float32 from step 0 on |" in card
    mean = sum(line["loss"] for line in lines) / len(lines)  # all steps, since there are fewer than 50
    assert f"| loss, mean of the last {len(lines)} | {mean:.4f} |" in card
    svg = ElementTree.parse(folder / "curves.svg").getroot()
    texts = {"".join(element.itertext()) for element in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"loss (nats)", "recall", "sparse", "FP4", "tokens per second"} <= texts
    tags = Tags()
    tags.feed(page.read_text(encoding="utf-8"))
    assert not tags.open
    assert tags.seen["table"] == card.count("\n## ")
    assert not tags.sources  # nothing from elsewhere


def test_an_unfinished_run_has_a_card_and_a_folder_without_one_is_named(folder: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    trainer = tiny.trainer()

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(trainer, part, every=1, show=stop)
    assert ("steps", f"2 of {tiny.STEPS}") in card_of(part).sections[0][1]
    with pytest.raises(CheckpointError, match="holds no run"):
        card_of(tmp_path)


def test_tensorboard_reads_every_number(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    lines = lines_of(folder)
    assert set(events.Tags()["scalars"]) == {key for line in lines for key in flat(line)}
    for key in ("loss", "seconds/update"):
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert found == [(line["step"], pytest.approx(flat(line)[key], rel=1e-6)) for line in lines]


def records_of(log: bytes) -> Iterator[bytes]:
    """Records of a file in LevelDB's log format: blocks of 32 KiB; a record is whole (1) or in parts (2, 3, 4)."""
    held, place = b"", 7  # behind the file's own mark
    while place < len(log):
        if (left := -place % 32768) and left < 7:  # no room for a header
            place += left
            continue
        _, size, part = struct.unpack_from("<IHB", log, place)
        held += log[place + 7 : place + 7 + size]
        place += 7 + size
        if part in (1, 4):
            yield held
            held = b""


def test_wandb_keeps_every_number(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_folder = tmp_path / "tiny" / "pretrain"
    run_folder.mkdir(parents=True)
    lines = lines_of(folder)
    with sink("wandb", run_folder, {"recipe": "tiny"}) as show:
        for line in lines:
            show(line)
    wandb.teardown()  # a process of its own writes the file, and may be behind
    (stored,) = run_folder.rglob("*.wandb")
    history, configured = [], {}
    for raw in records_of(stored.read_bytes()):
        record = Record.FromString(raw)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif record.WhichOneof("record_type") == "run":
            configured = {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert configured["recipe"] == "tiny"
    assert [found["_step"] for found in history] == [line["step"] for line in lines]
    for line, found in zip(lines, history, strict=True):
        assert flat(line) == pytest.approx({key: value for key, value in found.items() if not key.startswith("_")})


def test_a_sink_that_is_unknown_or_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no sink 'paper': use tensorboard or wandb"), sink("paper", tmp_path, {}):
        pass
    monkeypatch.setitem(sys.modules, "wandb", None)
    told = r"wandb is not installed .*pip install 'abyssal\[track\]'"
    with pytest.raises(InputError, match=told), sink("wandb", tmp_path, {}):
        pass


def test_flat_keeps_numbers_alone() -> None:
    assert flat({"a": 1, "b": {"c": 2.5, "d": {"e": 3}}, "f": "x", "g": None, "h": True}) == {
        "a": 1.0, "b/c": 2.5, "b/d/e": 3.0,
    }  # fmt: skip
