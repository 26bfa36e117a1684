"""Write files so that nobody ever sees half of one: aside, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abyssal.base.errors import SaveError


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _save_error(path: Path, error: OSError) -> SaveError:
    return SaveError(f"cannot write {path}: {error.strerror or error}; what was there before is unchanged")


@contextmanager
def write_aside(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it becomes `path`, otherwise it is removed.

    Raises:
        SaveError: the file system refused (no space left, no permission, no such folder).
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _save_error(path, error) from error
    aside = Path(name)
    try:
        yield aside
        os.chmod(aside, 0o666 & ~_umask())
        _sync(aside)
        os.replace(aside, path)
        _sync(path.parent)
    except OSError as error:
        raise _save_error(path, error) from error
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def write_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling folder; on success it takes the name `path`, otherwise it is removed.

    An existing folder at `path` is replaced only at the end, by two renames: a process killed between them leaves
    it whole in a hidden sibling, `.<name>.old.*`.

    Raises:
        SaveError: the file system refused.
    """
    path = Path(path)
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _save_error(path, error) from error
    old: Path | None = None
    try:
        yield aside
        os.chmod(aside, 0o777 & ~_umask())
        for file in aside.rglob("*"):
            if file.is_file():
                _sync(file)
        _sync(aside)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old / path.name)
        os.replace(aside, path)
        _sync(path.parent)
    except OSError as error:
        raise _save_error(path, error) from error
    finally:
        # First of all, and for interrupts too: between the renames only `old` holds what was there before.
        if old is not None and not path.exists():
            os.replace(old / path.name, path)
        shutil.rmtree(aside, ignore_errors=True)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a whole file.

    Raises:
        SaveError: the file system refused; the old file is unchanged.
    """
    with write_aside(path) as aside:
        aside.write_bytes(data)


def write_json(path: Path | str, value: Any) -> None:
    """Write a JSON file, two spaces of indent, newline at the end.

    Raises:
        SaveError: the file system refused; the old file is unchanged.
    """
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def sha256_of(path: Path | str) -> str:
    """Hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
