"""Tensors that processes hold parts of."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, a view; all of it where `like` is not spread.

    Args:
        whole: the same on all processes.
        like: a tensor of its shape, spread as the result shall be.
    """
    if not isinstance(like, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(whole.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))]


def whole(x: Tensor) -> Tensor:
    """All of a tensor, on every process; all of them call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def spread_like(part: Tensor, like: Tensor) -> Tensor:
    """A tensor of which this process holds `part`, spread as `like` is."""
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
