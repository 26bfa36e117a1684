"""The two oracles against one another, before either judges the package. Nothing here imports the package.

transformers decides the equations; the plain forward adds MTP, Hadamard and simulated quantisation, which are
checked here by transformers' own layers put together by hand. Each broken variant must be told apart.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracle import hf, plain

Case = tuple[dict[str, Any], dict[str, plain.Array], list[int]]
EDGES = (1, 3, 4, 5, 127, 128, 129, 255, 256)
SEEDS = range(8)


def frequencies(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Exact tables of window-only and of compressed layers."""
    rope = config["qk_rope_head_dim"]
    main = config["rope_theta"] ** (-2 * np.arange(rope // 2) / rope)
    compress = plain.yarn_frequencies(config["compress_rope_theta"], rope, config["rope_scaling"])
    return torch.from_numpy(main), torch.from_numpy(compress)


@functools.cache
def case(seed: int) -> Case:
    return hf.random_case(seed)


@functools.cache
def widened(seed: int) -> Any:
    """transformers in float64 with the exact rotary tables."""
    config, weights, _ = case(seed)
    model = hf.hf_model(config, weights, torch.float64)
    hf.set_rotary(model, *frequencies(config))
    return model


@functools.cache
def right(seed: int) -> plain.Array:
    return plain.forward(*case(seed))


def gap(a: plain.Array | Tensor, b: plain.Array | Tensor) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


# transformers itself


def test_version() -> None:
    assert Version(transformers.__version__) >= Version("5.10.1")


@pytest.mark.parametrize("at", EDGES)
def test_nothing_sees_the_future(at: int) -> None:
    """Older releases let queries read compressed entries of their future."""
    config, _, ids = case(0)
    changed = [*ids]
    changed[at] = (ids[at] + 1) % config["vocab_size"]
    before, after = hf.logits(widened(0), ids), hf.logits(widened(0), changed)
    assert gap(before[:at], after[:at]) < 1e-11  # batches of experts change size, so not bit for bit
    assert gap(before[at], after[at]) > 1e-3


def test_the_widened_model_computes_nothing_in_float32() -> None:
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
                    seen.add((str(func), tensor.dtype))
            return out

    with Watch():  # type: ignore[no-untyped-call]
        hf.hf_logits_chunked(widened(0), case(0)[2], [200, 99, 1])
    assert not seen


@pytest.mark.parametrize("seed", [0, 4, 6])
def test_chunks_change_nothing(seed: int) -> None:
    ids = case(seed)[2]
    chunks = [1, 2, 5, 1, 1, 30]
    chunks.append(len(ids) - sum(chunks) - 1)
    chunks.append(1)
    assert gap(hf.hf_logits_chunked(widened(seed), ids, chunks), hf.logits(widened(seed), ids)) < 1e-10


# plain against transformers


@pytest.mark.parametrize("seed", SEEDS)
def test_plain_equals_transformers_in_float64(seed: int) -> None:
    config, _, ids = case(seed)
    assert len(ids) // 4 > 2 * config["index_topk"], "the indexer must have to choose"
    assert 0.5 < right(seed).std() < 3
    assert gap(right(seed), hf.logits(widened(seed), ids)) < 1e-10


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 127, 128, 129])
def test_plain_equals_transformers_at_the_edges(length: int) -> None:
    config, weights, ids = case(0)
    assert gap(plain.forward(config, weights, ids[:length]), hf.logits(widened(0), ids[:length])) < 1e-10


@pytest.mark.parametrize("seed", SEEDS)
def test_plain_equals_ordinary_transformers_in_float32(seed: int) -> None:
    """With its own rotary tables, too."""
    config, weights, ids = case(seed)
    model = hf.hf_model(config, weights, torch.float32)
    main, compress = frequencies(config)
    np.testing.assert_allclose(model.model.rotary_emb.main_inv_freq, main, rtol=1e-6)
    np.testing.assert_allclose(model.model.rotary_emb.compress_inv_freq, compress, rtol=1e-6)
    assert gap(right(seed), hf.logits(model, ids).double()) < 1e-4


def mtp_from_transformers(seed: int, quantised: bool) -> Tensor:
    """2.11 with transformers' block, collapse, norm and head; only the projections at its entrance are ours."""
    config, weights, ids = case(seed)
    backbone = hf.hf_model(config, weights, torch.float64)
    hf.set_rotary(backbone, *frequencies(config))
    # a model of one window-only, score-routed layer: the MTP block
    alone = {**config, "num_hidden_layers": 1, "num_hash_layers": 0, "compress_ratios": [0, 0]}
    own = {name: weights[name] for name in ("embed.weight", "head.weight")}
    for name, weight in weights.items():
        if re.match(r"mtp\.0\.(norm|hc_head)", name):
            own[name.replace("mtp.0.", "")] = weight
        elif re.match(r"mtp\.0\.(attn|ffn|hc_)", name):
            own[name.replace("mtp.0.", "layers.0.")] = weight
    block = hf.hf_model(alone, own, torch.float64)
    hf.set_rotary(block, *frequencies(config))
    if quantised:
        hf.quantise_as_served(backbone)
        hf.quantise_as_served(block)

    streams: list[Tensor] = []
    backbone.model.layers[-1].register_forward_hook(lambda module, args, out: streams.append(out[0]))
    hf.logits(backbone, ids)

    def entrance(x: Tensor, side: str) -> Tensor:
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        normed = normed * torch.from_numpy(weights[f"mtp.0.{side}norm.weight"])
        if quantised:
            normed = torch.from_numpy(plain.fake_fp8(normed.numpy(), 128))
        return normed @ torch.from_numpy(weights[f"mtp.0.{side}_proj.weight"]).T

    embedded = torch.from_numpy(weights["embed.weight"])[ids[1:]]
    x = entrance(embedded, "e")[:, None] + entrance(streams[0][:-1], "h")
    block.model.layers[0].register_forward_pre_hook(lambda module, args: (x[None], *args[1:]))
    return hf.logits(block, ids[1:])


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 4])
def test_mtp_equals_transformers_put_together_by_hand(seed: int, quantised: bool) -> None:
    config, weights, ids = case(seed)
    got = plain.forward(config, weights, ids, "fake" if quantised else "exact", mtp=True)
    assert got.shape == (len(ids) - 1, config["vocab_size"])
    assert gap(got, mtp_from_transformers(seed, quantised)) < 1e-10


@pytest.mark.parametrize("seed", [1, 2, 3, 5])
def test_fake_mode_equals_transformers_with_quantisers_hooked_in(seed: int) -> None:
    config, weights, ids = case(seed)
    model = hf.hf_model(config, weights, torch.float64)
    hf.set_rotary(model, *frequencies(config))
    hf.quantise_as_served(model)
    fake = plain.forward(config, weights, ids, mode="fake")
    assert gap(fake, right(seed)) > 1e-2
    assert gap(fake, hf.logits(model, ids)) < 1e-10


@pytest.mark.parametrize("length", [1, 3, 4, 127, 128])
def test_fake_mode_at_the_edges(length: int) -> None:
    """Also before the first block of a compressed layer exists."""
    config, weights, ids = case(5)
    model = hf.hf_model(config, weights, torch.float64)
    hf.set_rotary(model, *frequencies(config))
    hf.quantise_as_served(model)
    fake = plain.forward(config, weights, ids[:length], mode="fake")
    assert gap(fake, hf.logits(model, ids[:length])) < 1e-10


def test_hadamard_on_both_sides_cancels() -> None:
    config, weights, ids = case(1)
    both = right(1)
    assert gap(plain.forward(config, weights, ids, broken="hadamard_one_side"), both) > 1e-3
    # transformers has none at all and agrees above


# number formats


def test_formats_equal_torch() -> None:
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(plain.e4m3(codes), torch.from_numpy(codes).view(torch.float8_e4m3fn).double())
    np.testing.assert_array_equal(plain.e8m0(codes), torch.from_numpy(codes).view(torch.float8_e8m0fnu).double())
    assert plain.e2m1(np.arange(16, dtype=np.uint8)).tolist() == [
        0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]  # fmt: skip


def test_rounding_equals_torch_and_brute_force() -> None:
    rng = np.random.default_rng(0)
    halfway = (plain.E4M3[1:] + plain.E4M3[:-1]) / 2
    x = np.concatenate([rng.uniform(-448, 448, 2000), rng.normal(0, 0.01, 2000), plain.E4M3, halfway, -halfway])
    x = x.astype(np.float32)
    for ours, theirs in ((plain.round_e4m3, torch.float8_e4m3fn), (plain.round_bf16, torch.bfloat16)):
        np.testing.assert_array_equal(ours(x.astype(float)), torch.from_numpy(x).to(theirs).double())
    assert plain.round_e4m3(np.array([449.0, -1e9])).tolist() == [448, -448]

    def nearest(value: float) -> float:
        """Over all codes: the closest, then the even one."""
        best = min(range(8), key=lambda code: (abs(abs(value) - plain.E2M1[code]), code % 2))
        return math.copysign(plain.E2M1[best], value)

    for value in [*rng.uniform(-7, 7, 500), 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -2.5, -5]:
        assert plain.round_e2m1(np.array([value]))[0] == nearest(value)


def test_fake_quantisation_of_known_numbers() -> None:
    x = np.zeros((1, 70))
    x[0, :3], x[0, 64] = (450, 17, 0.3), 3.0
    got = plain.fake_fp8(x, 64)[0]  # scale 2 in the first block, 2^-7 in the second
    assert got[[0, 1, 2, 64]].tolist() == [448, 17 - 1, 0.3125, 3.0]
    y = np.array([[13.0, 5.0, 1.0, 0.9, *[0.0] * 28, 0.5]])  # scale 4, then 2^-3
    assert plain.fake_fp4(y)[0, [0, 1, 2, 3, 32]].tolist() == [12, 4, 0, 0, 0.5]
    assert not plain.fake_fp8(np.zeros((2, 64)), 64).any()
    assert not plain.fake_fp4(np.zeros((2, 32))).any()


def test_unpacking() -> None:
    packed = np.zeros((1, 32), np.int8)
    packed[0, :2] = [0x21, -0x80 + 0x07]  # codes 1, 2 and 7, 8: the low nibble comes first
    packed[0, 16] = 0x0F
    got = plain.unpack_fp4(packed, np.array([[128, 126]], np.uint8))[0]
    assert got[:4].tolist() == [1, 2, 12, 0]
    assert got[32] == -3
    codes = torch.arange(130 * 3, dtype=torch.int32).remainder(120).to(torch.uint8).reshape(130, 3)
    want = codes.view(torch.float8_e4m3fn).double()
    want[:128] *= 0.5
    want[128:] *= 8
    for scales in (np.array([[126], [130]], np.uint8), np.array([[0.5], [8.0]], np.float32)):
        np.testing.assert_array_equal(plain.unpack_fp8(codes.numpy(), scales), want)


def test_hadamard_is_sylvesters() -> None:
    want = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    np.testing.assert_array_equal(plain.hadamard_matrix(4) * 2, want)
    h = plain.hadamard_matrix(128)
    np.testing.assert_allclose(h @ h.T, np.eye(128), atol=1e-13)


def test_yarn_vectors() -> None:
    """2.5, as released."""
    scaling = {"factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
    f = plain.yarn_frequencies(160000, 64, scaling)
    for pair, want in {16: 2.265625e-3, 20: 2.96978e-4, 24: 1.953125e-5, 31: 5.68053e-7}.items():
        assert f[pair] == pytest.approx(want, rel=1e-6)
    unscaled = 160000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(f[:16], unscaled[:16], rtol=1e-12)
    np.testing.assert_allclose(f[25:], unscaled[25:] / 16, rtol=1e-12)


# traps


@functools.cache
def trap_case() -> Case:
    """Small, all layer kinds, clamps reached, routing logits below -16.6, and a last layer with an indexer."""
    config, _, ids = hf.random_case(5)
    config |= {"num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4, 0], "num_hash_layers": 1, "hc_mult": 4}
    config |= {"hidden_size": 32, "n_routed_experts": 5, "num_experts_per_tok": 2, "swiglu_limit": 0.5}
    config |= {"num_attention_heads": 4, "o_groups": 2, "head_dim": 32, "qk_rope_head_dim": 16}
    config |= {"sliding_window": 8, "index_topk": 3}
    weights = hf.random_weights(config, np.random.default_rng(7))
    for name in weights:
        if name.endswith("ffn.gate.weight"):
            weights[name] = weights[name] * 12
        if re.search(r"hc_(attn|ffn)_scale", name):
            weights[name] = weights[name] + 2
    return config, weights, ids[:136]


@functools.cache
def trap_right(mode: str, mtp: bool) -> plain.Array:
    return plain.forward(*trap_case(), mode=mode, mtp=mtp)


@pytest.mark.parametrize("trap", plain.BROKEN)
def test_trap_is_visible(trap: str) -> None:
    mode, mtp = "fake" if trap in ("fp8_clamps_only", "hadamard_one_side") else "exact", trap == "mtp_collapsed"
    with np.errstate(all="ignore"):  # the naive softplus divides 0 by 0
        wrong = plain.forward(*trap_case(), mode=mode, mtp=mtp, broken=trap)
    assert gap(np.nan_to_num(wrong, nan=1e3), trap_right(mode, mtp)) > 1e-3


def test_the_trap_case_itself_is_right() -> None:
    config, weights, ids = trap_case()
    model = hf.hf_model(config, weights, torch.float64)
    hf.set_rotary(model, *frequencies(config))
    assert gap(hf.logits(model, ids), trap_right("exact", False)) < 1e-9  # torch calls softplus linear from 20 on


def test_the_oracles_do_not_import_the_package() -> None:
    for file in Path(__file__).parent.glob("*.py"):
        assert not re.search(r"^\s*(from|import) abyssal", file.read_text(encoding="utf-8"), re.M), file
