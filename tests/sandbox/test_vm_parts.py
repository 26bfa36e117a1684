"""Parts of virtual machines that need no guest: first root, modules, disks, command lines, monitor, layers."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import socket
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from abyssal.sandbox.errors import AgentLost, ImageError
from abyssal.sandbox.vm import disks, kernel, qemu
from abyssal.sandbox.vm.ext4 import ROOT, Ext4
from abyssal.sandbox.vm.initramfs import pack
from abyssal.sandbox.vm.qemu import Hardware, Wires
from abyssal.sandbox.vm.qmp import Monitor, QmpError

MIB = 1 << 20
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="whiteouts and owners need root")


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@needs("cpio")
def test_the_first_root_is_read_by_cpio(tmp_path: Path) -> None:
    data = pack({"init": b"program", "modules/00-a.ko": b"x" * 5})
    subprocess.run(["cpio", "-id", "--quiet"], input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "init").read_bytes() == b"program"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "modules/00-a.ko").read_bytes() == b"xxxxx"
    assert (tmp_path / "proc").is_dir()
    assert pack({"modules/00-a.ko": b"x" * 5, "init": b"program"}) == data


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    found = {}
    for name, needed in {"a": "b,c-d", "b": "", "c_d": "b", "e": ""}.items():
        found[name] = tmp_path / name
        found[name].write_bytes(b"\x7fELF\0license=GPL\0depends=" + needed.encode() + b"\0name=x\0")
    assert kernel.ordered(["a", "e", "built_in"], found) == ["b", "c_d", "a", "e"]


def test_a_kernel_packed_in_an_unknown_way_is_refused() -> None:
    image = bytearray(4096)
    image[0x1F1], image[0x248:0x250] = 1, (0).to_bytes(4, "little") + (64).to_bytes(4, "little")
    with pytest.raises(ImageError, match="unknown way"):
        kernel.plain(bytes(image))


def test_copies_are_as_sparse_as_what_they_copy(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(32 * MIB)
        file.write(b"here")
    disks.copy_file(source, tmp_path / "copy")
    about = (tmp_path / "copy").stat()
    assert (about.st_size, about.st_blocks * 512 < MIB) == (64 * MIB, True)
    with (tmp_path / "copy").open("rb") as file:
        file.seek(32 * MIB)
        assert file.read(4) == b"here"


def wires() -> Wires:
    return Wires(3, 4, 5, 6, 7, kernel=8, initramfs=9, disk=None, layers=(10, 11))


@pytest.mark.parametrize("machine", ["microvm", "q35"])
def test_machines_have_no_defaults_network_or_rights(machine: str) -> None:
    line = "root=here"
    hardware = Hardware(machine, "tcg", 2, 256 * MIB, Path("k"), Path("i"), line)  # type: ignore[arg-type]
    words = qemu.argv(hardware, wires(), shared=True, incoming=False)
    text = " ".join(words)
    assert {"-nodefaults", "-no-user-config", "-S", "-no-reboot"} <= set(words)
    assert "-nic none" in text and "netdev" not in text
    assert "spawn=deny" in text and "elevateprivileges=deny" in text
    assert "share=on" in text and "incoming" not in text
    assert "share=off" in " ".join(qemu.argv(hardware, wires(), shared=False, incoming=True))
    # layers cannot be written, and keep their order
    assert text.index("serial=L0") < text.index("serial=L1") < text.index("serial=scratch")
    assert all("read-only=on" in word for word in words if word.startswith("driver=raw") and "d2" not in word)
    assert (machine == "microvm") == ("pic=on,pit=on,rtc=on" in text)


def test_the_monitor_pairs_answers_with_commands() -> None:
    async def talk() -> None:
        ours, theirs = socket.socketpair()
        monitor = Monitor(ours)
        theirs.sendall(b'{"QMP": {}}\n{"event": "STOP"}\n')
        begun = asyncio.create_task(monitor.begin())
        await asyncio.sleep(0.05)
        theirs.sendall(b'{"return": {}, "id": 1}\n')
        await begun
        one, two = asyncio.create_task(monitor.run("one")), asyncio.create_task(monitor.run("two", fds=(0,)))
        await asyncio.sleep(0.05)
        theirs.sendall(b'{"return": 2, "id": 3}\n{"error": {"desc": "no such thing"}, "id": 2}\n')
        assert await two == 2
        with pytest.raises(QmpError, match="no such thing"):
            await one
        assert monitor.events == ["STOP"]
        waiting = asyncio.create_task(monitor.run("three"))
        await asyncio.sleep(0.05)
        theirs.close()
        with pytest.raises(AgentLost):
            await waiting
        await monitor.close()

    asyncio.run(talk())


def made_disk(folder: Path, tmp_path: Path) -> Path:
    disk = tmp_path / "disk"
    disks.scratch(disk, 16 * MIB)
    disk.unlink()
    with disk.open("wb") as file:
        file.truncate(16 * MIB)
    options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", str(folder)]
    subprocess.run(["mke2fs", *options, str(disk)], check=True)
    return disk


@root_only
@needs("mke2fs")
def test_ext4_is_read_without_the_kernel(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "upper/sub").mkdir(parents=True)
    content = os.urandom(300_000)
    (folder / "upper/sub/file").write_bytes(content)
    (folder / "upper/sub/file").chmod(0o640)
    os.chown(folder / "upper/sub/file", 70_000, 80_000)
    os.symlink("short", folder / "upper/link")
    os.symlink("x" * 200, folder / "upper/long")
    os.mknod(folder / "upper/gone", 0o020000, os.makedev(0, 0))
    for index in range(500):
        (folder / f"upper/sub/{index:03d}-{'n' * 40}").touch()
    os.setxattr(folder / "upper/sub", "trusted.overlay.opaque", b"y")
    reader = Ext4(made_disk(folder, tmp_path))
    upper = reader.inode(reader.names(reader.inode(ROOT))[b"upper"])
    names = {name: reader.inode(number) for name, number in reader.names(upper).items()}
    assert set(names) == {b"sub", b"link", b"long", b"gone"}
    assert names[b"gone"].whiteout and not names[b"link"].whiteout
    assert (reader.target(names[b"link"]), reader.target(names[b"long"])) == (b"short", b"x" * 200)
    assert reader.extended(names[b"sub"]) == {"trusted.overlay.opaque": b"y"}
    inner = reader.names(names[b"sub"])
    assert len(inner) == 501
    file = reader.inode(inner[b"file"])
    assert (file.mode & 0o777, file.uid, file.gid, file.size) == (0o640, 70_000, 80_000, 300_000)
    assert b"".join(data for _, data in reader.parts(file)) == content
    reader.close()


@needs("mke2fs")
def test_a_damaged_disk_is_an_error_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "upper/sub").mkdir(parents=True)
    (folder / "upper/file").write_bytes(b"content" * 1000)
    whole = made_disk(folder, tmp_path).read_bytes()
    broken = tmp_path / "broken"

    def walk(reader: Ext4, number: int, depth: int) -> None:
        inode = reader.inode(number)
        reader.extended(inode)
        if depth < 4 and inode.mode & 0o170000 == 0o040000:
            for inner in reader.names(inode).values():
                walk(reader, inner, depth + 1)
        else:
            for _ in reader.parts(inode):
                pass

    chance = random.Random(3)
    meant = [at for at in range(1024, len(whole)) if whole[at]]  # zeros are nothing to damage
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 8, 64])):
            data[chance.choice(meant)] = chance.randrange(256)
        broken.write_bytes(data)
        try:
            with closing(Ext4(broken)) as reader:
                walk(reader, ROOT, 0)
        except ImageError:
            refused += 1
    assert refused  # and no other exception
