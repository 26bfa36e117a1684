"""Native packing of cache entries and index keys against `abyssal.quant.entry`, byte for byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from abyssal.kernels import entry as kernels
from abyssal.kernels.choice import native
from abyssal.kernels.rounding import fake_fp4
from abyssal.quant import entry as plain
from abyssal.quant import fp4
from tests.kernels.native import needs_native, on_every_isa, same_bits

pytestmark = needs_native

SHAPES = [((0, 64), 16), ((1, 2), 0), ((1, 2), 2), ((3, 34), 8), ((2, 5, 96), 32), ((7, 512), 64), ((1, 130), 130)]


def values(shape: tuple[int, ...], size: float) -> Tensor:
    """Normal numbers, with zeros of both signs and numbers halfway between two codes."""
    g = torch.Generator().manual_seed(len(shape) + shape[-1])
    x = torch.randn(shape, generator=g) * size
    flat = x.view(-1)
    flat[::7] = 0.0
    flat[1::11] = -0.0
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 448.0, 17.0, 2.0**-10, 3 * 2.0**-10])
    flat[2::13] = halves.repeat(len(flat[2::13]) // len(halves) + 1)[: len(flat[2::13])] * size
    return x


def rounded_keys(x: Tensor) -> Tensor:
    """What the kernel keeps of index keys that are not packed."""
    module, y = native(), torch.empty_like(x)
    assert module is not None
    module.encode(x.reshape(-1, x.shape[-1]), True, 0, y.view(-1, x.shape[-1]))
    return y


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 2.0**-120])
@pytest.mark.parametrize(("shape", "rope_dim"), SHAPES)
def test_bytes_are_those_of_the_plain_code(shape: tuple[int, ...], rope_dim: int, size: float) -> None:
    x = values(shape, size)
    wants = plain.pack_entry(x, rope_dim), plain.fake_entry(x, rope_dim), plain.pack_index_key(x), fp4.fake_fp4(x)

    def run() -> tuple[Tensor, ...]:
        return (
            kernels.pack_entry(x, rope_dim),
            kernels.fake_entry(x, rope_dim),
            kernels.pack_index_key(x),
            rounded_keys(x),
        )

    for found in on_every_isa(run):
        for got, want in zip(found, wants, strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype
            assert torch.equal(got, want) if got.dtype == torch.uint8 else same_bits(got, want)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_value_breaks_its_block_alone(broken: float) -> None:
    x = values((2, 192), 1.0)
    x[1, 70] = broken

    def decoded(pack: Callable[[Tensor, int], Tensor], key: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return (
            plain.unpack_entry(pack(x, 64), 192, 64, torch.float32),
            plain.unpack_index_key(key(x), torch.float32),
        )

    want = decoded(plain.pack_entry, plain.pack_index_key)
    assert all(bool(w.isnan().any()) and not bool(w.isnan().all()) for w in want)
    for found in on_every_isa(lambda: decoded(kernels.pack_entry, kernels.pack_index_key)):
        assert all(same_bits(got, w) for got, w in zip(found, want, strict=True))


def test_gradients_pass_straight_through() -> None:
    x = values((2, 64), 1.0).requires_grad_()
    (kernels.fake_entry(x, 16).sum() + 2 * fake_fp4(x).sum()).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 3.0))
