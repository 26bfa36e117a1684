"""Prose and code out of installed packages, named, licensed and hashed; nothing is downloaded to build them.

    build(out)          prose.jsonl, code.jsonl to train on, prose.held_out.jsonl, code.held_out.jsonl to measure
                        bits per byte on, manifest.json
    fetch(DEBIAN, dir)  more prose, from Debian packages by name, for machines that have apt

Whether a document is held out follows from the name of its file alone, so a file's code and the prose in its
docstrings are on the same side, and another version of a package keeps the same files held out.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from abyssal.base.errors import DataError, RunError
from abyssal.base.files import write_aside, write_json
from abyssal.train.data.contamination import Contamination
from abyssal.train.data.readers import READERS, clean
from abyssal.train.data.token_file import digest_of

Kind = Literal["prose", "code"]
KINDS: tuple[Kind, ...] = ("prose", "code")
HELD_OUT_PERCENT = 2
SHORTEST = 200  # characters of a document
LONGEST_CODE = 150_000  # characters; longer files are tables, not programs
# folders: others' packages, tests, texts that a reader of their own takes, and tables of characters
SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "_vendor", "pydoc_data", "encodings"})
LONG_PARAGRAPH = 60  # characters; shorter ones (headings) may repeat


@dataclass(frozen=True)
class Source:
    """Files of a package that hold text.

    Attributes:
        package: its name; "python" is the standard library.
        licence: as the package states it.
        origin: who ships it.
        kind: what the text is.
        reader: a key of `readers.READERS`.
        pattern: files, relative to the library folder (pip), the standard library, or the package's root (Debian).
        also: further Debian packages that the reader needs.
    """

    package: str
    licence: str
    origin: Literal["python", "pip", "debian"]
    kind: Kind
    reader: str
    pattern: str
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of this source among others."""
        return f"{self.package}:{self.reader}"


def _of_pip(package: str, licence: str) -> tuple[Source, Source]:
    """A package's code and the prose of its docstrings."""
    pattern = f"{package}/**/*.py"
    return (
        Source(package, licence, "pip", "prose", "docstrings", pattern),
        Source(package, licence, "pip", "code", "code", pattern),
    )


PYTHON = (
    Source("python", "PSF-2.0", "python", "prose", "topics", "pydoc_data/topics.py"),
    Source("python", "PSF-2.0", "python", "prose", "docstrings", "**/*.py"),
    Source("python", "PSF-2.0", "python", "code", "code", "**/*.py"),
)
# what abyssal itself depends on, so it is on every machine
PIP = (
    *_of_pip("numpy", "BSD-3-Clause"),
    *_of_pip("networkx", "BSD-3-Clause"),
    *_of_pip("jinja2", "BSD-3-Clause"),
    *_of_pip("starlette", "BSD-3-Clause"),
    *_of_pip("uvicorn", "BSD-3-Clause"),
    *_of_pip("typer", "MIT"),
    *_of_pip("rich", "MIT"),
    *_of_pip("pydantic", "MIT"),
    *_of_pip("pyparsing", "MIT"),
    Source("sympy", "BSD-3-Clause", "pip", "prose", "docstrings", "sympy/**/*.py"),
    Source("matplotlib", "PSF-based (matplotlib)", "pip", "prose", "docstrings", "matplotlib/**/*.py"),
    Source("torch", "BSD-3-Clause", "pip", "prose", "docstrings", "torch/**/*.py"),
)
DEFAULT = (*PYTHON, *PIP)


def _of_debian(package: str, licence: str, reader: str, pattern: str, *also: str) -> Source:
    return Source(package, licence, "debian", "prose", reader, pattern, also)


DEBIAN = (
    _of_debian("bible-kjv-text", "public domain (King James)", "bible", "usr/lib/bible.data", "bible-kjv"),
    _of_debian("jargon-text", "public domain", "plain", "usr/share/doc/jargon-text/jargon.txt.gz"),
    _of_debian("python3.11-doc", "PSF-2.0", "html", "usr/share/doc/python3.11/html/*/*.html"),
    _of_debian("debian-handbook", "GPL-2+ or CC-BY-SA-3.0", "html", "usr/share/doc/debian-handbook/html/en-US/*.html"),
    _of_debian("installation-guide-amd64", "GPL-2", "html", "usr/share/doc/installation-guide-amd64/en/*.html"),
    _of_debian("debian-reference-en", "GPL-2+", "html", "usr/share/debian-reference/*.en.html"),
    _of_debian("developers-reference", "GPL-2+", "html", "usr/share/developers-reference/*.html"),
    _of_debian("debian-faq", "GPL-2+", "html", "usr/share/doc/debian/FAQ/*.en.html"),
    _of_debian("maint-guide", "GPL-2+", "html", "usr/share/doc/maint-guide/html/*.en.html"),
)


@dataclass(frozen=True)
class Document:
    """A text with the file it came from, relative to its package, and its place among that file's documents."""

    source: str
    file: str
    part: int
    text: str

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training; by the file alone, or by the part where one file holds a book."""
        key = f"{self.file}#{self.part}" if self.part else self.file
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def fetch(sources: Iterable[Source], folder: Path) -> None:
    """Download the Debian packages of these sources by name and unpack them below `folder`; none is installed.

    Raises:
        RunError: apt-get is not here, or does not know a package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # apt drops its rights to the user _apt, who must be able to write here
    os.chmod(folder, 0o777)
    for package in sorted({p for s in sources if s.origin == "debian" for p in (s.package, *s.also)}):
        if (folder / package).is_dir():
            continue
        try:
            subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True, capture_output=True)
            deb = next(folder.glob(f"{package}_*.deb"))
            unpack(deb, folder / package)
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            raise RunError(f"cannot fetch the Debian package {package} ({error}): run apt-get update") from None


def unpack(deb: Path, target: Path) -> None:
    """Unpack a Debian package and note its version.

    Raises:
        CalledProcessError: it is no package.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["dpkg-deb", "-x", str(deb), str(target)], check=True, capture_output=True)
    (target / "VERSION").write_text(deb.name.split("_")[1])


def documents_of(source: Source, packages: Path | None = None) -> Iterator[Document]:
    """The documents of a source, in the order of their files' names.

    Args:
        source: what to read.
        packages: where `fetch` unpacked Debian packages.
    Raises:
        DataError: the package is not here.
    """
    root, files = _files(source, packages)
    if not files:
        remedy = "install it" if source.origin == "pip" else "fetch it, and pass the folder"
        raise DataError(f"no file of {source.package} matches {source.pattern}: {remedy}")
    for path in files:
        relative = path.relative_to(root).as_posix()
        for part, text in enumerate(READERS[source.reader](path)):
            yield Document(source.name, f"{source.package}/{relative}", part, clean(text))


def build(
    out: Path | str,
    sources: Iterable[Source] = DEFAULT,
    *,
    packages: Path | None = None,
    evaluation: Mapping[str, Iterable[str]] | None = None,
) -> dict[str, Any]:
    """Read, clean, split, check and write a corpus.

    Held-out documents are read first, so that none of their paragraphs is left in training. Training documents
    that share thirteen words in a row with an evaluation item are dropped and counted.

    Args:
        out: folder for the files; made if needed.
        sources: what to read.
        packages: where `fetch` unpacked Debian packages.
        evaluation: texts of the items of every evaluation set.
    Returns:
        The manifest as written.
    Raises:
        DataError: a package is not here.
        SaveError: the file system refused.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sources = list(sources)
    found = {source.name: list(documents_of(source, packages)) for source in sources}
    contamination = Contamination(evaluation or {})
    seen: set[str] = set()
    kept: dict[tuple[Kind, bool], list[Document]] = {(kind, held): [] for kind in KINDS for held in (True, False)}
    rows = []
    for held_out in (True, False):
        for source in sources:
            texts = []
            dropped = 0
            for document in found[source.name]:
                if document.held_out is not held_out:
                    continue
                text = _new_part(document, source.kind, seen)
                if len(text) < SHORTEST or (source.kind == "code" and len(text) > LONGEST_CODE):
                    continue
                if not held_out and contamination.check(text):
                    dropped += 1
                    continue
                kept[source.kind, held_out].append(Document(document.source, document.file, document.part, text))
                texts.append(text)
            rows.append(
                {
                    "source": source.name,
                    "part": "held_out" if held_out else "train",
                    "kind": source.kind,
                    "licence": source.licence,
                    "version": _version(source, packages),
                    "documents": len(texts),
                    "bytes": sum(len(text.encode()) for text in texts),
                    "dropped_as_contaminated": dropped,
                    "sha256": digest_of(texts),
                }
            )
    for (kind, held_out), documents in kept.items():
        _write(out / _file_name(kind, held_out), documents)
    manifest = {"sources": rows, "contamination": contamination.counts()}
    write_json(out / "manifest.json", manifest)
    return manifest


def read_corpus(folder: Path | str, kind: Kind, *, held_out: bool = False) -> Iterator[str]:
    """The texts of a corpus that `build` wrote, in their order.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = Path(folder) / _file_name(kind, held_out)
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read the corpus {path} ({error}): build it again") from None


def _file_name(kind: Kind, held_out: bool) -> str:
    return f"{kind}.held_out.jsonl" if held_out else f"{kind}.jsonl"


def _write(path: Path, documents: list[Document]) -> None:
    with write_aside(path) as aside, open(aside, "w", encoding="utf-8") as file:
        for document in documents:
            row = {"source": document.source, "file": document.file, "part": document.part, "text": document.text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _new_part(document: Document, kind: Kind, seen: set[str]) -> str:
    """What of a document has not been seen: paragraphs of prose, whole files of code."""
    if kind == "code":
        if document.text in seen:
            return ""
        seen.add(document.text)
        return document.text
    fresh = []
    for paragraph in document.text.split("\n"):
        key = paragraph if len(paragraph) > LONG_PARAGRAPH else f"{document.file}|{paragraph}"
        if paragraph and key not in seen:
            seen.add(key)
            fresh.append(paragraph)
    return "\n".join(fresh)


def _files(source: Source, packages: Path | None) -> tuple[Path, list[Path]]:
    """A source's root folder and its files in order."""
    if source.origin == "debian":
        if packages is None:
            raise DataError(f"{source.package} is a Debian package: fetch it, and pass the folder")
        root = packages / source.package
    else:
        root = Path(sysconfig.get_path("stdlib" if source.origin == "python" else "purelib"))
    skipped = set() if source.reader == "topics" else SKIPPED
    files = (p for p in root.glob(source.pattern) if not skipped & set(p.relative_to(root).parts))
    return root, sorted(p for p in files if p.is_file())


def _version(source: Source, packages: Path | None) -> str:
    if source.origin == "python":
        return platform.python_version()
    if source.origin == "pip":
        return importlib.metadata.version(source.package)
    assert packages is not None  # documents_of has refused that
    note = packages / source.package / "VERSION"
    return note.read_text() if note.is_file() else "unknown"
