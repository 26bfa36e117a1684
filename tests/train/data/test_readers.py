"""Documents out of files."""

from __future__ import annotations

import gzip
from pathlib import Path

from abyssal.train.data.readers import clean, is_prose, read_code, read_docstrings, read_html, read_plain, read_topics


def test_html_gives_paragraphs_and_headings_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_text(
        "<head><title>No</title></head><nav><p>Not this</p></nav><h1>A heading¶</h1><p>First\n words <b>here</b></p>"
        "<pre>x = 1</pre><div class='para'>Another one</div><div>loose</div><table><p>cell</p></table><p>1 2 3 4</p>"
    )
    assert list(read_html(path)) == ["A heading\nFirst words here\nAnother one"]


def test_plain_text_is_unwrapped_and_cut(tmp_path: Path) -> None:
    text = "\n\n".join(f"  paragraph {'abcdefgh'[i % 8]}\n  goes on" for i in range(41)) + "\n\n12 34 56 78\n"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    first, second = read_plain(tmp_path / "a.txt")
    assert first.split("\n")[0] == "paragraph a goes on" and len(first.split("\n")) == 40
    assert second == "paragraph a goes on"
    assert list(read_plain(tmp_path / "a.txt.gz")) == [first, second]


SOURCE = '''"""What this module is for."""
class C:
    """A class of its own."""
    def f(self):
        """Do it at once.

        >>> f(1) + 2 == [3, 4]

        And then
        say so.
        """
'''


def test_docstrings_and_code(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(SOURCE)
    assert list(read_docstrings(path)) == [
        "What this module is for.\nA class of its own.\nDo it at once.\nAnd then say so."
    ]
    assert list(read_code(path)) == [SOURCE]


def test_what_is_no_python_is_left_out(tmp_path: Path) -> None:
    for number, data in enumerate([b"def f(:", b"x = '\xff'", b"x = '\0'", "x = 'é'".encode()]):
        path = tmp_path / f"{number}.py"
        path.write_bytes(data)
        assert not list(read_code(path)) and not list(read_docstrings(path))


def test_topics(tmp_path: Path) -> None:
    path = tmp_path / "topics.py"
    path.write_text("topics = {'a': 'One paragraph\\nof words.\\n\\n   x ::= y + [z]\\n', 'b': 'Two'}\n")
    assert list(read_topics(path)) == ["One paragraph of words.", "Two"]


def test_cleaning() -> None:
    assert clean("“It’s” — so…\f") == '"It\'s"  -  so...\n'
    assert (
        is_prose("It says so.") and not is_prose("a = b[3] * (4)") and not is_prose("日本語です") and not is_prose("ab")
    )
