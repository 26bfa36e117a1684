"""The trajectory log: what is acknowledged survives, and what was changed is named."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.sandbox.errors import LogError
from abyssal.sandbox.log.blobs import INLINE, Blobs, Kept, whole
from abyssal.sandbox.log.frames import Fault, Frame, frame, scan
from abyssal.sandbox.log.hiding import Hiding
from abyssal.sandbox.log.output import Budget, Output
from abyssal.sandbox.log.reader import FILE, operations, read_log
from abyssal.sandbox.log.records import ROOT, canonical
from abyssal.sandbox.log.writer import Log


def write(folder: Path, count: int = 6) -> bytes:
    async def work() -> None:
        log = Log(folder, "box")
        for number in range(count):
            await log.append("op.intent", op_id=str(number), req={"argv": ["echo", "é" * number]}, rollout={"turn": 1})
        await log.close()

    asyncio.run(work())
    return (folder / FILE).read_bytes()


def test_every_field_comes_back(tmp_path: Path) -> None:
    async def work() -> None:
        log = Log(tmp_path, "box")
        parent = {"sandbox": "other", "seq": 4, "hash": "ab"}
        await log.append("create", parent=parent, actor="token-1", rollout={"job": "grpo", "episode": 3})
        log.incarnation = 1
        await log.append("op.intent", op_id="a", req={"argv": ["ls"]})
        await log.append("op.result", op_id="a", res={"state": "done", "exit_code": 0})
        await log.close()

    asyncio.run(work())
    found = read_log(tmp_path)
    found.check()
    first, second, third = found.records
    assert [record.seq for record in found.records] == [0, 1, 2]
    assert (first.prev, second.prev, third.prev) == (ROOT, first.hash, second.hash)
    assert first.parent == {"sandbox": "other", "seq": 4, "hash": "ab"}
    assert (first.actor, first.incarnation, second.incarnation) == ("token-1", 0, 1)
    assert first.rollout == {"job": "grpo", "episode": 3}
    assert second.req_sha256 is not None
    assert first.t.endswith("Z")
    (entry,) = operations(found.records)
    assert entry["req"] == {"argv": ["ls"]}
    assert entry["res"]["exit_code"] == 0
    assert json.loads(canonical(entry))


def test_a_cut_at_every_byte_loses_only_what_was_cut(tmp_path: Path) -> None:
    data = write(tmp_path / "a", 4)
    ends = [found.end for found in scan(data) if isinstance(found, Frame)]
    folder = tmp_path / "b"
    folder.mkdir()
    for size in range(len(data)):
        (folder / FILE).write_bytes(data[:size])
        found = read_log(folder)
        found.check()
        whole_ones = sum(end <= size for end in ends)
        assert len(found.records) == whole_ones
        assert (found.fault is None) == (size in (0, *ends))
        if size % 97 == 0:
            log = Log(folder, "box")
            assert (log.cut is None) == (size in (0, *ends))
            assert log.next_seq == whole_ones + (log.cut is not None)  # the cut is on record
            asyncio.run(log.close())


def test_every_flipped_bit_is_named(tmp_path: Path) -> None:
    data = write(tmp_path / "a", 3)
    folder = tmp_path / "b"
    folder.mkdir()
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / FILE).write_bytes(changed)
        with pytest.raises(LogError, match=r"damaged at byte \d+"):
            read_log(folder).check()
    with pytest.raises(LogError, match="damaged"):  # and never cut
        Log(folder, "box")
    assert (folder / FILE).read_bytes() == bytes(changed)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_edits_with_right_checksums_are_tampering(data: st.DataObject) -> None:
    payloads = EDITED
    edit = data.draw(st.sampled_from(["drop", "swap", "copy", "change", "spell"]))
    place = data.draw(st.integers(0, len(payloads) - 2))
    changed = list(payloads)
    if edit == "drop":
        del changed[place]
    elif edit == "swap":
        changed[place], changed[place + 1] = changed[place + 1], changed[place]
    elif edit == "copy":
        changed.insert(place, changed[place])
    elif edit == "change":
        fields = json.loads(changed[place])
        name = data.draw(st.sampled_from(["actor", "t", "mono_ns", "op_id", "res", "incarnation"]))
        fields[name] = "somebody" if name != "mono_ns" else 1
        changed[place] = canonical(fields)
    else:
        changed[place] = json.dumps(json.loads(changed[place])).encode()
    folder = Path(EDITED_FOLDER)
    (folder / FILE).write_bytes(b"".join(frame(payload) for payload in changed))
    with pytest.raises(LogError, match="tampered"):
        read_log(folder).check()


@pytest.fixture(scope="module", autouse=True)
def _edited(tmp_path_factory: pytest.TempPathFactory) -> None:
    global EDITED, EDITED_FOLDER
    data = write(tmp_path_factory.mktemp("log"), 6)
    EDITED = [found.payload for found in scan(data) if isinstance(found, Frame)]
    EDITED_FOLDER = str(tmp_path_factory.mktemp("edited"))


EDITED: list[bytes] = []
EDITED_FOLDER = ""


def test_an_end_taken_off_shows_against_the_kept_head(tmp_path: Path) -> None:
    data = write(tmp_path, 4)
    head = read_log(tmp_path).head
    frames = [found for found in scan(data) if isinstance(found, Frame)]
    read_log(tmp_path).check(head)
    (tmp_path / FILE).write_bytes(data[: frames[-1].offset])
    read_log(tmp_path).check()
    with pytest.raises(LogError, match="tampered"):
        read_log(tmp_path).check(head)


def test_zeros_after_a_loss_of_power_are_a_torn_tail(tmp_path: Path) -> None:
    data = write(tmp_path, 3)
    last = frame(b'{"a": 1}' * 900)
    for kept in (0, 3, 9, 20, 4000):
        (tmp_path / FILE).write_bytes(data + last[:kept] + bytes(len(last) - kept))
        found = read_log(tmp_path)
        found.check()
        assert found.fault is not None
        assert found.fault.kind == "torn"
        assert len(found.records) == 3


@pytest.mark.parametrize("seed", range(12))
def test_what_a_killed_writer_acknowledged_is_there(tmp_path: Path, seed: int) -> None:
    """kill -9 at random moments; every acknowledged record is found, in order, and the log goes on."""
    rng = random.Random(seed)
    program = [sys.executable, "-m", "tests.sandbox.log_writer", str(tmp_path)]
    acknowledged: list[str] = []
    for _ in range(2):
        with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            acknowledged.append(process.stdout.readline())
            time.sleep(rng.random() * 0.1)
            process.kill()
            acknowledged += process.stdout.readlines()
    found = read_log(tmp_path)
    found.check()
    hashes = {record.seq: record.hash for record in found.records}
    for line in acknowledged:
        if line.endswith("\n"):  # the pipe too is cut anywhere
            seq, digest = line.split()
            assert hashes[int(seq)] == digest


def test_a_write_cut_at_random_bytes_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    """The system refuses in the midst of a group: nothing of it stays, and later ones are refused."""
    rng = random.Random(7)
    for trial in range(20):
        folder = tmp_path / str(trial)

        async def work(folder: Path = folder) -> int:
            log = Log(folder, "box")
            acknowledged = 0
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(600, 6000), hard))
                with pytest.raises(LogError, match="cannot be written"):
                    while True:
                        await log.append("op.intent", op_id=str(acknowledged), req="x" * rng.randrange(900))
                        acknowledged += 1
                with pytest.raises(LogError, match="cannot be written"):
                    log.add("op.intent")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            await log.close()
            return acknowledged

        acknowledged = asyncio.run(work())
        found = read_log(folder)
        found.check()
        assert [record.op_id for record in found.records] == [str(number) for number in range(acknowledged)]
        assert found.fault is None


def test_concurrent_records_share_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes = 0
    real = os.fdatasync

    def counted(fd: int) -> None:
        nonlocal flushes
        flushes += 1
        real(fd)

    monkeypatch.setattr(os, "fdatasync", counted)

    async def work() -> None:
        log = Log(tmp_path, "box")
        await asyncio.gather(*(log.append("op.intent", op_id=str(number)) for number in range(200)))
        await log.close()

    asyncio.run(work())
    records = read_log(tmp_path).records
    assert [record.op_id for record in records] == [str(number) for number in range(200)]
    assert flushes < 20


def test_one_process_writes(tmp_path: Path) -> None:
    log = Log(tmp_path, "box")
    with pytest.raises(LogError, match="another process"):
        Log(tmp_path, "box")
    asyncio.run(log.close())
    asyncio.run(Log(tmp_path, "box").close())


def test_a_reader_follows(tmp_path: Path) -> None:
    async def work() -> list[int]:
        log = Log(tmp_path, "box")
        await log.append("create")

        async def reader() -> list[int]:
            return [record.seq async for record in log.read(follow=True)]

        task = asyncio.create_task(reader())
        for _ in range(20):
            await log.append("op.intent")
        await log.close()
        return await asyncio.wait_for(task, 10)

    assert asyncio.run(work()) == list(range(21))


@given(
    st.binary(max_size=400).flatmap(
        lambda data: st.tuples(st.just(data), st.lists(st.integers(0, len(data)), max_size=8))
    ),
    st.integers(1, 120),
)
def test_output_keeps_both_ends(case: tuple[bytes, list[int]], cap: int) -> None:
    data, cuts = case
    places = sorted([0, *cuts, len(data)])
    output = Output(cap, Budget(1 << 20))
    for begin, end in itertools.pairwise(places):
        output.add(data[begin:end])
    kept = output.kept()
    assert kept.total == len(data)
    if len(data) <= cap:
        assert kept.data == data
        assert not kept.truncated
    else:
        assert len(kept.data) == cap
        assert data.startswith(kept.data[: kept.head])
        assert data.endswith(kept.data[kept.head :])
        assert kept.head == cap - cap // 2


def test_output_reads_from_offsets_and_over_gaps() -> None:
    output = Output(10, Budget(100))
    output.add(b"0123456789")
    assert output.read(4) == (4, b"456789")
    output._tail.clear()  # as when the middle was dropped
    output.total = 100
    output._tail += b"vwxyz"
    assert output.read(7) == (95, b"vwxyz")


def test_a_sandbox_has_one_budget() -> None:
    budget = Budget(20000)
    first, second = Output(1 << 20, budget), Output(1 << 20, budget)
    first.add(b"a" * 15000)
    second.add(b"b" * 15000)
    assert len(first.kept().data) == 15000
    assert second.kept().truncated
    assert len(second.kept().data) == 8192


def test_blobs_are_checked(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    for kept in (whole(b""), whole(b"small"), whole(os.urandom(INLINE + 1)), Kept(os.urandom(9000), 20000, 5000)):
        assert blobs.fetch(json.loads(json.dumps(blobs.keep(kept)))) == kept
    digest = blobs.put(b"x" * 5000)
    blobs.path(digest).write_bytes(b"y" * 5000)
    with pytest.raises(LogError, match="not what its name says"):
        blobs.get(digest)
    with pytest.raises(LogError, match="cannot be read"):
        blobs.get("0" * 64)
    with pytest.raises(LogError, match="no digest"):
        blobs.get("../../etc/passwd")


@given(st.lists(st.binary(max_size=6), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_secrets_never_pass(noise: list[bytes], which: list[int]) -> None:
    secrets = {"A": "aba", "B": "ababc", "C": "s3cr3t"}
    hiding = Hiding(b"key", secrets)
    pieces: list[bytes] = []
    for index, piece in enumerate(noise):
        pieces.append(piece)
        if index < len(which):
            value = list(secrets.values())[which[index]].encode()
            pieces += [value[:2], value[2:]]
    stream = hiding.stream()
    out = b"".join([*(stream.feed(piece) for piece in pieces), stream.end()])
    assert not any(value.encode() in out for value in secrets.values())
    request = hiding.value({"argv": ["curl", "s3cr3t"], "n": 3})
    assert "s3cr3t" not in json.dumps(request)
    assert request == Hiding(b"key", secrets).value({"argv": ["curl", "s3cr3t"], "n": 3})
    assert request != Hiding(b"other", secrets).value({"argv": ["curl", "s3cr3t"], "n": 3})


def test_scan_of_nothing_and_of_noise() -> None:
    assert list(scan(b"")) == []
    (fault,) = scan(b"this is no log at all")
    assert isinstance(fault, Fault)
    assert fault.kind == "damaged"


@pytest.mark.parametrize("before", [10, 100, 1000])
def test_output_with_a_gap_has_its_beginning_its_end_and_its_size(before: int) -> None:
    output = Output(100, Budget(1000))
    output.add(bytes(range(before % 256)) if before < 256 else b"b" * before)
    begin = output.read(0)[1][:10]
    output.lose(500)
    output.add(b"e" * 20)
    kept = output.kept()
    assert (kept.total, kept.truncated) == (before + 520, True)
    assert kept.data[: kept.head].startswith(begin) and kept.data[kept.head :] == b"e" * 20
    assert output.read(before + 505) == (before + 505, b"e" * 15)
