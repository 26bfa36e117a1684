"""FP8 E4M3 with a power-of-two scale for each tile (architecture.md 3.3, 3.6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.quant.e8m0 import decode_e8m0, encode_e8m0, power_of_two_above
from abyssal.quant.precision import wide, wide_dtype

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4  # the reference's floor of a block's largest magnitude, for activations
# weights have none: below 1e-4 it would cut bits off a stored tile that is read and written again
SMALLEST_WEIGHT_AMAX = E4M3_MAX * 2.0**-126
TILE = 128


def _tiles(shape: torch.Size) -> tuple[int, int]:
    return -(-shape[-2] // TILE), -(-shape[-1] // TILE)


def expand_tiles(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Scales of 128 x 128 tiles [..., O/128, I/128] repeated to every element [..., O, I]."""
    tall = scale.repeat_interleave(TILE, dim=-2)[..., :rows, :]
    return tall.repeat_interleave(TILE, dim=-1)[..., :columns]


def round_once(x: Tensor, bits: int, smallest: int) -> Tensor:
    """Round float64 to `bits` significant binary digits, ties to even; other dtypes pass unchanged.

    torch casts float64 to FP8 and bfloat16 by way of float32, which rounds twice: just beside the middle of two
    numbers it then takes the wrong one.

    Args:
        smallest: exponent of the smallest normal number of the target format.
    """
    if x.dtype != torch.float64:
        return x
    exponent = torch.frexp(x).exponent.clamp(min=smallest + 1)
    step = torch.ldexp(torch.ones_like(x), exponent - bits)
    return torch.round(x / step) * step


def to_e4m3(x: Tensor) -> Tensor:
    """Nearest E4M3 number, ties to even, clamped to +-448."""
    return round_once(x.clamp(-E4M3_MAX, E4M3_MAX), 4, -6).to(torch.float8_e4m3fn)


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Store a weight [..., O, I] as E4M3 with one scale for each 128 x 128 tile; edge tiles may be smaller.

    Returns:
        weight float8_e4m3fn [..., O, I] and scale bytes uint8 [..., ceil(O/128), ceil(I/128)].
    """
    rows, columns = weight.shape[-2:]
    down, across = _tiles(weight.shape)
    x = wide(weight)
    padded = F.pad(x, (0, across * TILE - columns, 0, down * TILE - rows))
    amax = padded.unflatten(-1, (across, TILE)).unflatten(-3, (down, TILE)).abs().amax(dim=(-3, -1))
    scale = power_of_two_above(amax.clamp(min=SMALLEST_WEIGHT_AMAX) / E4M3_MAX)
    return to_e4m3(x / expand_tiles(scale, rows, columns)), encode_e8m0(scale)


def dequantise_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of an FP8 weight [..., O, I]; the scale is E8M0 bytes or, in Base releases, float32.

    Raises:
        ValueError: the scale has another number of tiles than the weight.
    """
    rows, columns = weight.shape[-2:]
    if tuple(scale.shape[-2:]) != _tiles(weight.shape):
        raise ValueError(
            f"scale {list(scale.shape)} does not fit weight {list(weight.shape)}: need tiles {_tiles(weight.shape)}"
        )
    precise = wide_dtype(dtype)
    return (weight.to(precise) * expand_tiles(decode_e8m0(scale, precise), rows, columns)).to(dtype)


def block_scale(x_blocks: Tensor) -> Tensor:
    """The scale of each block [..., blocks, size] -> [..., blocks, 1] by the reference's rule."""
    return power_of_two_above(x_blocks.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_AMAX) / E4M3_MAX)


def blocks_of(x: Tensor, block: int) -> Tensor:
    """The last dimension cut into blocks, the last one filled up with zeros."""
    spare = -x.shape[-1] % block
    return (F.pad(x, (0, spare)) if spare else x).unflatten(-1, (-1, block))


def fake_fp8(x: Tensor, block: int) -> Tensor:
    """Round to FP8 and back, one scale for each `block` values of the last dimension.

    The gradient passes straight through. Same shape and dtype as x; the last block may be shorter.
    """
    cut = blocks_of(wide(x.detach()), block)
    scale = block_scale(cut)
    rounded = (to_e4m3(cut / scale).to(cut.dtype) * scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded
