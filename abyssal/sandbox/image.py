"""Images: what a sandbox finds on its disk (sandbox.md 3).

An image is a list of layers, lowest first, and the settings of programs. Layers are EROFS files, named by the digest
of their bytes, in `layers/` of the state folder; images are JSON files in `images/`. The layers fall into three groups,
`base`, `workspace` and `toolkit`, that can be exchanged one by one. The image "host" has no layers: it shows the host's
own programs, see `host_image`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from abyssal.base.files import sha256_of, write_aside, write_json
from abyssal.sandbox.errors import ImageError, Unsupported

GroupName = Literal["base", "workspace", "toolkit"]
GROUPS: tuple[GroupName, ...] = ("base", "workspace", "toolkit")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Image:
    """What a sandbox starts from.

    Attributes:
        base, workspace, toolkit: digests of layers, lowest first; toolkit lies on workspace lies on base.
        env: of every command, below the sandbox's own.
        binds: folders of the host that are shown read-only at the same place; only image "host" has any.
        architecture: of its programs.
        scrubbed: what was left out when it was made from a sandbox.
    """

    base: tuple[str, ...] = ()
    workspace: tuple[str, ...] = ()
    toolkit: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    binds: tuple[str, ...] = ()
    architecture: str = ""
    scrubbed: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers, lowest first."""
        return (*self.base, *self.workspace, *self.toolkit)


def from_json(said: Mapping[str, Any]) -> Image:
    """An image whose fields were written as JSON.

    Raises:
        ValueError, KeyError, TypeError: they are of another kind.
    """
    lists = {key: tuple(said[key]) for key in (*GROUPS, "binds", "scrubbed")}
    return Image(**lists, env=dict(said["env"]), architecture=str(said["architecture"]))


class Blocks:
    """A layer read piece by piece; what fetches layers from elsewhere on demand has the same methods."""

    def __init__(self, path: Path):
        self._file = open(path, "rb")  # noqa: SIM115
        self.size = path.stat().st_size

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at a place."""
        self._file.seek(offset)
        return self._file.read(length)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


class Store:
    """Images and layers in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._layers, self._images = folder / "layers", folder / "images"
        for each in (self._layers, self._images):
            each.mkdir(parents=True, exist_ok=True)

    def names(self) -> Sequence[str]:
        """Images that there are, besides "host"."""
        return sorted(path.stem for path in self._images.glob("*.json"))

    def get(self, name: str) -> Image:
        """An image by name.

        Raises:
            ImageError: there is none, or it is damaged or lacks a layer.
        """
        path = self._images / f"{_checked(name)}.json"
        try:
            image = from_json(json.loads(path.read_text()))
        except FileNotFoundError as error:
            known = ", ".join(["host", *self.names()])
            raise ImageError(f"no image {name!r} on this host; there are: {known}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ImageError(f"image {name!r} is damaged ({error}): import it again") from error
        for digest in image.layers:
            self.layer(digest)
        return image

    def put(self, name: str, image: Image) -> None:
        """Keep an image under a name.

        Raises:
            ImageError: a bad name, or a layer that is missing.
        """
        for digest in image.layers:
            self.layer(digest)
        write_json(self._images / f"{_checked(name)}.json", asdict(image))

    def layer(self, digest: str) -> Path:
        """The file of a layer.

        Raises:
            ImageError: there is none.
        """
        path = self._layers / f"{digest}.erofs"
        if not _DIGEST.fullmatch(digest) or not path.is_file():
            raise ImageError(f"no layer {digest} on this host: import its image again")
        return path

    def open(self, digest: str) -> Blocks:
        """A layer, to be read piece by piece.

        Raises:
            ImageError: there is none.
        """
        return Blocks(self.layer(digest))

    def add(self, file: Path) -> str:
        """Take in a packed layer.

        Returns:
            its digest.
        """
        digest = sha256_of(file)
        path = self._layers / f"{digest}.erofs"
        if not path.exists():
            with write_aside(path) as aside:
                shutil.copyfile(file, aside)
            path.chmod(0o644)
        return digest

    def verify(self, digest: str) -> None:
        """Read a whole layer and compare.

        Raises:
            ImageError: it is not what its name says.
        """
        found = sha256_of(self.layer(digest))
        if found != digest:
            raise ImageError(f"layer {digest} is damaged (its bytes have digest {found}): import its image again")

    def pack(self, folder: Path, exclude: Sequence[str] = ()) -> str:
        """A folder as a new layer.

        Args:
            folder: an overlay's upper directory or a root file system; whiteouts and attributes are kept.
            exclude: paths in it, relative, that are left out.
        Returns:
            its digest: the same for the same content.
        """
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".pack.") as scratch:
            file = Path(scratch) / "layer.erofs"
            pack(folder, file, exclude)
            return self.add(file)

    def grow(self, name: str, from_name: str, layer: Path, group: GroupName = "workspace") -> Image:
        """A new image: another one with a layer more, such as a snapshot made of a sandbox that began from it.

        Raises:
            ImageError: no such image, or a bad name.
        """
        old, new = self.get(from_name), self.add(layer)
        groups: dict[GroupName, tuple[str, ...]] = {each: getattr(old, each) for each in GROUPS}
        groups[group] += (new,)
        image = Image(
            groups["base"], groups["workspace"], groups["toolkit"], old.env, old.binds, old.architecture, old.scrubbed
        )
        self.put(name, image)
        return image


def pack(folder: Path, file: Path, exclude: Sequence[str] = (), owner: int | None = None) -> None:
    """A folder as an EROFS file: sorted names, fixed times and identity, so that the same content gives the same bytes.

    Args:
        folder, exclude: see `Store.pack`.
        file: to be written.
        owner: of everything, whoever owns it in the folder; None for what is there.
    Raises:
        Unsupported: mkfs.erofs is missing.
        ImageError: it refused.
    """
    mkfs = shutil.which("mkfs.erofs") or shutil.which("mkfs.erofs", path="/sbin:/usr/sbin")
    if mkfs is None:
        raise Unsupported("layers need mkfs.erofs: apt-get install erofs-utils")
    options = ["--quiet", "-T0", "-U00000000-0000-0000-0000-000000000000", "-x0"]
    options += [f"--exclude-path={path}" for path in exclude]
    if owner is not None:
        options += [f"--force-uid={owner}", f"--force-gid={owner}"]
    done = subprocess.run([mkfs, *options, str(file), str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImageError(f"mkfs.erofs cannot pack {folder}: {(done.stderr or done.stdout).strip()[-300:]}")


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ImageError(f"{name!r} is no name of an image: use small letters, digits, dots and dashes")
    return name
