"""What hostile output becomes on a terminal and on a page, in a real browser too."""

from __future__ import annotations

import asyncio
import html
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.sandbox.log.display import harmless, harmless_html
from abyssal.sandbox.log.reader import FILE, read_log
from abyssal.sandbox.log.writer import Log
from abyssal.sandbox.operation import Asked
from tests.sandbox.test_recorded import done, opened, sh

ATTACKS = [
    b"\x1b]8;;http://evil.example/\x07click\x1b]8;;\x07", b"\x1b[2J\x1b[31mred", b"\x9b31m", b"\x1bP1$q\x1b\\",
    "admin\u202egnp.exe\u2066x\u2069".encode(), b"<script>alert(1)</script>", b"'\"><img src=x onerror=alert(1)>",
    b"\xff\xfe\x00bad", b"\x08\x08\x08hidden\r", "\u200b\u2028\U000e0041".encode(), b"</pre></details><h1>own</h1>",
]  # fmt: skip


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode(errors="replace"))))
def test_no_control_survives(data: bytes) -> None:
    for letter in harmless(data):
        assert letter in "\n\t" or unicodedata.category(letter) not in {"Cc", "Cf", "Cs", "Zl", "Zp", "Cn", "Co"}
    page = harmless_html(data)
    assert not set("<>\"'") & set(page)
    assert html.unescape(page) == harmless(data)


def record(folder: Path) -> Path:
    async def work() -> None:
        async with opened(folder) as recorded:
            for number, attack in enumerate(ATTACKS):
                await done(recorded, sh("cat; cat >&2 < /dev/null"), Asked(op_id=f"op{number}"), attack)
                await done(recorded, sh("true # " + attack.replace(b"\0", b"").decode(errors="replace")), Asked())

    asyncio.run(work())
    return folder / "log"


def cli(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    program = [sys.executable, "-c", "from abyssal.cli.main import main; main()", "sandbox", *arguments]
    return subprocess.run(program, capture_output=True, check=False)


def test_the_command_and_the_page_obey_nothing(tmp_path: Path) -> None:
    log = record(tmp_path)
    shown = cli("log", str(log))
    assert shown.returncode == 0
    text = shown.stdout.decode()
    assert not [letter for letter in text if letter != "\n" and unicodedata.category(letter) in {"Cc", "Cf"}]
    assert "<U+202E>" in text
    page = tmp_path / "page.html"
    assert cli("log", str(log / FILE), "--html", str(page)).returncode == 0
    written = page.read_text()
    for mark in ("<script", "<img", "http://evil.example/\x07", "\u202e", "\x1b", "</details><h1>"):
        assert mark not in written
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        path = "/usr/bin/chromium"
        if not Path(path).exists():
            pytest.skip("no chromium on this machine")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        view = browser.new_page()
        alarms: list[object] = []
        view.on("dialog", lambda dialog: (alarms.append(dialog), dialog.dismiss()))
        view.goto(f"file://{page}")
        assert view.locator("details").count() == 1 + 2 * len(ATTACKS)
        assert view.locator("script, img, a, iframe, link").count() == 0
        assert view.locator("h1").count() == 1
        assert not alarms
        browser.close()


def test_damage_and_edits_are_told_with_exit_1(tmp_path: Path) -> None:
    log = record(tmp_path)
    whole = (log / FILE).read_bytes()
    (log / FILE).write_bytes(whole[:-5])
    torn = cli("log", str(log), "--json")
    assert torn.returncode == 0
    assert b"never acknowledged" in torn.stderr
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    (log / FILE).write_bytes(changed)
    damaged = cli("log", str(log), "--html", str(tmp_path / "p.html"))
    assert damaged.returncode == 1
    assert b"damaged at byte" in damaged.stderr
    assert "damaged at byte" in (tmp_path / "p.html").read_text()
    (log / FILE).write_bytes(whole)
    assert cli("log", str(log), "--head", read_log(log).head).returncode == 0
    assert cli("log", str(log), "--head", "0" * 64).returncode == 1
    assert cli("log", str(tmp_path / "none")).returncode == 1


def test_a_log_of_another_version_is_refused(tmp_path: Path) -> None:
    async def work() -> None:
        log = Log(tmp_path, "box")
        await log.append("create")
        await log.close()

    asyncio.run(work())
    data = (tmp_path / FILE).read_bytes()
    from abyssal.sandbox.log.frames import HEADER, frame

    (tmp_path / FILE).write_bytes(frame(data[HEADER:].replace(b'"v":1', b'"v":9')))
    found = read_log(tmp_path)
    assert found.broken is not None
    assert "version 1" in found.broken.why
