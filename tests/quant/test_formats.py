"""FP8, FP4, E8M0, Hadamard and packed entries against brute force over all codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abyssal.quant.e8m0 import decode_e8m0, encode_e8m0, power_of_two_above
from abyssal.quant.entry import (
    entry_bytes,
    fake_entry,
    index_key_bytes,
    pack_entry,
    pack_index_key,
    unpack_entry,
    unpack_index_key,
)
from abyssal.quant.fp4 import (
    dequantise_fp4,
    fake_fp4,
    fp4_to_fp8,
    fp8_to_fp4,
    pack_codes,
    quantise_fp4,
    to_codes,
    unpack_values,
)
from abyssal.quant.fp8 import dequantise_fp8, fake_fp8, quantise_fp8, to_e4m3
from abyssal.quant.hadamard import hadamard
from abyssal.quant.numerics import Numerics
from tests.oracle import plain

SHAPES = [(1, 1), (3, 31), (2, 32), (5, 64), (4, 65), (7, 200)]


def hard_values(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Normal values with zeros, tiny, huge and exactly halfway ones among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 448.0, 449.0, 1e6, -1e6, 0.25, 0.75, 2.5, 5.0, 3.5, -1.25])
    mask = torch.rand(shape, generator=generator) < 0.2
    picks = torch.randint(len(special), shape, generator=generator)
    return torch.where(mask, special.double()[picks], x)


def test_e8m0_bytes() -> None:
    raw = torch.arange(255, dtype=torch.uint8)
    values = decode_e8m0(raw, torch.float64)
    assert torch.equal(values, torch.tensor([2.0 ** (b - 127) for b in range(255)], dtype=torch.float64))
    assert torch.equal(encode_e8m0(values), raw)
    assert torch.equal(decode_e8m0(raw.view(torch.float8_e8m0fnu), torch.float64), values)
    assert torch.equal(decode_e8m0(values.float()), values.float())
    assert decode_e8m0(torch.tensor([255], dtype=torch.uint8)).isnan().all()
    assert encode_e8m0(torch.tensor([float("nan")])).item() == 255
    with pytest.raises(ValueError, match=r"0\.3"):
        encode_e8m0(torch.tensor([0.3]))


def test_e8m0_bytes_are_not_read_as_numbers() -> None:
    """Trap 33: 120 copied as a number instead of 2^-7."""
    assert decode_e8m0(torch.tensor([120], dtype=torch.uint8)).item() == 2.0**-7


@given(st.floats(min_value=1e-37, max_value=1e37))
def test_power_of_two_above(x: float) -> None:
    got = power_of_two_above(torch.tensor([x], dtype=torch.float64)).item()
    assert got / 2 < x <= got


def test_e4m3_rounding_of_everything_between_codes() -> None:
    codes = np.concatenate([plain.E4M3, (plain.E4M3[1:] + plain.E4M3[:-1]) / 2])
    x = np.concatenate([codes, codes * (1 + 1e-6), codes * (1 - 1e-6), -codes, [500.0, 1e9]])
    got = to_e4m3(torch.from_numpy(x).float()).double().numpy()
    np.testing.assert_array_equal(got, plain.round_e4m3(np.float32(x).astype(np.float64)))


def test_e2m1_rounding_of_everything_between_codes() -> None:
    x = np.concatenate([np.linspace(-8, 8, 4097), plain.E2M1, [1e9, -1e9]])
    got = unpack_values(pack_codes(to_codes(torch.from_numpy(np.append(x, 0.0)[: len(x) // 2 * 2]))), torch.float64)
    np.testing.assert_array_equal(got.numpy(), plain.round_e2m1(np.append(x, 0.0)[: len(x) // 2 * 2]))


def beside_the_middle(codes: np.ndarray) -> np.ndarray:
    """float64 numbers so near the middle of two codes that float32 puts them exactly there."""
    middle = (codes[1:] + codes[:-1]) / 2
    return np.concatenate([middle * (1 + 1e-12), middle * (1 - 1e-12)])


def test_float64_is_rounded_once() -> None:
    """A cast by way of float32 rounds twice and takes the wrong neighbour."""
    x = beside_the_middle(plain.E4M3)
    want = plain.round_e4m3(x)
    np.testing.assert_array_equal(to_e4m3(torch.from_numpy(x)).double().numpy(), want)
    assert (torch.from_numpy(x).float().to(torch.float8_e4m3fn).double().numpy() != want).any()
    tail = beside_the_middle(1 + np.arange(129) / 128)
    entry = torch.cat([torch.zeros(64, dtype=torch.float64), torch.from_numpy(tail)])
    np.testing.assert_array_equal(fake_entry(entry, len(tail))[64:].numpy(), plain.round_bf16(tail))
    assert torch.equal(
        unpack_entry(pack_entry(entry, len(tail)), len(entry), len(tail), entry.dtype)[64:],
        fake_entry(entry, len(tail))[64:],
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_training_and_inference_round_alike(dtype: torch.dtype) -> None:
    """x + (rounded - x) is the rounded value itself, bit for bit; the gradient is that of the identity."""
    x = hard_values((20, 256), 6).clamp(-1e4, 1e4).to(dtype)
    for rounding in (lambda t: fake_fp8(t, 64), fake_fp4, lambda t: fake_entry(t, 64)):
        leaf = x.clone().requires_grad_()
        out = rounding(leaf)
        assert torch.equal(out.detach(), rounding(x))
        weights = torch.randn(x.shape).to(dtype)
        (grad,) = torch.autograd.grad(out, leaf, weights)
        assert torch.equal(grad, weights)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_broken_numbers_are_not_clamped_to_plausible_ones(broken: float) -> None:
    x = torch.ones(2, 128)
    x[0, 3] = broken
    assert fake_fp8(x, 64)[0, :64].isnan().all() and torch.equal(fake_fp8(x, 64)[:, 64:], x[:, 64:])
    assert fake_fp4(x)[0, :32].isnan().all() and torch.equal(fake_fp4(x)[:, 32:], x[:, 32:])
    torch.testing.assert_close(
        unpack_entry(pack_entry(x, 32), 128, 32, x.dtype), fake_entry(x, 32), rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(
        unpack_index_key(pack_index_key(x), x.dtype), fake_fp4(x), rtol=0, atol=0, equal_nan=True
    )
    assert dequantise_fp8(*quantise_fp8(x), x.dtype)[0, 3].isnan()
    assert dequantise_fp4(*quantise_fp4(x), x.dtype)[0, :32].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_fake_roundings(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = hard_values(shape).to(dtype)
    for block in (32, 64, 128):
        np.testing.assert_array_equal(fake_fp8(x, block).double().numpy(), plain.fake_fp8(x.double().numpy(), block))
    np.testing.assert_array_equal(fake_fp4(x).double().numpy(), plain.fake_fp4(x.double().numpy()))


def test_fake_fp8_rounds_and_does_not_only_clamp() -> None:
    """Trap 16: the first published kernel only clamped."""
    x = torch.linspace(0.1, 1, 64)
    assert not torch.equal(fake_fp8(x, 64), x.clamp(-448, 448))


def test_nibbles_low_first() -> None:
    """3.3: low nibble is the even input; code 0-7 = 0, .5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    packed = pack_codes(codes)
    assert packed.tolist()[:2] == [0x10, 0x32]
    want = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6] * 2
    scale = torch.tensor([127 + 3], dtype=torch.uint8)
    got = dequantise_fp4(packed.view(torch.int8), scale, torch.float32)
    assert torch.equal(got, 8 * torch.tensor(want))
    assert torch.signbit(got[8])


@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (128, 128), (130, 260), (5, 300), (96, 256)])
def test_fp8_weights(shape: tuple[int, int]) -> None:
    x = hard_values(shape, 3).float()
    weight, scale = quantise_fp8(x)
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    got = dequantise_fp8(weight, scale, torch.float64).numpy()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            rows, columns = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            tile = x.double().numpy()[rows, columns]
            s = 2.0 ** np.ceil(np.log2(max(np.abs(tile).max(), 448 * 2.0**-126) / 448))
            assert decode_e8m0(scale)[i, j].item() == s
            np.testing.assert_array_equal(got[rows, columns], plain.round_e4m3(tile / s) * s)
    assert torch.equal(dequantise_fp8(weight, decode_e8m0(scale), torch.float32).double(), torch.from_numpy(got))
    with pytest.raises(ValueError, match="does not fit"):
        dequantise_fp8(weight, torch.cat([scale, scale]), torch.float32)


@pytest.mark.parametrize("byte", [127 - 100, 127 - 40, 127, 127 + 60])
def test_stored_fp8_tiles_survive_reading_and_writing(byte: int) -> None:
    """Also tiles of tiny values: the reference's floor of 1e-4 is for activations."""
    codes = torch.arange(127, dtype=torch.uint8).repeat(130)[: 128 * 128].view(128, 128)
    scale = torch.tensor([[byte]], dtype=torch.uint8)
    values = dequantise_fp8(codes.view(torch.float8_e4m3fn), scale, torch.float64)
    assert torch.equal(dequantise_fp8(*quantise_fp8(values), torch.float64), values)
    zeros = quantise_fp8(torch.zeros(128, 128))
    assert not dequantise_fp8(*zeros, torch.float32).any()


def test_fp4_weights() -> None:
    x = hard_values((3, 5, 96), 4)
    packed, scale = quantise_fp4(x)
    assert packed.shape == (3, 5, 48) and scale.shape == (3, 5, 3)
    np.testing.assert_array_equal(dequantise_fp4(packed, scale, torch.float64).numpy(), plain.fake_fp4(x.numpy()))
    with pytest.raises(ValueError, match="33"):
        quantise_fp4(torch.zeros(2, 33))
    with pytest.raises(ValueError, match="does not fit"):
        dequantise_fp4(packed, scale[..., :2], torch.float32)


def test_fp4_to_fp8_is_exact_for_every_code_and_offset() -> None:
    """training.md 4: all scales within 2^14 of a tile's largest are exact; beyond, an error says so."""
    for spread in range(15):
        codes = torch.arange(256, dtype=torch.uint8).repeat(2).view(2, 256)
        scale = torch.full((2, 16), 120, dtype=torch.uint8)
        scale[1] -= spread
        weight, coarse = fp4_to_fp8(codes, scale)
        want = dequantise_fp4(codes, scale, torch.float64)
        assert torch.equal(dequantise_fp8(weight, coarse, torch.float64), want)
        again = dequantise_fp4(*fp8_to_fp4(weight, coarse), torch.float64)
        assert torch.equal(again, want)
    scale[1] = 120 - 16
    with pytest.raises(ValueError, match=r"2\*\*16"):
        fp4_to_fp8(codes, scale)
    with pytest.raises(ValueError, match="not FP4"):
        fp8_to_fp4(*quantise_fp8(torch.randn(64, 64)))
    with pytest.raises(ValueError, match="NaN"):
        fp4_to_fp8(codes, scale.masked_fill(scale == 120, 255))


def test_fp4_zeros_and_the_smallest_scales_become_fp8() -> None:
    """Zeros get the smallest scale, a 64th of which is no E8M0 number."""
    for x in (torch.zeros(3, 64), torch.full((3, 64), 6 * 2.0**-126)):
        packed, scale = quantise_fp4(x)
        assert torch.equal(dequantise_fp8(*fp4_to_fp8(packed, scale), torch.float64), x.double())


def test_the_spread_in_the_error_is_that_of_the_tile() -> None:
    """Other tiles may lie anywhere."""
    codes = torch.full((256, 64), 0x77, dtype=torch.uint8)
    scale = torch.full((256, 4), 60, dtype=torch.uint8)
    scale[128:] = 150
    scale[200, 1] = 150 - 20
    with pytest.raises(ValueError, match=r"2\*\*20"):
        fp4_to_fp8(codes, scale)
    scale[200, 1] = 150
    weight, coarse = fp4_to_fp8(codes, scale)
    assert torch.equal(dequantise_fp8(weight, coarse, torch.float64), dequantise_fp4(codes, scale, torch.float64))


@pytest.mark.parametrize("size", [1, 2, 32, 64, 128])
def test_hadamard_is_the_sylvester_matrix_and_its_own_inverse(size: int) -> None:
    x = torch.randn(3, size, dtype=torch.float64)
    np.testing.assert_allclose(hadamard(x).numpy(), x.numpy() @ plain.hadamard_matrix(size), atol=1e-14)
    torch.testing.assert_close(hadamard(hadamard(x)), x)


def test_hadamard_in_bfloat16_rounds_once() -> None:
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(hadamard(x), hadamard(x.float()).bfloat16())


def test_hadamard_on_one_side_only_destroys_scores() -> None:
    """Trap 19: on both sides products stay, on one side they do not."""
    q, k = torch.randn(9, 64, dtype=torch.float64), torch.randn(7, 64, dtype=torch.float64)
    torch.testing.assert_close(hadamard(q) @ hadamard(k).T, q @ k.T)
    assert (hadamard(q) @ k.T - q @ k.T).abs().max() > 1
    with pytest.raises(ValueError, match="48"):
        hadamard(torch.zeros(48))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "rope"), [(512, 64), (96, 32), (20, 8), (130, 2)])
def test_packed_entries_equal_simulated_ones(dim: int, rope: int, dtype: torch.dtype) -> None:
    x = hard_values((3, 5, dim), 1).clamp(-1e4, 1e4).to(dtype)
    packed = pack_entry(x, rope)
    assert packed.shape[-1] == entry_bytes(dim, rope)
    got = unpack_entry(packed, dim, rope, dtype)
    assert torch.equal(got, fake_entry(x, rope))
    n = dim - rope
    want = plain.fake_fp8(x.double().numpy()[..., :n], 64)
    np.testing.assert_array_equal(got[..., :n].double().numpy(), torch.from_numpy(want).to(dtype).double().numpy())
    assert torch.equal(got[..., n:], x[..., n:].to(torch.bfloat16).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_packed_index_keys_equal_simulated_ones(dtype: torch.dtype) -> None:
    for dim in (8, 16, 32, 64, 128):  # config.json allows a power of two below a group of 32
        x = hard_values((4, dim), 2).to(dtype)
        packed = pack_index_key(x)
        assert packed.shape[-1] == index_key_bytes(dim)
        assert torch.equal(unpack_index_key(packed, dtype), fake_fp4(x))


@pytest.mark.parametrize("shape", [(21,), (1, 21), (3, 21), (0, 21)])
def test_lone_entries_with_an_odd_number_of_bytes_before_the_rotated_values(shape: tuple[int, ...]) -> None:
    x = hard_values(shape, 5).float()
    assert torch.equal(unpack_entry(pack_entry(x, 8), 21, 8, torch.float32), fake_entry(x, 8))


def test_entry_sizes_of_the_release() -> None:
    assert entry_bytes(512, 64) == 584
    assert index_key_bytes(128) == 68


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="fast"):
        Numerics.of("fast")  # type: ignore[arg-type]
