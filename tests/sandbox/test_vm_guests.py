"""Real guests: one cold start, then everything that machines can do, from its template."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from abyssal.sandbox.api import Allowed, Box, Limits, Network, Require, Spec
from abyssal.sandbox.conformance.bench import python, run
from abyssal.sandbox.engines.qemu_microvm import QemuMicrovmEngine
from abyssal.sandbox.engines.qemu_vm import QemuVmEngine
from abyssal.sandbox.errors import AgentLost, Unsupported
from abyssal.sandbox.vm.box import VmBox
from abyssal.sandbox.vm.engine import MachineEngine

MIB = 1 << 20
PROGRAMS = ("qemu-system-x86_64", "bwrap", "mkfs.erofs", "mke2fs", "lz4", "dpkg-query", "apt-get")
missing = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="control groups need root"),
    pytest.mark.xdist_group("guests"),
]
SMALL = Limits(memory=64 * MIB, pids=32, disk=32 * MIB)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@asynccontextmanager
async def guest(
    engine: MachineEngine, folder: Path, name: str = "guest", limits: Limits = SMALL
) -> AsyncIterator[VmBox]:
    (folder / name).mkdir()
    spec = Spec(engine.substrates[0], limits=limits, env={"MARK": "mine"})
    box = await engine.create(f"{name}-{os.getpid()}", spec, folder / name)
    try:
        yield box
    finally:
        await box.stop()
        assert not list((folder / name).iterdir())


async def told(box: Box, command: str, **settings: object) -> str:
    outcome = await run(box, command, timeout=60.0, **settings)
    assert outcome.code == 0, outcome
    return outcome.stdout


IDENTITY = "hostname; cat /etc/machine-id; head -c 16 /dev/urandom | od -An -x"


@pytest.mark.timeout(300)
def test_a_guest_its_forks_and_its_end(state: Path, tmp_path: Path) -> None:
    async def life() -> None:
        engine = QemuMicrovmEngine(state)
        async with guest(engine, tmp_path, "cold") as box:
            assert (box.placed.boundary, box.placed.accel) in (("vm-emulated", "tcg"), ("vm-hardware", "kvm"))
            assert "mine 1000 6." in await told(box, "echo $MARK $(id -u) $(uname -r)")
            assert await told(box, "ls /sys/class/net") == "lo\n"
            cold = await told(box, IDENTITY)

        async with guest(engine, tmp_path, "warm") as box:
            warm = await told(box, IDENTITY)
            assert not set(cold.split()) & set(warm.split()), "a template's children are not each other"
            await box.files.write("/work/kept", b"before")
            # memory goes along: this one counts on in every copy
            await told(box, "echo $$ > /tmp/memory")
            kids = await box.fork([f"kid{index}-{os.getpid()}" for index in range(2)])
            try:
                texts = [await told(kid, IDENTITY) for kid in kids]
                assert len({word for text in [*texts, warm] for word in text.split()}) == 10 * 3
                for kid in kids:
                    assert await kid.files.read("/work/kept") == b"before"
                    assert await told(kid, "cat /tmp/memory") == await told(box, "cat /tmp/memory")
                await kids[0].files.write("/work/kept", b"changed")
                assert await kids[1].files.read("/work/kept") == b"before"
                assert await box.files.read("/work/kept") == b"before"
            finally:
                for kid in kids:
                    await kid.stop()
            # what it wrote is a layer; that it took something away, too
            await told(box, "rm -rf /etc/alternatives", user="root")
            (tmp_path / "snapshot").mkdir()
            said = await box.snapshot(tmp_path / "snapshot", memory=True)
            assert len(said["layer"]) == len(said["memory"]) == 64
            names = sorted(path.name for path in (tmp_path / "snapshot").iterdir())
            assert names == ["layer.erofs", "layer.json", "ram", "scratch.img", "state"]
        engine.close()

    asyncio.run(life())


@pytest.mark.timeout(300)
def test_limits_and_ends_are_told_apart(state: Path, tmp_path: Path) -> None:
    async def life() -> None:
        engine = QemuMicrovmEngine(state)
        async with guest(engine, tmp_path) as box:
            hungry = await run(box, python("x = b'x' * (200 << 20)"), timeout=60.0)
            assert (hungry.exit.limit, hungry.exit.signal) == ("memory", 9)
            assert await told(box, "echo alive") == "alive\n"
            panic = asyncio.create_task(run(box, "echo c > /proc/sysrq-trigger", user="root", timeout=60.0))
            with pytest.raises(AgentLost) as lost:
                await panic
            assert lost.value.cause == "guest-panic"
        with pytest.raises(AgentLost):
            await run(box, "true")
        engine.close()

    asyncio.run(life())


@pytest.mark.timeout(300)
def test_a_whole_pc_boots_from_its_disk(state: Path, tmp_path: Path) -> None:
    if tools := [name for name in ("syslinux", "mcopy", "qemu-img") if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(tools)}")

    async def life() -> None:
        engine = QemuVmEngine(state, templates=False)
        async with guest(engine, tmp_path) as box:
            line = await told(
                box, "cat /proc/cmdline; ls /sys/firmware /sys/bus/pci/devices; cat /sys/block/vda/vda1/partition"
            )
            assert "BOOT_IMAGE=vmlinuz" in line and "disk:2" in line and "0000:00" in line
        engine.close()

    asyncio.run(life())


@pytest.mark.timeout(300)
def test_a_sweep_ends_what_a_dead_platform_left_and_nothing_else(state: Path, tmp_path: Path) -> None:
    async def life() -> None:
        engine = QemuMicrovmEngine(state)
        async with guest(engine, tmp_path) as lost, guest(engine, tmp_path, "other") as alive:
            assert await engine.sweep(frozenset({alive.id})) == [lost.id]
            with pytest.raises(AgentLost):
                await run(lost, "true")
            assert await told(alive, "echo alive") == "alive\n"
            assert await engine.sweep(frozenset({alive.id})) == []
        engine.close()

    asyncio.run(life())


def test_what_cannot_be_met_is_refused(state: Path, tmp_path: Path) -> None:
    engine = QemuMicrovmEngine(state)
    specs = [
        Spec("microvm", network=Network("allow", (Allowed("example.org", 53, "udp"),))),
        Spec("container"),
        Spec("microvm", limits=Limits(memory=MIB)),
        Spec("microvm", require=Require(accel="none")),
    ]
    for spec in specs:
        with pytest.raises(Unsupported):
            asyncio.run(engine.create("refused", spec, tmp_path))
    assert not list(tmp_path.iterdir())
