"""Roundings and the Hadamard transform on every instruction set: the bits of abyssal.quant."""

from __future__ import annotations

import pytest
import torch

from abyssal.kernels.rounding import fake_fp4, fake_fp8, hadamard, pack_entry, pack_index_key
from abyssal.quant import entry, fp4, fp8
from abyssal.quant import hadamard as plain
from tests.kernels.native import needs_native, on_every_isa, same_bits

pytestmark = [needs_native, pytest.mark.usefixtures("native_runs")]


def hard(rows: int, width: int) -> torch.Tensor:
    """Values over many magnitudes, and those that lie on and beside the borders of the formats."""
    torch.manual_seed(width)
    x = torch.randn(rows, width) * torch.randn(rows, 1).mul(20).exp()
    borders = torch.tensor([0.0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 448.0, 464.0, 2**-9, 2**-10])
    borders = torch.cat([borders, -borders, 1.5 * borders, torch.nextafter(borders, torch.tensor(1e9)), borders / 64])
    x[::2, : len(borders)] = borders[:width]
    return x


@pytest.mark.parametrize(
    ("rows", "width", "block"), [(0, 32, 32), (1, 1, 32), (40, 96, 64), (33, 130, 128), (500, 64, 32)]
)
def test_roundings_have_the_bits_of_the_reference(rows: int, width: int, block: int) -> None:
    x = hard(rows, width)
    want = fp8.fake_fp8(x, block), fp4.fake_fp4(x, block)
    for got in on_every_isa(lambda: (fake_fp8(x, block), fake_fp4(x, block))):
        for a, b in zip(got, want, strict=True):
            assert same_bits(a, b)


def test_every_quotient_of_a_block_is_rounded_as_the_reference_does() -> None:
    """A block whose scale is 1, over all float16 numbers."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    for largest, rounding, want in ((448.0, fake_fp8, fp8.fake_fp8), (6.0, fake_fp4, fp4.fake_fp4)):
        x = values[values.abs() <= largest].unsqueeze(1)
        x = torch.cat([torch.full_like(x, largest), x], dim=1)
        for (got,) in on_every_isa(lambda: (rounding(x, 2),)):  # noqa: B023
            assert same_bits(got, want(x, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_block_shows_itself_and_stays_alone(bad: float) -> None:
    x = torch.randn(3, 128)
    x[1, 40] = bad
    want = fp8.fake_fp8(x, 64), fp4.fake_fp4(x, 32)
    for got in on_every_isa(lambda: (fake_fp8(x, 64), fake_fp4(x, 32))):
        for a, b in zip(got, want, strict=True):
            assert same_bits(a, b) and a[1].isnan().any() and a[1, 64:].isfinite().all()


@pytest.mark.parametrize("shape", [(3, 1), (2, 2, 2), (5, 64), (0, 8), (300, 128)])
def test_hadamard_has_the_bits_of_the_reference(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for (got,) in on_every_isa(lambda: (hadamard(x),)):
        assert same_bits(got, plain.hadamard(x))


def test_hadamard_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.zeros(2, 48))


@pytest.mark.parametrize(
    ("rows", "dim", "rotated"), [(0, 96, 32), (1, 2, 0), (3, 8, 8), (40, 96, 32), (33, 130, 34), (300, 512, 64)]
)
def test_packed_vectors_have_the_bytes_of_the_reference(rows: int, dim: int, rotated: int) -> None:
    x = hard(rows, dim)
    want = entry.pack_entry(x, rotated), entry.pack_index_key(x)
    for got in on_every_isa(lambda: (pack_entry(x, rotated), pack_index_key(x))):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_vector_is_read_back_as_broken(bad: float) -> None:
    x = torch.randn(3, 512)
    x[1, 40] = x[1, 500] = bad
    want = entry.unpack_entry(entry.pack_entry(x, 64), 512, 64, torch.float32)
    want_key = entry.unpack_index_key(entry.pack_index_key(x), torch.float32)
    for packed, key in on_every_isa(lambda: (pack_entry(x, 64), pack_index_key(x))):
        assert same_bits(entry.unpack_entry(packed, 512, 64, torch.float32), want)
        assert same_bits(entry.unpack_index_key(key, torch.float32), want_key)
