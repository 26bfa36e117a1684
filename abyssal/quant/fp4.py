"""FP4 E2M1, two codes a byte, with a power-of-two scale for 32 inputs (architecture.md 3.3, 3.6)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from abyssal.quant.e8m0 import decode_e8m0, encode_e8m0, power_of_two_above
from abyssal.quant.fp8 import TILE, blocks_of, dequantise_fp8, expand_tiles
from abyssal.quant.precision import wide, wide_dtype

GROUP = 32
E2M1_MAX = 6.0
SMALLEST_AMAX = 6 * 2.0**-126
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# halfway points; where two codes are equally near, the even one wins
_BORDERS = ((0.25, True), (0.75, False), (1.25, True), (1.75, False), (2.5, True), (3.5, False), (5.0, True))


@cache
def _pairs(dtype: torch.dtype) -> Tensor:
    """The two values of every byte: low nibble first (the even input), then high."""
    values = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=dtype)
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1)


def to_codes(x: Tensor) -> Tensor:
    """Nearest E2M1 code of each value, ties to the even code, clamped to +-6; uint8 with bit 3 as sign."""
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for border, stays_low in _BORDERS:
        code += (magnitude > border) if stays_low else (magnitude >= border)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes [..., I] as bytes [..., I/2]: even inputs in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_values(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [..., I/2] as unscaled values [..., I]."""
    raw = packed if packed.dtype == torch.uint8 else packed.view(torch.uint8)  # signed bytes would shift wrongly
    table = _pairs(wide_dtype(dtype)).to(raw.device)
    return table.index_select(0, raw.reshape(-1).int()).to(dtype).view(*raw.shape[:-1], 2 * raw.shape[-1])


def _scaled_groups(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    cut = blocks_of(x, group)
    amax = cut.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_AMAX)
    return cut, power_of_two_above(amax / E2M1_MAX)


def quantise_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Store a weight [..., I] as packed FP4 with one scale for 32 inputs.

    Returns:
        packed uint8 [..., I/2] and scale bytes uint8 [..., I/32].
    Raises:
        ValueError: I is not a multiple of 32.
    """
    if weight.shape[-1] % GROUP:
        raise ValueError(f"FP4 needs inputs in groups of {GROUP}, got {weight.shape[-1]}: choose a multiple of {GROUP}")
    cut, scale = _scaled_groups(wide(weight), GROUP)
    return pack_codes(to_codes((cut / scale).flatten(-2))), encode_e8m0(scale.squeeze(-1))


def dequantise_fp4(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Values [..., I] of packed bytes [..., I/2] with scales [..., I/32].

    Raises:
        ValueError: packed bytes and scales do not belong together.
    """
    if packed.shape[-1] * 2 != scale.shape[-1] * GROUP or packed.shape[:-1] != scale.shape[:-1]:
        raise ValueError(
            f"scale {list(scale.shape)} does not fit packed FP4 {list(packed.shape)}: need one for {GROUP} inputs"
        )
    precise = wide_dtype(dtype)
    values = unpack_values(packed, precise).unflatten(-1, (-1, GROUP))
    return (values * decode_e8m0(scale, precise).unsqueeze(-1)).flatten(-2).to(dtype)


def fake_fp4(x: Tensor, group: int = GROUP) -> Tensor:
    """Round to FP4 and back, one scale for each `group` values of the last dimension; gradient straight through."""
    cut, scale = _scaled_groups(wide(x.detach()), group)
    table = _pairs(cut.dtype)[:16, 0].to(x.device)
    rounded = table[to_codes(cut / scale).int()] * scale
    rounded = rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def fp4_to_fp8(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same values as E4M3 in 128 x 128 tiles, without loss (the official conversion).

    A tile's new scale is its largest FP4 scale / 2**6; smaller scales move into the E4M3 exponent.

    Returns:
        weight float8_e4m3fn [..., O, I] and scale bytes uint8 [..., ceil(O/128), ceil(I/128)].
    Raises:
        ValueError: the scales of a tile lie too far apart for E4M3, or one is NaN.
    """
    rows, columns = packed.shape[-2], packed.shape[-1] * 2
    fine = decode_e8m0(scale, torch.float64)
    if bool(fine.isnan().any()):
        raise ValueError("an FP4 scale is NaN (byte 255): this weight is damaged")
    down, across = -(-rows // TILE), -(-columns // TILE)
    groups = TILE // GROUP
    padded = torch.nn.functional.pad(fine, (0, across * groups - fine.shape[-1], 0, down * TILE - rows))
    tiles = padded.unflatten(-1, (across, groups)).unflatten(-3, (down, TILE))
    # the floor is for tiles of zeros, whose scales are as small as scales can be
    coarse = (tiles.amax(dim=(-3, -1)) / 2.0**6).clamp(min=2.0**-126)
    values = dequantise_fp4(packed, scale, torch.float64)
    ratio = values / expand_tiles(coarse, rows, columns)
    stored = ratio.to(torch.float8_e4m3fn)
    inexact = stored.to(torch.float64) != ratio
    if bool(inexact.any()):
        *lead, row, column = inexact.nonzero()[0].tolist()
        top, left = row // TILE * TILE, column // TILE * groups
        tile = fine[tuple(lead)][top : top + TILE, left : left + groups]
        spread = float((tile.amax() / tile.amin()).log2())
        raise ValueError(f"FP4 scales spread over 2**{spread:.0f}: E4M3 holds 2**14 inside a tile; keep these in FP4")
    return stored, encode_e8m0(coarse)


def fp8_to_fp4(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The way back, for values that came from FP4.

    Raises:
        ValueError: a group of 32 inputs is not FP4 under any scale.
    """
    values = dequantise_fp8(weight, scale, torch.float64)
    packed, fine = quantise_fp4(values)
    if not torch.equal(dequantise_fp4(packed, fine, torch.float64), values):
        raise ValueError("these FP8 values are not FP4 numbers: quantise them instead of converting")
    return packed, fine
