"""Documents out of the files that packages ship: prose as paragraphs, one a line, and code as it is."""

from __future__ import annotations

import ast
import gzip
import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PLAIN = {"“": '"', "”": '"', "’": "'", "‘": "'", "—": " - ", "–": "-", "…": "...", "\xa0": " ", "\f": "\n"}
PARAGRAPHS = 40  # of a file without chapters, to a document


def clean(text: str) -> str:
    """Plain punctuation, so that it does not cost tokens of a small vocabulary."""
    for old, new in PLAIN.items():
        text = text.replace(old, new)
    return text


def is_prose(paragraph: str) -> bool:
    """Mostly letters, and long enough to say something."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return len(paragraph) >= 3 and letters >= 0.85 * len(paragraph) and clean(paragraph).isascii()


def unwrapped(text: str) -> list[str]:
    """The paragraphs of prose in a text with blank lines between paragraphs."""
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
    return [p for p in paragraphs if is_prose(p)]


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
    """Paragraphs of a text file, packed or not; forty to a document."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    kept = unwrapped(data.decode("utf-8", errors="replace"))
    for i in range(0, len(kept), PARAGRAPHS):
        yield "\n".join(kept[i : i + PARAGRAPHS])


def read_bible(path: Path) -> Iterator[str]:
    """A chapter a document, through the small program of the package bible-kjv, unpacked beside."""
    program = path.parents[3] / "bible-kjv/usr/bin/bible"
    command = [str(program), "-p", str(path.parent), "-l100000", "Gen1:1-Rev22:21"]
    text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    for chapter in re.split(r"\n(?=\S[^\n]* \d+\n\n)", text):
        title, _, body = chapter.strip().partition("\n\n")
        verses = re.findall(r"^\s*\d+\s+(.*)$", body, flags=re.M)
        if verses:
            yield title.strip() + "\n" + " ".join(" ".join(verses).split())


def read_code(path: Path) -> Iterator[str]:
    """A Python file that parses, as it is."""
    text = _python(path)
    if text is not None:
        yield text


def read_docstrings(path: Path) -> Iterator[str]:
    """The prose in a Python file's docstrings."""
    text = _python(path)
    if text is None:
        return
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docs = [ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    yield "\n".join(p for doc in docs if doc for p in unwrapped(doc))


def read_topics(path: Path) -> Iterator[str]:
    """The chapters of Python's language reference: the values of the one dictionary in pydoc_data/topics.py."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield "\n".join(unwrapped(value.value))


def _python(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
        ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError):  # files for other versions of Python, and broken ones
        return None
    return text if text.isascii() else None


READERS = {
    "html": read_html,
    "plain": read_plain,
    "bible": read_bible,
    "code": read_code,
    "docstrings": read_docstrings,
    "topics": read_topics,
}
