"""Each operation against a slow loop or a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.arch.presets import preset
from abyssal.kernels.attention import Attention, attend_reference
from abyssal.kernels.index_topk import TILE, choose, choose_reference, index_scores
from abyssal.kernels.linear import BAND_ELEMENTS, dequantise, linear, linear_reference
from abyssal.kernels.pool import pool
from abyssal.kernels.rms_norm import rms_norm
from abyssal.kernels.rotary import rotate_tail, rotations
from abyssal.kernels.router import router_weights, sqrt_softplus
from abyssal.kernels.sigmoid import sigmoid
from abyssal.kernels.sinkhorn import SMALL, sinkhorn, sinkhorn_reference
from abyssal.kernels.swiglu import swiglu
from abyssal.model.rope import frequencies
from abyssal.quant.fp4 import quantise_fp4
from abyssal.quant.fp8 import quantise_fp8
from tests.oracle import plain

EPS32 = torch.finfo(torch.float32).eps


def test_rope_frequencies_of_the_release() -> None:
    """Section 2.5's test vectors; pairs 0-15 keep their frequency, 25-31 are divided by 16."""
    f = frequencies(preset("flash"), 4)
    for pair, want in ((16, 2.265625e-3), (20, 2.96978e-4), (24, 1.953125e-5), (31, 5.68053e-7)):
        assert f[pair] == pytest.approx(want, rel=2e-6)
    raw = [160000 ** (-2 * i / 64) for i in range(32)]
    assert f[:16] == raw[:16]
    assert f[25:] == [x / 16 for x in raw[25:]]
    assert frequencies(preset("flash"), 0) == [10000 ** (-2 * i / 64) for i in range(32)]
    np.testing.assert_allclose(f, plain.yarn_frequencies(160000, 64, vars(preset("flash").rope_scaling)), rtol=1e-12)


def test_rotations_have_unit_modulus_to_the_last_position() -> None:
    f = torch.tensor(frequencies(preset("pro"), 128))
    turn = rotations(f, torch.tensor([0, 1, 127, 65536, 1048575]))
    assert (turn.abs() - 1).abs().max() < 4 * EPS32
    assert torch.equal(turn[0], torch.ones(32, dtype=turn.dtype))


def test_rotation_turns_interleaved_pairs_and_back() -> None:
    x = torch.randn(3, 5, 20, dtype=torch.float64)
    angle = torch.randn(3, 1, 4, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)
    out = rotate_tail(x, turn)
    assert torch.equal(out[..., :12], x[..., :12])
    for i in range(4):
        a, b = x[..., 12 + 2 * i], x[..., 13 + 2 * i]
        c, s = angle[..., i].cos(), angle[..., i].sin()
        torch.testing.assert_close(out[..., 12 + 2 * i], a * c - b * s)
        torch.testing.assert_close(out[..., 13 + 2 * i], a * s + b * c)
    torch.testing.assert_close(rotate_tail(out, turn.conj()), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (17, 128), (5, 129)])
def test_rms_norm_is_within_rounding_of_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    w = torch.randn(shape[1])
    want = rms_norm(x.double(), w.double(), 1e-6)
    # a sum of n squares and four more operations, then one rounding to the result's type
    bound = (shape[1] / 2 + 4) * EPS32 + torch.finfo(dtype).eps / 2
    assert ((rms_norm(x, w, 1e-6).double() - want).abs() <= bound * want.abs() + 1e-30).all()


def test_rms_norm_multiplies_by_the_weight_before_the_cast() -> None:
    """Section 2.2: one rounding, not two."""
    x, w = torch.randn(64, 256).bfloat16(), torch.rand(256) + 0.5
    late = rms_norm(x, None, 1e-6) * w.bfloat16()
    assert not torch.equal(rms_norm(x, w, 1e-6), late)


@pytest.mark.parametrize("count", [1, 3, SMALL, SMALL + 1])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sinkhorn_paths_agree(count: int, size: int) -> None:
    logits = 3 * torch.randn(count, size, size)
    want = sinkhorn_reference(logits.double(), 20, 1e-6)
    got = sinkhorn(logits, 20, 1e-6)
    # 39 steps of N additions and a division each, all on numbers below 1
    assert (got.double() - want).abs().max() <= 39 * (size + 1) * EPS32
    assert torch.equal(sinkhorn(logits.requires_grad_(), 20, 1e-6).detach(), got)


def test_a_matrix_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(SMALL + 50, 4, 4)
    many = sinkhorn(logits, 20, 1e-6)
    for i in (0, 7, SMALL + 49):
        assert torch.equal(sinkhorn(logits[i : i + 1], 20, 1e-6)[0], many[i])


def test_sinkhorn_columns_sum_to_one_and_rows_only_converge() -> None:
    """Section 2.3: the last step is over columns, and the matrix is not symmetric."""
    logits = 6 * torch.randn(500, 4, 4, dtype=torch.float64)
    mix = sinkhorn(logits, 20, 1e-6)
    assert (mix.sum(1) - 1).abs().max() < 5e-6
    assert (mix.sum(2) - 1).abs().max() > 1e-3
    assert (mix - mix.transpose(1, 2)).abs().max() > 0.1


def test_pool_matches_a_loop_over_channels() -> None:
    values, logits = torch.randn(3, 8, 5), 30 * torch.randn(3, 8, 5)
    logits[0, :4] = -math.inf
    got = pool(values, logits)
    for n, c in ((0, 0), (2, 4), (0, 3)):
        z = [float(v) for v in logits[n, :, c]]
        share = [math.exp(v - max(z)) for v in z]
        want = sum(s * float(v) for s, v in zip(share, values[n, :, c], strict=True)) / sum(share)
        assert float(got[n, c]) == pytest.approx(want, rel=1e-5, abs=1e-6)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 3), st.integers(1, 150), st.integers(1, 700), st.integers(1, 12), st.integers(0, 2**31),
    st.booleans(), st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_choice_takes_the_largest_and_the_lowest_of_ties(
    sequences: int, queries: int, blocks: int, k: int, seed: int, coarse: bool, dtype: torch.dtype
) -> None:
    """Tile by tile against a sort; coarse scores tie often, and are exact in any order of sums."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-3, 4, (sequences, queries, 16, 4), generator=generator).to(dtype)
    weights = torch.randint(-2, 3, (sequences, queries, 16), generator=generator).to(dtype)
    keys = torch.randint(-3, 4, (sequences, blocks + 64, 4), generator=generator).to(dtype)
    if not coarse:
        keys, weights = keys * 2.0**-10 + 2, weights * 2.0**-8
    visible = torch.randint(0, blocks + 1, (sequences, queries), generator=generator)
    total = int(visible.max())
    got = choose(q, weights, visible, k, lambda first, stop: keys[:, first:stop], total)
    for g in range(sequences):
        scores = torch.einsum("qi,qis->qs", weights[g], torch.einsum("qij,sj->qis", q[g], keys[g]).relu())
        assert torch.equal(got[g], choose_reference(scores, visible[g], k))


def test_choice_over_several_tiles() -> None:
    blocks = 2 * TILE + 300
    q, weights, keys = torch.randn(1, 70, 16, 8), torch.randn(1, 70, 16), torch.randn(1, blocks + 64, 8)
    visible = torch.randint(0, blocks + 1, (1, 70))
    visible[0, 3], visible[0, 5] = blocks, TILE
    got = choose(q, weights, visible, 9, lambda first, stop: keys[:, first:stop], blocks)
    assert torch.equal(got[0], choose_reference(index_scores(q, weights, keys)[0], visible[0], 9))


def test_index_scores_match_a_loop() -> None:
    q, w, keys = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5), torch.randn(2, 7, 8)
    got = index_scores(q, w, keys)
    for b, t, s in ((0, 0, 0), (1, 2, 6), (0, 1, 3)):
        want = sum(float(w[b, t, h]) * max(float(q[b, t, h] @ keys[b, s]), 0.0) for h in range(5))
        assert float(got[b, t, s]) == pytest.approx(want, rel=1e-4, abs=1e-5)


def _loop_attention(q: torch.Tensor, keys: torch.Tensor, sink: torch.Tensor, scale: float) -> torch.Tensor:
    out = torch.zeros_like(q)
    for h in range(len(q)):
        logits = [scale * float(q[h] @ e) for e in keys]
        top = max([*logits, float(sink[h])])
        total = sum(math.exp(v - top) for v in logits) + math.exp(float(sink[h]) - top)
        for value, entry in zip(logits, keys, strict=True):
            out[h] += math.exp(value - top) / total * entry
    return out


@pytest.mark.parametrize("sink_at", [-5.0, 0.0, 200.0])
def test_attention_matches_a_loop(sink_at: float) -> None:
    q, entries = torch.randn(4, 3, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    sink = torch.randn(3, dtype=torch.float64) + sink_at
    mask = torch.rand(4, 6) < 0.6
    mask[0] = True
    mask[1] = False  # only the sink is left: nothing is read
    got = attend_reference(q, entries, mask, sink, 0.35)
    for t in (0, 2, 3):
        want = _loop_attention(q[t], entries[mask[t]], sink, 0.35)
        torch.testing.assert_close(got[t], want, rtol=1e-10, atol=1e-12)
    assert not got[1].any()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 9), st.sampled_from([1, 2, 5, 16]), st.integers(1, 40),
    st.lists(st.integers(1, 70), max_size=3), st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 60.0]),
)  # fmt: skip
def test_attention_in_parts_equals_attention_at_once(
    sequences: int, queries: int, heads: int, near: int, tiles: list[int], seed: int, size: float
) -> None:
    """Own keys first, then shared tiles; logits up to 60 standard deviations, masks that hide whole parts."""
    torch.manual_seed(seed)
    C, Q = 12, max(sequences * queries, 2)
    sequences, queries = (sequences, queries) if sequences * queries == Q else (1, 2)
    q, sink = size * torch.randn(Q, heads, C), torch.randn(heads)
    own, own_mask = torch.randn(Q, near, C), torch.rand(Q, near) < 0.7
    shared = [torch.randn(sequences, n, C) for n in tiles]
    masks = [torch.rand(sequences, queries, n) < p for n, p in zip(tiles, (0.0, 0.5, 1.0), strict=False)]
    state = Attention(q, own, own_mask, sink, C**-0.5)
    for keys, mask in zip(shared, masks, strict=True):
        state.read(keys, mask)
    got = state.result()
    for i in range(Q):
        g, s = divmod(i, queries)
        keys = torch.cat([own[i], *(t[g] for t in shared)]).double()
        mask = torch.cat([own_mask[i], *(m[g, s] for m in masks)])
        want = attend_reference(q[i : i + 1].double(), keys, mask[None], sink.double(), C**-0.5)[0]
        # logits: C products each, of keys up to 4 and queries up to 4 * size; the exponential passes the error on
        logit_error = C * EPS32 * 16 * size * C**0.5 + EPS32 * 16 * size * C**0.5
        bound = 4 * (2 * logit_error + (len(keys) + 8) * EPS32)
        assert (got[i].double() - want).abs().max() <= bound


def test_a_tile_that_is_hidden_changes_no_bit() -> None:
    q, own, sink = torch.randn(8, 2, 16), torch.randn(8, 5, 16), torch.randn(2)
    state = Attention(q, own, torch.ones(8, 5, dtype=torch.bool), sink, 0.25)
    before = state.result()
    state.read(1e3 * torch.randn(2, 30, 16), torch.zeros(2, 4, 30, dtype=torch.bool))
    assert torch.equal(state.result(), before)


@pytest.mark.parametrize("multiply", [linear, linear_reference])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 140), st.one_of(st.integers(1, 700), st.sampled_from([1024, 4096])), st.integers(1, 400),
    st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**31),
)  # fmt: skip
def test_a_row_does_not_depend_on_its_neighbours(
    multiply: Callable[..., torch.Tensor],
    threads: int,
    rows: int,
    inner: int,
    outer: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, inner, dtype=dtype), torch.randn(outer, inner, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        many = multiply(x, weight)
        for i in {0, rows // 2, rows - 1}:
            assert torch.equal(multiply(x[i : i + 1], weight)[0], many[i])
        assert torch.equal(multiply(x.flip(0), weight).flip(0), many)
    finally:
        torch.set_num_threads(before)


def test_one_unit_at_a_time_where_the_library_mixes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(100, 40), torch.randn(30, 40)
    want = torch.cat([torch.nn.functional.linear(p, weight) for p in torch.cat([x, torch.zeros(12, 40)]).split(16)])
    monkeypatch.setattr("abyssal.kernels.linear._unit", lambda *_: (16, False))
    assert torch.equal(linear_reference(x, weight), want[:100])


@pytest.mark.parametrize("function", [sigmoid, sqrt_softplus])
def test_an_element_has_the_same_bits_at_every_place(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = 20 * torch.randn(1500)
    many = function(x)
    for n in (1, 3, 15, 17, 33, 1001):
        assert torch.equal(function(x[:n].clone()), many[:n])


def test_sigmoid_in_float32() -> None:
    x = torch.linspace(-79, 100, 3001)
    want = 1 / (1 + np.exp(-x.double().numpy()))
    np.testing.assert_allclose(sigmoid(x).numpy(), want, rtol=8 * EPS32)
    assert 0 <= float(sigmoid(torch.tensor(-1e30))) < 1e-34


@pytest.mark.parametrize("value", [-200.0, -50.0, -16.7, 0.0, 88.8, 200.0])
def test_router_is_finite_and_sums_to_its_scale(value: float) -> None:
    """Trap 14: log(1 + exp(x)) underflows below -16.6 and overflows above 88.7."""
    logits = torch.full((3, 8), value) + torch.randn(3, 8)
    weights, chosen = router_weights(logits, None, None, 3, 2.5)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(1), torch.full((3,), 2.5))
    table = torch.tensor([[0, 1, 2]] * 3)
    weights, same = router_weights(logits, None, table, 3, 2.5)
    assert weights.isfinite().all() and torch.equal(same, table)
    assert chosen.shape == (3, 3)


def test_sqrt_softplus_in_float32() -> None:
    x = torch.linspace(-80, 100, 3001)
    want = np.sqrt(np.logaddexp(0, x.double().numpy()))
    np.testing.assert_allclose(sqrt_softplus(x).numpy(), want, rtol=40 * EPS32)


def test_bias_moves_the_choice_and_not_the_weights() -> None:
    logits = torch.randn(5, 8, dtype=torch.float64)
    bias = torch.zeros(8, dtype=torch.float64)
    bias[3] = 100
    weights, chosen = router_weights(logits, bias, None, 2, 1.5)
    assert (chosen == 3).any(1).all()
    scores = logits.exp().log1p().sqrt().gather(1, chosen)
    torch.testing.assert_close(weights, scores / scores.sum(1, keepdim=True) * 1.5)


def test_swiglu_clamps_the_gate_from_above_and_up_on_both_sides() -> None:
    gate, up = torch.tensor([20.0, -20.0, 1.0]), torch.tensor([30.0, -30.0, 2.0])
    s = torch.nn.functional.silu
    want = torch.stack([s(torch.tensor(10.0)) * 10, s(torch.tensor(-20.0)) * -10, s(torch.tensor(1.0)) * 2])
    torch.testing.assert_close(swiglu(gate, up, 10.0), want)


@pytest.mark.parametrize("quantise", [quantise_fp8, quantise_fp4])
@pytest.mark.parametrize("rows", [1, 130, BAND_ELEMENTS // 4096 + 200])
@pytest.mark.parametrize("multiply", [linear, linear_reference])
def test_banded_products_equal_whole_ones(quantise: object, rows: int, multiply: Callable[..., torch.Tensor]) -> None:
    assert callable(quantise)
    weight, scale = quantise(torch.randn(rows, 4096 if rows > 200 else 160))
    x = torch.randn(2, 4096 if rows > 200 else 160)
    want = x @ dequantise(weight, scale, torch.float32).T
    torch.testing.assert_close(multiply(x, weight, scale), want, rtol=1e-4, atol=1e-3)
