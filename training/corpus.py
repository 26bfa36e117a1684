"""Build the English corpus of the first small model from Debian packages.

    python training/corpus.py --out DIR

Needs a Debian machine with apt. Every source is named in SOURCES with its licence; packages are downloaded
by name and unpacked into a temporary folder, none is installed. Writes train.txt and valid.txt (documents
separated by a form feed) and manifest.json.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

SEPARATOR = "\f"
PLAIN = {"“": '"', "”": '"', "’": "'", "‘": "'", "—": " - ", "–": "-", "…": "...", "\xa0": " "}
HELD_OUT_PERCENT = 1


@dataclass(frozen=True)
class Source:
    """A package and the files of it that hold prose."""

    package: str
    licence: str
    reader: str
    pattern: str


SOURCES = (
    Source("bible-kjv-text", "public domain (King James Bible)", "bible", "usr/lib/bible.data"),
    Source(
        "debian-handbook",
        "GPL-2+ or CC-BY-SA-3.0",
        "html",
        "usr/share/doc/debian-handbook/html/en-US/*.html",
    ),
    Source("jargon-text", "public domain (Jargon File)", "plain", "usr/share/doc/jargon-text/jargon.txt.gz"),
    Source("python3.11-doc", "PSF licence 2", "html", "usr/share/doc/python3.11/html/*/*.html"),
    Source("installation-guide-amd64", "GPL-2", "html", "usr/share/doc/installation-guide-amd64/en/*.html"),
    Source("debian-reference-en", "GPL-2+", "html", "usr/share/debian-reference/*.en.html"),
    Source("developers-reference", "GPL-2+", "html", "usr/share/developers-reference/*.html"),
    Source("debian-faq", "GPL-2+", "html", "usr/share/doc/debian/FAQ/*.en.html"),
    Source("maint-guide", "GPL-2+", "html", "usr/share/doc/maint-guide/html/*.en.html"),
)


class Paragraphs(HTMLParser):
    """Text of paragraphs and headings; code blocks, tables and navigation are dropped."""

    KEEP = frozenset({"p", "dd", "h1", "h2", "h3"})
    DROP = frozenset({"pre", "script", "style", "table", "nav", "head"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._text: list[str] = []
        self._keep = self._drop = 0
        self._divs: list[bool] = []  # the open ones: is it a paragraph?

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open a paragraph, or something to skip."""
        if tag in self.DROP:
            self._drop += 1
        elif tag in self.KEEP:
            self._end()
            self._keep += 1
        elif tag == "div":
            self._divs.append(("class", "para") in attrs)
            if self._divs[-1]:
                self._end()
                self._keep += 1

    def handle_endtag(self, tag: str) -> None:
        """Close it."""
        if tag in self.DROP:
            self._drop = max(self._drop - 1, 0)
        elif tag in self.KEEP or (tag == "div" and self._divs and self._divs.pop()):
            self._end()
            self._keep = max(self._keep - 1, 0)

    def handle_data(self, data: str) -> None:
        """Collect text inside a paragraph."""
        if self._keep and not self._drop:
            self._text.append(data)

    def _end(self) -> None:
        text = " ".join("".join(self._text).replace("¶", "").split())
        if text:
            self.found.append(text)
        self._text = []


def read_html(path: Path) -> Iterator[str]:
    """One document a file."""
    parser = Paragraphs()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    parser.close()
    yield "\n".join(p for p in parser.found if is_prose(p))


def read_plain(path: Path) -> Iterator[str]:
    """Indented paragraphs of a text file, unwrapped; about forty to a document."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
    kept = [p for p in paragraphs if is_prose(p)]
    for i in range(0, len(kept), 40):
        yield "\n".join(kept[i : i + 40])


def read_bible(path: Path) -> Iterator[str]:
    """A chapter a document. The data file is packed; the small program of the package bible-kjv reads it."""
    program, _ = unpack("bible-kjv", path.parents[3])
    command = [str(program / "usr/bin/bible"), "-p", str(path.parent), "-l100000", "Gen1:1-Rev22:21"]
    text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    for chapter in re.split(r"\n(?=\S[^\n]* \d+\n\n)", text):
        title, _, body = chapter.strip().partition("\n\n")
        verses = re.findall(r"^\s*\d+\s+(.*)$", body, flags=re.M)
        if verses:
            yield title.strip() + "\n" + " ".join(" ".join(verses).split())


READERS = {"html": read_html, "plain": read_plain, "bible": read_bible}


def is_prose(paragraph: str) -> bool:
    """Mostly letters, and long enough to say something."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return len(paragraph) >= 3 and letters >= 0.85 * len(paragraph) and clean(paragraph).isascii()


def clean(text: str) -> str:
    """Plain punctuation, so that it does not cost tokens of a small vocabulary."""
    for old, new in PLAIN.items():
        text = text.replace(old, new)
    return text


def unpack(package: str, folder: Path) -> tuple[Path, str]:
    """Download a package by name and unpack it; its folder and version."""
    # apt drops its rights to the user _apt, who must be able to write here
    os.chmod(folder, 0o777)
    subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    deb = next(folder.glob(f"{package}_*.deb"))
    root = folder / package
    subprocess.run(["dpkg-deb", "-x", str(deb), str(root)], check=True)
    return root, deb.name.split("_")[1]


def main() -> None:
    """Download, clean, split and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"train": [], "valid": []}
    seen: set[str] = set()
    manifest = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for source in SOURCES:
            root, version = unpack(source.package, folder)
            size = documents = 0
            digest = hashlib.sha256()
            for path in sorted(root.glob(source.pattern)):
                for document in READERS[source.reader](path):
                    kept = []
                    for paragraph in clean(document).split("\n"):
                        key = paragraph if len(paragraph) > 60 else f"{path}{paragraph}"
                        if paragraph and key not in seen:
                            seen.add(key)
                            kept.append(paragraph)
                    text = "\n".join(kept)
                    if len(text) < 200:
                        continue
                    mark = hashlib.sha256(text.encode()).digest()
                    digest.update(mark)
                    held_out = int.from_bytes(mark[:4], "big") % 100 < HELD_OUT_PERCENT
                    parts["valid" if held_out else "train"].append(text)
                    size += len(text.encode())
                    documents += 1
            manifest.append(
                {
                    "package": source.package,
                    "version": version,
                    "licence": source.licence,
                    "documents": documents,
                    "bytes": size,
                    "sha256": digest.hexdigest(),
                }
            )
            print(f"{source.package:28s} {version:24s} {documents:6d} documents {size / 1e6:7.2f} MB")
    for name, texts in parts.items():
        (out / f"{name}.txt").write_text(SEPARATOR.join(texts), encoding="utf-8")
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
