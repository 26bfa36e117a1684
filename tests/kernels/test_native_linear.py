"""The native product on every instruction set of this machine, against float64 and against itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.kernels import choice
from abyssal.kernels.choice import forced, native
from abyssal.kernels.linear import dequantise, linear, linear_by_columns, linear_by_rows
from abyssal.kernels.packed import FORMATS, Packed, packable
from abyssal.quant.fp4 import quantise_fp4
from abyssal.quant.fp8 import quantise_fp8

ISAS = choice.choice().supported
U32, U16 = 2.0**-24, 2.0**-8  # half a unit in the last place
SIZES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 100, 127, 128, 129, 260)

Stored = tuple[Tensor, Tensor | None]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param):
        yield request.param


def stored(kind: str, *shape: int, seed: int = 0, spread: float = 0.0) -> Stored:
    """A random weight; `spread` makes scales differ by up to so many powers of two."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight *= (spread * torch.randn(*shape[:-1], 1, generator=generator)).round().exp2()
    if kind == "float8":
        return quantise_fp8(weight)
    if kind == "float4":
        return quantise_fp4(weight)
    return weight.to(torch.bfloat16 if kind == "bfloat16" else torch.float32), None


def gamma(steps: float, unit: float = U32) -> float:
    return steps * unit / (1 - steps * unit)


def check(x: Tensor, weight: Stored, got: Tensor) -> None:
    """Higham's bound of a sum: 32 steps in a group, one for each group, one for the unit of its values."""
    values = dequantise(*weight, torch.float64)
    want = x.double() @ values.T
    size = x.double().abs() @ values.abs().T
    bound = gamma(33 + -(-x.shape[-1] // 32)) * size
    if got.dtype == torch.bfloat16:
        bound = bound + U16 * (want.abs() + bound)
    assert ((got.double() - want).abs() <= bound + 1e-37).all()


@pytest.mark.parametrize("kind", FORMATS)
@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 70), st.sampled_from(SIZES), st.sampled_from(SIZES), st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([0.0, 12.0]),
)  # fmt: skip
def test_every_instruction_set_is_within_its_bound_and_all_agree(
    kind: str, rows: int, outputs: int, inputs: int, seed: int, dtype: torch.dtype, spread: float
) -> None:
    inputs = -(-inputs // 32) * 32 if kind == "float4" else inputs
    weight = stored(kind, outputs, inputs, seed=seed, spread=spread)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    results = []
    for name in ISAS:
        with forced(name):
            results += [linear(x, *weight), linear(x, Packed(*weight))]
    check(x, weight, results[0])
    for other in results[1:]:
        assert torch.equal(results[0], other)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_among_any_others(isa: str, kind: str, dtype: torch.dtype) -> None:
    """Rows 1 to 70, threads 1 to 4, packed and not."""
    weight = stored(kind, 75, 160)
    packed, fast = Packed(*weight), native()
    assert fast is not None
    x = torch.randn(70, 160).to(dtype)
    before, want = fast.threads(), linear(x, packed)
    try:
        for threads in (1, 2, 3, 4):
            fast.set_threads(threads)
            for rows in range(1, 71) if isa != "scalar" else (1, 2, 3, 4, 5, 24, 25, 70):
                assert torch.equal(linear(x[:rows], packed), want[:rows]), rows
                assert torch.equal(linear(x[70 - rows :], packed), want[70 - rows :]), rows
            assert torch.equal(linear(x, *weight), want)
    finally:
        fast.set_threads(before)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [2.0**-70, 1.0, 2.0**70])
def test_rows_that_are_bfloat16_numbers_take_the_same_steps(isa: str, kind: str, size: float) -> None:
    """Alone or beside rows that are not, which keep the whole product from the faster way."""
    weight = stored(kind, 75, 160, spread=3.0)
    x = torch.randn(40, 160).bfloat16().float() * size
    beside = torch.cat([x, torch.randn(1, 160)])
    want = linear(beside, *weight)
    check(x / size, weight, want[:40] / size)
    for rows in (1, 2, 3, 4, 5, 8, 9, 24, 25, 40):
        assert torch.equal(linear(x[:rows], *weight), want[:rows]), rows
    with forced("scalar"):
        assert torch.equal(linear(beside, *weight), want)


def test_numbers_beyond_the_range_are_as_in_float32(isa: str) -> None:
    """Subnormal numbers, infinity and NaN among bfloat16 numbers."""
    weight = stored("float8", 40, 64)
    x = torch.randn(9, 64).bfloat16().float()
    x[1, 3], x[2, 5], x[3, 7], x[4] = 2.0**-149, float("inf"), float("nan"), 2.0**-130
    got = linear(x, *weight)
    assert torch.equal(got[4], linear(x[4:5], *weight)[0])
    assert got[4].abs().max() > 0
    assert got[3].isnan().all()
    with forced("scalar"):
        torch.testing.assert_close(linear(x, *weight), got, rtol=0, atol=0, equal_nan=True)


def test_many_threads_share_a_large_product_evenly(isa: str) -> None:
    """Large enough that several threads take part."""
    weight = stored("float4", 700, 512)
    packed, fast = Packed(*weight), native()
    assert fast is not None
    x = torch.randn(33, 512)
    before, want = fast.threads(), torch.cat([linear(row, packed) for row in x.split(1)])
    try:
        for threads in (1, 2, 3, 4, 9):
            fast.set_threads(threads)
            assert torch.equal(linear(x, packed), want)
    finally:
        fast.set_threads(before)


@pytest.mark.parametrize("kind", ["bfloat16", "float8", "float4"])
def test_a_quantised_weight_has_the_bits_of_its_values(isa: str, kind: str) -> None:
    weight = stored(kind, 150, 320, spread=3.0)
    x = torch.randn(40, 320)
    assert torch.equal(linear(x, Packed(*weight)), linear(x, dequantise(*weight, torch.float32)))


@pytest.mark.parametrize("kind", FORMATS)
def test_empty_and_single_elements(isa: str, kind: str) -> None:
    step = 32 if kind == "float4" else 1
    for rows, outputs, inputs in ((0, 5, step), (3, 0, step), (1, 1, step)):
        weight = stored(kind, outputs, inputs)
        x = torch.randn(rows, inputs)
        got = linear(x, Packed(*weight))
        assert got.shape == (rows, outputs)
        check(x, weight, got)
    if kind != "float4":
        nothing: Stored = (torch.empty(3, 0), None)
        weight = stored(kind, 3, 0) if kind != "float8" else (nothing[0].to(torch.float8_e4m3fn), torch.empty(1, 0))
        assert torch.equal(linear(torch.empty(2, 0), *weight), torch.zeros(2, 3))
    leading = linear(torch.randn(2, 3, 4, 64), Packed(*stored(kind, 5, 64)))
    assert leading.shape == (2, 3, 4, 5)


@pytest.mark.parametrize("byte", [0, 1, 64, 127, 200, 253, 254])
def test_extreme_scales_of_fp4(isa: str, byte: int) -> None:
    """From 2**-127, which is subnormal, to 2**127; x keeps the results within float32."""
    codes = torch.randint(0, 256, (20, 32), dtype=torch.uint8)
    scale = torch.full((20, 2), byte, dtype=torch.uint8)
    x = torch.randn(7, 64) * 2.0 ** (-40 if byte > 127 else 40)
    got = linear(x, Packed(codes, scale))
    check(x, (codes, scale), got)
    assert got.isfinite().all()


def test_a_nan_scale_shows_itself(isa: str) -> None:
    weight, scale = stored("float4", 20, 64)
    assert scale is not None
    scale[3, 1] = 255
    for rows in (1, 30):
        got = linear(torch.randn(rows, 64), Packed(weight, scale))
        assert got[:, 3].isnan().all()
        assert got[:, :3].isfinite().all()
        assert got[:, 4:].isfinite().all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(isa: str, kind: str, value: float) -> None:
    weight = stored(kind, 40, 96)
    x = torch.randn(30, 96)
    x[7, 5] = value
    for rows in (x, x.bfloat16()):
        got = linear(rows, Packed(*weight))
        column = dequantise(*weight, torch.float32)[:, 5]
        want = (column * value).nan_to_num(nan=float("nan"), posinf=float("inf"), neginf=float("-inf"))
        assert torch.equal(got[7].float().isnan(), want.isnan())
        assert torch.equal(got[7].float()[~want.isnan()], want[~want.isnan()])
        assert got[torch.arange(30) != 7].isfinite().all()


def test_nan_codes_of_fp8_are_left_to_the_reference(isa: str) -> None:
    weight, scale = stored("float8", 20, 64)
    assert packable(weight, scale)
    weight.view(torch.uint8)[3, 4] = 0x7F
    assert not packable(weight, scale)


def test_every_code_has_its_value(isa: str) -> None:
    """One output for each code, one input that is not zero."""
    for count, row in ((16, torch.arange(16, dtype=torch.uint8)), (256, torch.arange(256, dtype=torch.uint8))):
        if count == 16:
            codes = torch.zeros(16, 16, dtype=torch.uint8)
            codes[:, 3] = row | (row << 4)
            weight: Stored = codes, torch.full((16, 1), 127, dtype=torch.uint8)
            place = 6
        else:
            bytes_ = torch.zeros(256, 32, dtype=torch.uint8)
            bytes_[:, 9] = torch.where((row & 0x7F) == 0x7F, torch.zeros_like(row), row)  # no NaN
            weight, place = (bytes_.view(torch.float8_e4m3fn), torch.full((2, 1), 127, dtype=torch.uint8)), 9
        x = torch.zeros(30, 32)
        x[:, place] = 1.0
        want = dequantise(*weight, torch.float32)[:, place]
        for rows in (1, 30):
            for dtype in (torch.float32, torch.bfloat16):
                got = linear(x[:rows].to(dtype), Packed(*weight))
                assert torch.equal(got[0].float(), want.to(dtype).float())


def test_bfloat16_flushes_subnormal_numbers_on_every_path(isa: str) -> None:
    """The processor's bfloat16 products do, so a few rows and many agree only if all do."""
    x = (torch.randn(40, 64) * 2.0**-126).bfloat16()
    packed = Packed(*stored("float4", 30, 64))
    many = linear(x, packed)
    assert torch.equal(torch.cat([linear(row, packed) for row in x.split(1)]), many)
    assert torch.isfinite(torch.tensor(2.0**-140) * 2)  # and float32 outside is as it was
    assert float(torch.tensor(2.0**-140) * 2) == 2.0**-139


@pytest.mark.parametrize("kind", FORMATS)
def test_grouped_products_equal_single_ones(isa: str, kind: str) -> None:
    weight, scale = stored(kind, 5, 128, 64)
    packed = Packed(weight, scale)
    singles = [Packed(weight[e], None if scale is None else scale[e]) for e in range(5)]
    for counts in ([3, 0, 40, 1, 0], [0, 0, 0, 0, 7], [0] * 5):
        x = torch.randn(sum(counts), 64)
        want = [linear(part, single) for part, single in zip(x.split(counts), singles, strict=True)]
        assert torch.equal(linear_by_rows(x, packed, torch.tensor(counts)), torch.cat(want))
        with forced("reference"):
            torch.testing.assert_close(linear_by_rows(x, packed, torch.tensor(counts)), torch.cat(want))
    x = torch.randn(30, 5, 64)
    want = [linear(x[:, e].contiguous(), single) for e, single in enumerate(singles)]
    assert torch.equal(linear_by_columns(x, packed), torch.stack(want, dim=1))
    assert torch.equal(linear_by_columns(x, weight, scale), torch.stack(want, dim=1))
    with forced("reference"):
        torch.testing.assert_close(linear_by_columns(x, packed), torch.stack(want, dim=1))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(16, 32), (3, 17, 96), (2, 130, 160)])
def test_packing_gives_back_what_it_took(isa: str, kind: str, shape: tuple[int, ...]) -> None:
    weight, scale = stored(kind, *shape)
    packed = Packed(weight, scale)
    for again in (packed, copy.deepcopy(packed)):
        back, back_scale = again.stored()
        assert back.dtype == weight.dtype
        assert torch.equal(back.view(torch.uint8), weight.view(torch.uint8))
        assert (back_scale is None) == (scale is None)
        if scale is not None and back_scale is not None:
            assert torch.equal(back_scale, scale)
    if not shape[-2] % 16 and not shape[-1] % 32:
        assert packed.nbytes <= weight.nbytes + (0 if scale is None else 4 * scale.nbytes)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(1, 32), (16, 32), (33, 96), (128, 256), (150, 160)])
def test_matrices_put_into_a_stack_are_those_packed_together(isa: str, kind: str, shape: tuple[int, int]) -> None:
    matrices = [stored(kind, *shape, seed=seed) for seed in range(4)]
    stack = Packed.empty(3, *matrices[0])
    for place, number in ((0, 3), (2, 1), (1, 0), (0, 2)):  # one over another
        stack.put(place, *matrices[number])
    x, counts = torch.randn(9, shape[1]), torch.tensor([4, 0, 5])
    got = linear_by_rows(x, stack, counts)
    want = torch.cat([linear(x[:4], Packed(*matrices[2])), linear(x[4:], Packed(*matrices[1]))])
    assert torch.equal(got, want)
    weight, scale = stack.stored()
    for place, number in enumerate((2, 0, 1)):
        assert torch.equal(weight[place].view(torch.uint8), matrices[number][0].view(torch.uint8))
        want_scale = matrices[number][1]
        assert (scale is None) == (want_scale is None)
        if scale is not None and want_scale is not None:
            assert torch.equal(scale[place], want_scale)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(32, 96), (17, 96), (2, 48, 64), (16, 33)])
def test_packing_in_place_changes_no_bit(isa: str, kind: str, shape: tuple[int, ...]) -> None:
    if kind == "float4" and shape[-1] % 32:
        return
    weight, scale = stored(kind, *shape)
    given = weight.clone()
    packed = Packed(given, scale, in_place=True)
    whole = shape[-2] % 16 == 0 and shape[-1] % 32 == 0
    assert torch.equal(given.view(torch.uint8), weight.view(torch.uint8)) != whole
    assert torch.equal(packed.stored()[0].view(torch.uint8), weight.view(torch.uint8))
    if len(shape) == 2:
        x = torch.randn(5, shape[-1])
        assert torch.equal(linear(x, packed), linear(x, Packed(weight, scale)))


def test_gradients_are_those_of_the_reference() -> None:
    if not ISAS:
        pytest.skip("no extension")
    x, weight = torch.randn(9, 40, requires_grad=True), torch.randn(24, 40, requires_grad=True)
    grouped, matrices = torch.randn(9, 3, 40, requires_grad=True), torch.randn(3, 8, 40, requires_grad=True)
    seed = torch.randn(9, 24)

    def gradients(name: str) -> list[Tensor]:
        with forced(name):
            total = (linear(x, weight) * seed).sum() + (linear_by_columns(grouped, matrices).flatten(1) * seed).sum()
        return list(torch.autograd.grad(total, [x, weight, grouped, matrices]))

    for got, want in zip(gradients(ISAS[0]), gradients("reference"), strict=True):
        torch.testing.assert_close(got, want)
    frozen = Packed(weight.detach())
    with forced(ISAS[0]):
        (got,) = torch.autograd.grad(linear(x, frozen).sum(), [x])
    torch.testing.assert_close(got, weight.detach().sum(0).expand(9, 40))


def test_other_types_and_devices_take_the_reference() -> None:
    x = torch.randn(3, 64, dtype=torch.float64)
    weight = stored("float4", 20, 64)
    values = dequantise(*weight, torch.float64)
    torch.testing.assert_close(linear(x, *weight), x @ values.T, rtol=1e-12, atol=1e-12)
    if ISAS:
        with forced(ISAS[0]):
            packed = Packed(*weight)
        torch.testing.assert_close(linear(x, packed), x @ values.T, rtol=1e-12, atol=1e-12)


def test_wrong_shapes_are_named() -> None:
    if not ISAS:
        pytest.skip("no extension")
    with forced(ISAS[0]), pytest.raises(ValueError, match="x is float32"):
        linear(torch.randn(3, 63), Packed(torch.randn(5, 64)))
