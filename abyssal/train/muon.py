"""Muon with the hybrid Newton-Schulz iteration (training.md 2): momentum whose singular values are all one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from abyssal.base.machine import multiplies_bfloat16
from abyssal.quant.precision import wide
from abyssal.train.world import World, local

Triple = tuple[float, float, float]
# eight steps bring the singular values near 1, two settle them there
HYBRID: tuple[Triple, ...] = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
CACHED = 1 << 19  # values that pass all iterations together, since they stay in the cache


def orthogonalise(
    x_BNM: Tensor, steps: Sequence[Triple] = HYBRID, dtype: torch.dtype | None = None, eps: float = 1e-7
) -> Tensor:
    """The orthogonal matrices nearest to those of a stack, by Newton-Schulz.

    Args:
        x_BNM: matrices [..., n, m]; each is treated alone.
        steps: coefficients (a, b, c) of each iteration, X <- a X + (b A + c A A) X with A = X X^T.
        dtype: in which the products run; default that of x.
        eps: added to the norm, so that zero stays zero.
    Returns:
        [..., n, m] in the dtype of x, singular values near 1 (those of directions that x has).
    """
    tall = x_BNM.shape[-2] > x_BNM.shape[-1]
    x = (x_BNM.mT if tall else x_BNM).reshape(-1, min(x_BNM.shape[-2:]), max(x_BNM.shape[-2:]))
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + eps)  # before the cast: a small gradient keeps its bits
    x = x.to(dtype or x.dtype)
    if len(x):
        size = max(CACHED // x[0].numel(), 1)
        x = torch.cat([_iterate(part, steps) for part in x.split(size)])
    x = x.to(x_BNM.dtype)
    return (x.mT if tall else x).reshape(x_BNM.shape)


def _iterate(x: Tensor, steps: Sequence[Triple]) -> Tensor:
    for a, b, c in steps:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def narrowest_fast(world: World) -> torch.dtype:
    """In which products are fastest: bfloat16 where every process's device multiplies it, else float32."""
    cuda = world.device == "cuda"
    here = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else multiplies_bfloat16()
    return torch.float32 if world.any(not here) else torch.bfloat16


@dataclass(frozen=True)
class MuonRule:
    """Numbers of Muon.

    Attributes:
        momentum: of the buffer.
        decay: decoupled weight decay, times the rate.
        rms: root mean square of a square matrix's update, before the rate.
        steps: coefficients of each Newton-Schulz iteration.
        dtype: in which its products run.
    """

    momentum: float = 0.95
    decay: float = 0.1
    rms: float = 0.18
    steps: tuple[Triple, ...] = HYBRID
    dtype: torch.dtype = torch.float32


class Muon:
    """Muon over named matrices; those of one shape, lying or standing, are orthogonalised in one stack.

    Args:
        params: matrices [n, m], or stacks [E, n, m] of independent ones.
        parts: for a matrix that is several, one above the other, how many; it is split before it is orthogonalised.
        rule: the numbers.
        world: the processes that the parameters are spread over; each matrix is orthogonalised on one of them.
    Raises:
        ValueError: a parameter is no matrix, or does not split into so many parts.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        parts: Mapping[str, int] | None = None,
        rule: MuonRule | None = None,
        world: World | None = None,
    ):
        self.world = world or World()
        self.params = dict(params)
        self.rule = rule or MuonRule()
        self.parts = dict(parts or {})
        for name, p in self.params.items():
            if p.dim() not in (2, 3) or p.shape[-2] % self.parts.get(name, 1):
                raise ValueError(
                    f"{name} {list(p.shape)} is no matrix in {self.parts.get(name, 1)} parts: give it to AdamW"
                )
        # float32 at least, also for parameters in bfloat16
        self.momentum = {name: torch.zeros_like(wide(p.detach())) for name, p in self.params.items()}

    @torch.no_grad()
    def step(self, rate: float) -> float:
        """Update every parameter that has a gradient.

        Args:
            rate: learning rate.
        Returns:
            root mean square of the update before the rate, over all values updated; 0 without any.
        """
        shapes: dict[tuple[int, int], dict[str, Tensor]] = {}
        for name, p in self.params.items():
            if p.grad is None:
                continue
            grad, momentum = wide(local(p.grad)), local(self.momentum[name])
            momentum.mul_(self.rule.momentum).add_(grad)
            ahead = torch.add(grad, momentum, alpha=self.rule.momentum)  # Nesterov
            rows, columns = self._matrix(name)
            shapes.setdefault((min(rows, columns), max(rows, columns)), {})[name] = ahead
        squares, count = 0.0, 0
        for (_, longest), aheads in shapes.items():
            gain = longest**0.5 * self.rule.rms
            updates = self.world.scatter(self._orthogonal(aheads), {name: self.params[name] for name in aheads})
            for name, update in updates.items():
                held = local(self.params[name])
                held.mul_(1 - rate * self.rule.decay).sub_(update, alpha=rate * gain)
                squares += gain**2 * float(update.square().sum())
                count += update.numel()
        squares, count = self.world.sum(torch.tensor([squares, count], dtype=torch.float64)).tolist()
        return (squares / max(count, 1)) ** 0.5

    def _matrix(self, name: str) -> tuple[int, int]:
        """Rows and columns of each matrix of a parameter."""
        *_, rows, columns = self.params[name].shape
        return rows // self.parts.get(name, 1), columns

    def _orthogonal(self, aheads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Updates of parameters whose matrices have one shape, those that are whole on this process, in one stack."""
        wholes = self.world.gather(aheads, self.params)
        if not wholes:
            return {}
        lying = []
        for name, whole in wholes.items():
            rows, columns = self._matrix(name)
            matrices = whole.unflatten(-2, (-1, rows)).flatten(0, -3)
            lying.append(matrices if rows <= columns else matrices.mT)
        stack = orthogonalise(torch.cat(lying), self.rule.steps, self.rule.dtype)
        updates = {}
        for (name, whole), update in zip(wholes.items(), stack.split([len(x) for x in lying]), strict=True):
            rows, columns = self._matrix(name)
            updates[name] = (update if rows <= columns else update.mT).reshape(whole.shape)
        return updates

    def state_dict(self) -> dict[str, Tensor]:
        """The buffers, as `<parameter>.momentum`; they are not copied."""
        return {f"{name}.momentum": buffer for name, buffer in self.momentum.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            KeyError: a buffer is missing.
        """
        for name, buffer in self.momentum.items():
            buffer.copy_(state[f"{name}.momentum"])
