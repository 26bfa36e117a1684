"""Totals and costs against the published figures and the specification's own calculator."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from abyssal.arch.presets import PRESETS, preset
from abyssal.arch.tensors import Totals, active_parameters, inventory, is_draft_copy, parameters, totals
from abyssal.base.errors import ConfigError, SaveError
from abyssal.base.machine import this_machine
from abyssal.efficiency.baselines import gqa8_kv_per_token, v32_flops, v32_kv_per_token
from abyssal.efficiency.flops import PRICE_LISTS, decode_flops, used_parameters
from abyssal.efficiency.kv import entry_bytes, index_key_bytes, kv_cost
from abyssal.efficiency.plot import plot
from abyssal.efficiency.report import inspect
from tests.oracle import efficiency_check as oracle

MODELS = {"flash": oracle.FLASH, "pro": oracle.PRO}


@pytest.mark.parametrize(
    ("name", "prefix", "tensors", "nbytes", "elements"),
    [
        ("flash", "", 69187, 159609485896, 158069433298),
        ("flash", "mtp.", 1575, 3593787756, None),
        ("pro", "", 145116, 864704792696, 861608274846),
        ("flash-base", "", 69189, 294673469000, None),
        ("flash-0731", "", 72317, 166878536440, None),
        ("flash-0731", "mtp.", 4705, 10862838300, None),
        ("pro-0813", "", 149782, 892727580904, None),
    ],
)
def test_published_totals(name: str, prefix: str, tensors: int, nbytes: int, elements: int | None) -> None:
    got = totals(spec for spec in inventory(preset(name)) if spec.name.startswith(prefix))
    assert got == Totals(tensors, nbytes, elements if elements is not None else got.elements)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flash", {}),
        ("pro", {}),
        ("flash-base", {"base": True}),
        ("flash-0731", {"tail": "dspark"}),
        ("pro-0813", {"tail": "dspark", "markov": 512}),
    ],
)
def test_every_tensor(name: str, options: dict[str, object]) -> None:
    ours = {(s.name, s.dtype, s.shape) for s in inventory(preset(name))}
    theirs = set(oracle.inventory(MODELS[name.split("-")[0]], **options))
    assert {s for s in ours - theirs if not is_draft_copy(s[0])} == set()
    assert {s for s in theirs - ours if "copy" not in s[0]} == set()


def test_scales_and_formats_belong_together() -> None:
    for name in PRESETS:
        specs = {s.name: s for s in inventory(preset(name))}
        for spec in specs.values():
            assert (spec.format == "plain") == (spec.scale is None)
            assert spec.scale is None or spec.scale in specs


def test_parameters() -> None:
    assert parameters(inventory(preset("flash"))) == 290_942_289_362
    assert parameters(inventory(preset("pro"))) == 1_598_837_347_742
    assert active_parameters(preset("flash"), inventory(preset("flash"))) == pytest.approx(13.27e9, rel=1e-3)
    assert active_parameters(preset("pro"), inventory(preset("pro"))) == pytest.approx(48.85e9, rel=1e-3)


@pytest.mark.parametrize("context", [1, 127, 128, 4096, 65_536, 1_000_000, 1_048_576])
@pytest.mark.parametrize("name", MODELS)
def test_costs_equal_the_calculator(name: str, context: int) -> None:
    config, theirs = preset(name), MODELS[name]
    grow, window, tails = oracle.v4_kv(theirs)
    kv = kv_cost(config)
    assert (kv.per_token, kv.window, kv.tails) == (grow, window, tails)
    assert kv_cost(config, "bf16").per_token == oracle.v4_kv(theirs, "v4_bf16", "idx_bf16")[0]
    assert kv_cost(config, "fp8-keys").per_token == oracle.v4_kv(theirs, "v4_mixed", "idx_fp8")[0]
    assert v32_kv_per_token() == oracle.v32_kv() and gqa8_kv_per_token(43) == oracle.gqa8_kv(43)
    assert used_parameters(config).total == sum(oracle.v4_params(theirs).values())
    for label, prices in PRICE_LISTS.items():
        want = oracle.v4_flops(theirs, context, oracle.WEIGHTINGS[label])
        got = decode_flops(config, context, prices)
        assert (got.gemm, got.core, got.index) == (want["gemm"], want["core"], want["index"])
        want = oracle.v32_flops(context, oracle.WEIGHTINGS[label])
        got = v32_flops(context, prices)
        assert (got.gemm, got.core, got.index) == (want["gemm"], want["core"], want["index"])


def test_ratios_of_the_report() -> None:
    """Section 4.3, n = 1,000,000: within 1% of the labels in the report's figure."""
    for name, kv, flops in (("pro", 9.5, 3.7), ("flash", 13.7, 9.8)):
        report = inspect(preset(name), 1_000_000, this_machine())
        assert 1 / report.kv_vs_v32 == pytest.approx(kv, rel=0.01)
        assert 1 / report.flops_vs_v32 == pytest.approx(flops, rel=0.01)
        assert report.kv_vs_gqa8 == pytest.approx(0.02, abs=2e-4)


def test_entry_sizes() -> None:
    assert entry_bytes(preset("flash")) == 584 and index_key_bytes(preset("flash")) == 68
    assert entry_bytes(preset("flash"), "bf16") == 1024 and index_key_bytes(preset("pro"), "fp8-keys") == 132


@pytest.mark.parametrize("options", [["--check", "--n", "1000000"], ["--ckpt"]])
def test_the_calculator_agrees_with_the_report(options: list[str]) -> None:
    subprocess.run([sys.executable, oracle.__file__, *options], check=True, capture_output=True)


def test_what_fits_says_why() -> None:
    machine = this_machine()
    fits = {f.what: f for f in inspect(preset("nano"), 1000, machine).fits}
    assert fits["files on disk"].fits and fits["in memory at 1,000 tokens"].fits
    fits = {f.what: f for f in inspect(preset("pro"), 1_000_000, machine).fits}
    assert not fits["in memory at 1,000,000 tokens"].fits
    assert "811.03 GiB" in fits["in memory at 1,000,000 tokens"].why


def test_plot_is_a_picture(tmp_path: Path) -> None:
    plot({"flash": preset("flash"), "pro": preset("pro")}, tmp_path / "p.png")
    data = (tmp_path / "p.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:4] == b"\x89PNG" and width > 1000 and height > 400
    with pytest.raises(SaveError):
        plot({"flash": preset("flash")}, tmp_path / "no" / "p.png")


def test_layouts_that_need_more_numbers() -> None:
    with pytest.raises(ConfigError, match="dspark"):
        inventory(preset("flash"), "0731")
