"""Routed experts on several processes: tokens travel to their experts and back (paper 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from abyssal.base.errors import ConfigError
from abyssal.kernels.experts import fused_experts
from abyssal.kernels.packed import Packed
from abyssal.model.linear import ACTIVATION_BLOCK
from abyssal.model.moe import EXPERT_WEIGHTS, ORDER, Experts
from abyssal.quant.precision import wide
from abyssal.train.world import local


def exchanged(x: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Rows to every process and from every process, in the order of their ranks; takes no gradient."""
    found = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(found, x.contiguous(), list(received), list(sent), group=group)
    return found


class _Exchange(torch.autograd.Function):
    """`exchanged`, with gradients, which travel back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way = received, sent, group
        return exchanged(x, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return exchanged(grad, *ctx.way), None, None, None


class SpreadExperts(Experts):
    """The routed experts of one layer, of which each process of a mesh holds a run of neighbours.

    Args:
        whole: all of them, the same on each process.
        mesh: the processes, one dimension.
    Raises:
        ConfigError: the experts do not share out evenly.
    """

    def __init__(self, whole: Experts, mesh: DeviceMesh):
        with torch.device("meta"):
            super().__init__(whole.config, whole.numerics)
        count, size = whole.config.n_routed_experts, mesh.size()
        if count % size:
            raise ConfigError(f"{count} experts do not share out over {size} processes: choose a divisor")
        self.own = count // size
        self.rank = mesh.get_local_rank()
        self.group = mesh.get_group()
        for name in EXPERT_WEIGHTS:
            part = getattr(whole, name).detach()[self.rank * self.own : (self.rank + 1) * self.own].clone()
            setattr(self, name, nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False)))

    def stacked(self) -> tuple[Packed | tuple[Tensor, Tensor | None], ...]:
        """Empty ones: no process has all."""
        return ((torch.empty(0), None),) * len(ORDER)

    def expert(self, number: int, name: str) -> tuple[Tensor, Tensor | None]:
        """One of this process's experts, counted from its first."""
        return local(getattr(self, name))[number], None

    def forward(self, x_TD: Tensor, weights_TK: Tensor, chosen_TK: Tensor, count: int) -> Tensor:
        """Weighted sum of each token's experts, [count, D]; all processes of the mesh call this together."""
        x_TD, weights_TK, chosen_TK = x_TD[:count], weights_TK[:count], chosen_TK[:count]
        by_expert = chosen_TK.flatten().sort(stable=True)
        rows_P = by_expert.indices // chosen_TK.shape[1]
        sizes = torch.bincount(by_expert.values // self.own, minlength=dist.get_world_size(self.group))
        arriving = torch.empty_like(sizes)
        dist.all_to_all_single(arriving, sizes, group=self.group)
        sent, received = sizes.tolist(), arriving.tolist()
        numbers_P = exchanged(by_expert.values, sent, received, self.group) - self.rank * self.own
        # one tensor, so that the way back is one exchange too, at the same moment everywhere
        pairs = torch.cat([wide(x_TD)[rows_P], weights_TK.flatten()[by_expert.indices].unsqueeze(1)], dim=1)
        pairs = _Exchange.apply(pairs, sent, received, self.group)  # type: ignore[no-untyped-call]
        y_PD = self._own(pairs[:, :-1].to(x_TD.dtype), pairs[:, -1:], numbers_P.unsqueeze(1))
        back_PD = _Exchange.apply(y_PD, received, sent, self.group)  # type: ignore[no-untyped-call]
        # every token adds its experts in rising order, wherever they are
        return back_PD.new_zeros(count, back_PD.shape[1]).index_add(0, rows_P, back_PD)

    def _own(self, x_PD: Tensor, gains_P1: Tensor, numbers_P1: Tensor) -> Tensor:
        """What this process's experts make of pairs of a token and one of them."""
        weights = [local(getattr(self, name)) for name in ORDER]
        if not len(x_PD):  # nobody came: gradients are zero, not absent
            return wide(x_PD) * gains_P1 + sum(w.flatten()[0] * 0 for w in weights)
        block = ACTIVATION_BLOCK if self.numerics.activations else 0
        stored = [(w, None) for w in weights]
        fused = fused_experts(x_PD, gains_P1, numbers_P1, stored, (), self.config.swiglu_limit, block)
        if fused is not None:
            return wide(fused)
        return super().forward(x_PD, gains_P1, numbers_P1, len(x_PD))
