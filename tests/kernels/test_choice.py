"""What runs, and why: the environment, the processor, a package without its extension."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abyssal.base.errors import InputError
from abyssal.kernels import choice
from abyssal.kernels.choice import NAMES, Choice, forced, native

ABYSSAL = str(Path(sys.executable).with_name("abyssal"))
SHOW = "import json, abyssal.kernels.choice as c; print(json.dumps(vars(c.choice())))"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_the_extension_is_there_where_a_compiler_is() -> None:
    """A kernel that fails to compile must not look like a machine without a compiler."""
    if shutil.which("c++") or shutil.which("g++"):
        assert choice.choice().built


def test_the_best_one_is_chosen() -> None:
    found = json.loads(python(SHOW, ABYSSAL_KERNELS="").stdout)
    assert found["name"] == next((name for name in found["supported"] if name != "scalar"), "reference")


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_forces_one(name: str) -> None:
    done = python(SHOW, ABYSSAL_KERNELS=name)
    if name in ("reference", *choice.choice().supported):
        assert json.loads(done.stdout)["name"] == name
    else:
        assert "cannot run here" in done.stderr


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match="choose from reference, scalar"), forced("sse"):
        pass
    done = subprocess.run(
        [ABYSSAL, "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "ABYSSAL_KERNELS": "sse"},
    )
    assert done.returncode == 2
    assert "ABYSSAL_KERNELS is 'sse'" in done.stderr


def test_a_forced_choice_ends() -> None:
    before = choice.choice()
    with forced("reference"):
        assert native() is None
        assert choice.choice().name == "reference"
    assert choice.choice() == before


def test_a_missing_extension_is_said_once_and_the_reference_runs() -> None:
    code = (
        "import sys, logging; sys.modules['abyssal.kernels.fast._cpu'] = None; logging.basicConfig();"
        "import abyssal.kernels.choice as c; c.choice(); c.choice(); print(c.native(), c.choice().name)"
    )
    done = python(code, ABYSSAL_KERNELS="")
    assert done.stdout.split() == ["None", "reference"]
    assert done.stderr.count("were not built") == 1


def test_doctor_says_what_runs() -> None:
    done = subprocess.run([ABYSSAL, "doctor", "--json", "--no-bandwidth"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["kernels"]["name"] in NAMES
    assert report["kernels"]["why"]
    assert report["read_bytes_per_s"] is None


@pytest.mark.parametrize("isa", choice.choice().supported)
def test_reading_sums_every_byte(isa: str) -> None:
    data = torch.arange(5_000_000, dtype=torch.int32).view(torch.uint8)
    with forced(isa):
        module = native()
        assert module is not None
        assert module.isa() == isa
        assert module.read(data[: 1 << 20]) == int(data[: 1 << 20].view(torch.int64).sum()) % (1 << 64)


def test_a_wrong_array_is_named() -> None:
    module = native()
    if module is None:
        pytest.skip("no extension")
    for bad in (torch.zeros(8), torch.zeros(8, 8, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)[::2]):
        with pytest.raises(ValueError, match="data is"):
            module.read(bad)


def test_choices_are_plain_data() -> None:
    assert Choice("scalar", "", (), ()).name == "scalar"


def test_kernel_sources_share_no_templates() -> None:
    """The linker keeps one copy of a template: the plain variant might get the one compiled for AVX-512."""
    cpu = Path(choice.__file__).parent / "fast" / "cpu"
    allowed = {"cstddef", "cstdint", "cstring", "immintrin.h", "arm_neon.h"}
    sources = [*cpu.glob("ops/*"), *cpu.glob("vec/*"), cpu / "parallel.hpp", cpu / "table.cpp", cpu / "kernels.hpp"]
    assert len(sources) > 5
    for source in sources:
        found = set(re.findall(r"#include <(.*?)>", source.read_text()))
        assert found <= allowed, source
