"""Files through the API, and paths that try to lead elsewhere."""

from __future__ import annotations

import io
import tarfile
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

from abyssal.sandbox.api import Command, shell
from abyssal.sandbox.conformance.bench import Bench, Checks, answers, expect, run
from abyssal.sandbox.errors import NotFound, PathError, SandboxError

check = Checks()


async def once(data: bytes) -> AsyncIterator[bytes]:
    """A stream of two pieces."""
    yield data[: len(data) // 2]
    yield data[len(data) // 2 :]


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """An archive as bytes."""
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return into.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    """A header."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


async def refused(work: Awaitable[object], *errors: type[SandboxError]) -> None:
    """It raises one of these."""
    try:
        await work
    except errors:
        return
    expect(False, f"not refused with {errors}", work)


@check("files")
async def writes_reads_lists_moves_removes(bench: Bench) -> None:
    async with bench.box() as box:
        files, data = box.files, bytes(range(256)) * 3000
        await files.write("a/b/file", data, 0o640)
        expect(await files.read("/work/a/b/file") == data, "whole")
        expect(await files.read("a/b/file", 255, 2) == b"\xff\x00", "a part")
        stat = await files.stat("a/b/file")
        expect((stat.kind, stat.size, stat.mode) == ("file", len(data), 0o640), "stat", stat)
        expect((await run(box, "find a/b/file -printf %u")).stdout == "user", "it belongs to the user")
        await run(box, "ln -s b a/link; touch a/aa 'a/z z'")
        listed = await files.list("a")
        expect([each.path for each in listed] == ["a/aa", "a/b", "a/link", "a/z z"], "sorted", listed)
        expect([each.kind for each in listed] == ["file", "folder", "link", "file"], "kinds", listed)
        await files.make_folder("new/deep")
        await files.move("a/b/file", "new/deep/file")
        await refused(files.read("a/b/file"), NotFound)
        await files.remove("new")
        await refused(files.stat("new"), NotFound)


@check("files")
async def what_is_no_file_is_refused(bench: Bench) -> None:
    async with bench.box() as box:
        await run(box, "mkfifo fifo; mkdir folder; echo x > file; ln -s loop loop")
        for path in ("fifo", "folder", "/dev/zero", "/dev/tty", "loop", "/proc/1/cwd/x"):
            await refused(box.files.read(path), PathError, NotFound)
        own = (await run(box, "cat /etc/passwd")).stdout.encode()
        try:
            seen = await box.files.read("/proc/self/root/etc/passwd")
        except (PathError, NotFound):
            pass
        else:  # a kernel of its own has no root but the box's
            expect(box.placed.boundary != "shared-kernel" and seen == own, "through a link of /proc", seen)
        for path in ("fifo", "folder", "/dev/null", "file/below", "x" * 300, "/proc/sys/kernel/core_pattern"):
            await refused(box.files.write(path, b"x"), PathError, NotFound)
        await refused(box.files.write("a\0b", b"x"), PathError)
        await answers(box)


@check("files")
async def links_lead_nowhere_outside(bench: Bench) -> None:
    async with bench.box() as box:
        outside = "/etc/abyssal-conformance-canary"
        await run(box, f"ln -s {'../' * 20}etc up; ln -s / root; ln -s {outside} out")
        for path in ("up/shadow", "root/etc/shadow", "/../../../etc/shadow", "../../../../../etc/shadow"):
            await refused(box.files.read(path), NotFound, PathError)
        for path in ("out", "root/etc/abyssal-conformance-canary", f"../../../..{outside}"):
            try:
                await box.files.write(path, b"x")
            except SandboxError:
                continue
        expect(not Path(outside).exists(), "a file was written on the host")


@check("files")
async def a_link_swapped_all_the_time(bench: Bench) -> None:
    async with bench.box() as box:
        swap = "mkdir d; echo in > d/passwd; while :; do ln -sfn /etc p; ln -sfn d p; done"
        process = await box.start(Command(shell(swap), timeout=60))
        seen = set()
        for _ in range(100):
            try:
                seen.add(await box.files.read("p/passwd"))
            except SandboxError:
                continue
        await process.signal(9)
        expect(Path("/etc/passwd").read_bytes() not in seen, "the host's file was read")


@check("files")
async def trees_travel(bench: Bench) -> None:
    async with bench.box() as box:
        link = member("top/link", tarfile.SYMTYPE, "sub/file")
        hard = member("top/hard", tarfile.LNKTYPE, "top/sub/file")
        script = member("top/run")
        script.mode = 0o755
        packed = tar_of((member("top/sub/file"), b"data"), (link, b""), (hard, b""), (script, b"#!/bin/sh\necho ran\n"))
        await box.files.upload("into", once(packed))
        expect((await run(box, "cat into/top/link into/top/hard; into/top/run")).stdout == "datadataran\n", "unpacked")
        stream = b"".join([part async for part in box.files.download("into")])
        with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
            names = archive.getnames()
            expect(names == [".", "top", "top/hard", "top/link", "top/run", "top/sub", "top/sub/file"], "names", names)
            content = archive.extractfile("top/sub/file")
            expect(content is not None and content.read() == b"data", "content")


@check("files")
async def hostile_archives_are_refused(bench: Bench) -> None:
    bad = (
        member("../out"),
        member("/tmp/out"),
        member("a/../../out"),
        member("link", tarfile.SYMTYPE, "/etc"),
        member("link", tarfile.SYMTYPE, "../../etc"),
        member("hard", tarfile.LNKTYPE, "/etc/passwd"),
        member("hard", tarfile.LNKTYPE, "../passwd"),
        member("node", tarfile.CHRTYPE),
        member("node", tarfile.BLKTYPE),
        member("pipe", tarfile.FIFOTYPE),
    )
    async with bench.box() as box:
        for info in bad:
            await refused(box.files.upload("into", once(tar_of((info, b"")))), PathError)
        await refused(box.files.upload("into", once(b"no archive" * 100)), PathError)
        look = "find into -mindepth 1; for f in /tmp/out /work/out; do test -e $f && echo $f; done"
        left = (await run(box, look)).stdout
        expect(left == "", "something was unpacked", left)


@check("files")
async def ten_thousand_names(bench: Bench) -> None:
    async with bench.box() as box:
        made = await run(box, "mkdir many; cd many; seq -f %05g 10000 | xargs touch", timeout=120)
        expect(made.code == 0, "made", made.stderr)
        listed = await box.files.list("many")
        expect(len(listed) == 10_000 and listed[0].path == "many/00001", "all, sorted", len(listed))
        await box.files.remove("many")
        await answers(box)


@check("files")
async def a_file_that_claims_to_be_huge(bench: Bench) -> None:
    async with bench.box() as box:
        await run(box, "truncate -s 50M huge || true")
        expect(len(await box.files.read("huge", 40 << 20, 10)) == 10, "a hole can be read in parts")
        await run(box, ("/usr/bin/python3", "-c", "open('huger','w').truncate(1 << 29)"))
        try:
            await box.files.read("huger")
        except SandboxError:
            pass
        else:
            expect((await box.files.stat("huger")).size < 1 << 29, "half a gigabyte was read into the host's memory")
