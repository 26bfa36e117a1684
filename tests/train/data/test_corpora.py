"""Corpora: split by file, no paragraph on both sides, contaminated documents dropped."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from abyssal.base.errors import DataError
from abyssal.train.data.corpora import (
    DEBIAN,
    DEFAULT,
    Document,
    Source,
    build,
    documents_of,
    read_corpus,
    unpack,
)

PROSE = Source("tales", "MIT", "debian", "prose", "docstrings", "lib/*.py")
CODE = Source("tales", "MIT", "debian", "code", "code", "lib/*.py")
SHARED = "This long paragraph stands in every file of the package, and it must be kept only once in the whole corpus."


def letters(number: int) -> str:
    return "".join(chr(ord("a") + int(digit)) for digit in f"{number:03d}")


def package(folder: Path, files: int = 150) -> Path:
    lib = folder / "tales/lib"
    lib.mkdir(parents=True)
    for i in range(files):
        own = " ".join(f"word{letters(i)}{letters(j)}" for j in range(20))
        (lib / f"m{i}.py").write_text(f'"""{own}.\n\n{SHARED}\n"""\n\nNUMBER = {i}\n')
    (folder / "tales/VERSION").write_text("1.2-3")
    return folder


def test_split_dedup_and_manifest(tmp_path: Path) -> None:
    packages = package(tmp_path / "packages")
    manifest = build(tmp_path / "out", [PROSE, CODE], packages=packages)
    prose, code = (list(read_corpus(tmp_path / "out", kind)) for kind in ("prose", "code"))
    held_prose, held_code = (list(read_corpus(tmp_path / "out", kind, held_out=True)) for kind in ("prose", "code"))
    assert len(prose) + len(held_prose) == len(code) + len(held_code) == 150
    assert 0 < len(held_prose) < 12
    # the prose and the code of a file are on the same side
    assert {text.split(".")[0] for text in held_prose} == {text[3:].split(".")[0] for text in held_code}
    assert sum(SHARED in text for text in prose + held_prose) == 1
    assert any(SHARED in text for text in held_prose), "held-out documents come first"
    rows = {(row["source"], row["part"]): row for row in manifest["sources"]}
    assert rows["tales:code", "train"]["documents"] == len(code)
    assert rows["tales:code", "train"]["bytes"] == sum(len(text) for text in code)
    assert all(row["version"] == "1.2-3" and row["licence"] == "MIT" for row in rows.values())
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == manifest
    assert build(tmp_path / "again", [PROSE, CODE], packages=packages) == manifest


def test_contaminated_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    packages = package(tmp_path / "packages")
    build(tmp_path / "clean", [PROSE], packages=packages)
    victim = list(read_corpus(tmp_path / "clean", "prose"))[3]
    sets = {"needle-gen": [victim], "tools-gen": ["nothing of the kind " * 5]}
    manifest = build(tmp_path / "out", [PROSE], packages=packages, evaluation=sets)
    assert victim not in list(read_corpus(tmp_path / "out", "prose"))
    assert sum(row["dropped_as_contaminated"] for row in manifest["sources"]) == 1
    assert manifest["contamination"]["needle-gen"]["items_hit"] == 1
    assert manifest["contamination"]["tools-gen"]["items_hit"] == 0


def test_long_prose_is_kept_and_long_code_is_not(tmp_path: Path) -> None:
    lib = tmp_path / "packages/tales/lib"
    lib.mkdir(parents=True)
    book = "\n\n".join(f"The paragraph {letters(i)} tells of {letters(999 - i)}." for i in range(999))
    for i in range(20):
        (lib / f"m{i}.py").write_text(f'"""{book * 5} {letters(i)}\n\nNumber {letters(i)} {SHARED} {SHARED}"""\n')
    manifest = build(tmp_path / "out", [PROSE, CODE], packages=tmp_path / "packages")
    assert max(len(text) for text in read_corpus(tmp_path / "out", "prose")) > 30_000
    assert sum(row["documents"] for row in manifest["sources"] if row["kind"] == "code") == 0


def test_held_out_follows_from_the_name() -> None:
    same = [Document(source, "p/a.py", 0, text).held_out for source, text in (("p:code", "x"), ("p:docstrings", "y"))]
    assert same[0] == same[1]
    share = sum(Document("p", f"p/{i}.py", 0, "").held_out for i in range(5000)) / 5000
    assert 0.012 < share < 0.028  # four standard deviations about two percent


def test_a_package_that_is_not_here_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tales"):
        list(documents_of(PROSE, tmp_path))
    with pytest.raises(DataError, match="Debian package"):
        list(documents_of(PROSE))
    with pytest.raises(DataError, match="no-such-package"):
        list(documents_of(Source("no-such-package", "MIT", "pip", "code", "code", "no-such-package/*.py")))


def test_a_damaged_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prose\.jsonl"):
        list(read_corpus(tmp_path, "prose"))
    (tmp_path / "prose.jsonl").write_text('{"text": "a"}\n{')
    with pytest.raises(DataError, match="build it again"):
        list(read_corpus(tmp_path, "prose"))


def test_what_comes_with_python() -> None:
    topics = list(documents_of(DEFAULT[0]))
    assert len(topics) > 40
    assert any("assert" in document.text for document in topics)
    assert all(document.text.isascii() for document in topics)


def test_sources_have_names_and_licences() -> None:
    names = [source.name for source in (*DEFAULT, *DEBIAN)]
    assert len(set(names)) == len(names)
    assert all(source.licence for source in (*DEFAULT, *DEBIAN))


def test_unpacking_a_debian_package(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True, mode=0o755)
    root.chmod(0o755)
    (root / "DEBIAN").chmod(0o755)
    (root / "DEBIAN/control").write_text(
        "Package: tales\nVersion: 1.2-3\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: none\n"
    )
    (root / "lib").mkdir()
    (root / "lib/a.py").write_text(f'"""{SHARED} {SHARED}"""\n')
    deb = tmp_path / "tales_1.2-3_all.deb"
    try:
        subprocess.run(["dpkg-deb", "-b", str(root), str(deb)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("not a Debian machine")
    unpack(deb, tmp_path / "packages/tales")
    manifest = build(tmp_path / "out", [PROSE], packages=tmp_path / "packages")
    assert {row["version"] for row in manifest["sources"]} == {"1.2-3"}
    assert sum(row["documents"] for row in manifest["sources"]) == 1
