"""Packages that engines need, asked of the real dpkg and apt."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from abyssal.sandbox import packages
from abyssal.sandbox.engines.registry import installed
from abyssal.sandbox.errors import Unsupported

debian = pytest.mark.skipif(shutil.which("apt-get") is None, reason="not Debian")
NONE = "no-such-package-of-abyssal"


def test_every_engine_says_what_it_needs(tmp_path: Path) -> None:
    names = {engine.name for engine in installed(tmp_path)}
    assert names - {"wasm"} == set(packages.NEEDS)  # wasm is an extra of ours


@debian
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "NEEDS", {"one": ("libc6", NONE), "two": ("libc6",)})
    assert packages.missing("one") == [NONE]
    assert packages.remedy("one") == f"apt-get install {NONE}"
    assert packages.missing("two") == [] and packages.remedy("two") == "" and packages.install("two") == []


@debian
def test_what_cannot_be_installed_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "NEEDS", {"one": (NONE,)})
    reason = "could not be installed" if os.geteuid() == 0 else "are installed by root"
    with pytest.raises(Unsupported, match=f"{reason}.*apt-get install {NONE}"):
        packages.install("one")


def test_elsewhere_all_of_them_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert packages.missing("runc") == list(packages.NEEDS["runc"])
    with pytest.raises(Unsupported, match="Debian alone"):
        packages.install("runc")
