"""Images from archives and folders, and what must not get out of an archive."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import tarfile
from pathlib import Path

import pytest

from abyssal.sandbox.api import Spec
from abyssal.sandbox.conformance.bench import SMALL, run
from abyssal.sandbox.engines.runc import RuncEngine
from abyssal.sandbox.errors import ImageError, Unsupported
from abyssal.sandbox.image import Image, Store
from abyssal.sandbox.sources import from_archive, from_debian, from_folder

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="layers have owners: needs root")
needs_erofs = pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="apt-get install erofs-utils")
pytestmark = [needs_root, needs_erofs]
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "")


def layer(*members: tuple[str, bytes, str | bytes]) -> bytes:
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w") as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode = kind, 0o755
            data = content if isinstance(content, bytes) else b""
            info.linkname = content if isinstance(content, str) else ""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return into.getvalue()


def oci_layout(folder: Path, *layers: bytes) -> Path:
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return f"sha256:{digest}"

    config = blob(json.dumps({"architecture": ARCHITECTURE, "config": {"Env": ["FROM_IMAGE=yes"]}}).encode())
    listed = [{"digest": blob(gzip.compress(data))} for data in layers]
    manifest = blob(json.dumps({"config": {"digest": config}, "layers": listed}).encode())
    (folder / "index.json").write_text(json.dumps({"manifests": [{"digest": manifest}]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def busybox() -> bytes:
    found = shutil.which("busybox")
    if found is None:
        pytest.skip("apt-get install busybox-static")
    return Path(found).read_bytes()


def test_an_oci_image_runs_and_whiteouts_hold(tmp_path: Path, state: Path) -> None:
    program = busybox()
    lower = layer(
        ("bin", tarfile.DIRTYPE, b""),
        ("bin/busybox", tarfile.REGTYPE, program),
        *((f"bin/{name}", tarfile.SYMTYPE, "busybox") for name in ("sh", "ls", "cat", "echo", "true")),
        ("data/gone", tarfile.REGTYPE, b"gone"),
        ("data/kept", tarfile.REGTYPE, b"kept"),
        ("other/old", tarfile.REGTYPE, b"old"),
    )
    upper = layer(
        ("data/.wh.gone", tarfile.REGTYPE, b""),
        ("other/.wh..wh..opq", tarfile.REGTYPE, b""),
        ("other/new", tarfile.REGTYPE, b"new"),
    )
    engine = RuncEngine(state)
    image = from_archive(engine.store, "small", oci_layout(tmp_path / "layout", lower, upper))
    assert len(image.base) == 2 and len(image.toolkit) == 1

    async def work() -> None:
        probe = await engine.probe()
        if not probe.ok:
            pytest.skip(probe.detail)
        folder = tmp_path / "box"
        folder.mkdir()
        box = await engine.create("image-test", Spec("container", image="small", limits=SMALL), folder)
        try:
            outcome = await run(box, "ls /data /other; cat /data/kept; echo $FROM_IMAGE; echo x > /work/file")
            assert outcome.stdout == "/data:\nkept\n\n/other:\nnew\nkeptyes\n", outcome
            said = await box.snapshot(tmp_path / "snapshot")
        finally:
            await box.stop()
        grown = engine.store.grow("grown", "small", tmp_path / "snapshot/layer.erofs")
        assert grown.workspace == (said["layer"],)
        box = await engine.create("image-test", Spec("container", image="grown", limits=SMALL), folder)
        try:
            assert (await run(box, "cat /work/file")).stdout == "x\n"
        finally:
            await box.stop()

    asyncio.run(work())


@pytest.mark.parametrize(
    "members",
    [
        [("../out", tarfile.REGTYPE, b"x")],
        [("link", tarfile.SYMTYPE, "/tmp"), ("link/out", tarfile.REGTYPE, b"x")],
        [("link", tarfile.SYMTYPE, ".."), ("link/out", tarfile.REGTYPE, b"x")],
        [("hard", tarfile.LNKTYPE, "../../etc/passwd")],
        [("d", tarfile.SYMTYPE, "/"), ("hard", tarfile.LNKTYPE, "d/etc/passwd")],
    ],
)
def test_hostile_layers_are_refused(tmp_path: Path, members: list[tuple[str, bytes, str | bytes]]) -> None:
    store = Store(tmp_path / "state")
    with pytest.raises(ImageError):
        from_archive(store, "bad", oci_layout(tmp_path / "layout", layer(*members)))
    assert store.names() == [] and not Path("/tmp/out").exists()
    assert not list((tmp_path / "state").glob(".import*"))


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    (tmp_path / "file").write_bytes(b"nothing")
    for path in (tmp_path / "file", tmp_path / "absent", tmp_path):
        with pytest.raises(ImageError):
            from_archive(store, "bad", path)
    for name in ("../x", "", "A", "x/y"):
        with pytest.raises(ImageError):
            store.get(name)


def test_damage_is_found(tmp_path: Path) -> None:
    store, root = Store(tmp_path / "state"), tmp_path / "root"
    root.mkdir()
    (root / "file").write_text("content")
    image = from_folder(store, "mine", root)
    assert store.get("mine") == image
    store.verify(image.base[0])
    path = store.layer(image.base[0])
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ImageError, match="damaged"):
        store.verify(image.base[0])
    path.unlink()
    with pytest.raises(ImageError, match="no layer"):
        store.get("mine")
    with pytest.raises(ImageError):
        store.put("other", Image(base=("0" * 64,)))


def test_blocks_read_a_layer_in_pieces(tmp_path: Path) -> None:
    store, root = Store(tmp_path / "state"), tmp_path / "root"
    root.mkdir()
    digest = store.pack(root)
    blocks = store.open(digest)
    whole = store.layer(digest).read_bytes()
    assert blocks.size == len(whole) and blocks.read(1024, 4) == whole[1024:1028] == b"\xe2\xe1\xf5\xe0"
    blocks.close()


@pytest.mark.boxes
@pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="apt-get install mmdebstrap")
def test_debian_packages_run_and_nothing_of_this_host_comes_along(state: Path) -> None:
    """Minutes: some hundred packages are fetched and installed."""
    engine = RuncEngine(state)
    from_debian(engine.store, "debian", "bookworm", ["file"])

    async def scene() -> tuple[str, str]:
        folder = state.parent / "debian-box"
        folder.mkdir()
        box = await engine.create(folder.name, Spec("container", image="debian", limits=SMALL), folder)
        try:
            asked = "cat /etc/debian_version; file -b /bin/true; dpkg --get-selections file; ls /dev/null"
            here = await run(box, asked)
            left = "cat /etc/hostname /etc/resolv.conf /etc/apt/sources.list; find /var/log /var/cache -type f"
            return here.stdout, (await run(box, left)).stdout
        finally:
            await box.stop()

    here, left = asyncio.run(scene())
    version, kind, selected, null = here.splitlines()
    assert version.startswith("12.") and "ELF 64-bit" in kind and selected.split() == ["file", "install"]
    assert null == "/dev/null"
    assert left == "sandbox\n", "the name that all sandboxes have"


def test_debian_is_for_root(state: Path) -> None:
    store = Store(state)
    os.seteuid(65534)
    try:
        with pytest.raises(Unsupported, match="by root alone"):
            from_debian(store, "debian", "bookworm")
    finally:
        os.seteuid(0)
