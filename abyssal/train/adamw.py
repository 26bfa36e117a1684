"""AdamW for what is no matrix, or behaves like none (training.md 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from abyssal.quant.precision import wide
from abyssal.train.world import World, local


@dataclass(frozen=True)
class AdamWRule:
    """Numbers of AdamW.

    Attributes:
        betas: of the two moments.
        eps: added to the root of the second; the released 1e-20 helps nobody once gradients underflow.
        decay: decoupled weight decay, times the rate.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-12
    decay: float = 0.1


class AdamW:
    """AdamW over named parameters.

    Args:
        params: of any shape.
        rule: the numbers.
        world: the processes that the parameters are spread over.
    """

    def __init__(
        self, params: Mapping[str, nn.Parameter], rule: AdamWRule | None = None, world: World | None = None
    ):
        self.world = world or World()
        self.params = dict(params)
        self.rule = rule or AdamWRule()
        self.first = {name: torch.zeros_like(wide(p.detach())) for name, p in self.params.items()}
        self.second = {name: torch.zeros_like(first) for name, first in self.first.items()}
        # of each parameter: one without a gradient stands still
        self.steps = {name: torch.zeros((), dtype=torch.int64) for name in self.params}

    @torch.no_grad()
    def step(self, rate: float, own: Mapping[str, float] | None = None) -> float:
        """Update every parameter that has a gradient.

        Args:
            rate: learning rate.
            own: rates of parameters that have another one.
        Returns:
            root mean square of the update before the rate, over all values updated; 0 without any.
        """
        squares, count = 0.0, 0
        one, two = self.rule.betas
        for name, p in self.params.items():
            if p.grad is None:
                continue
            speed = (own or {}).get(name, rate)
            grad, held = wide(local(p.grad)), local(p)
            self.steps[name] += 1
            done = int(self.steps[name])
            first = local(self.first[name]).lerp_(grad, 1 - one)
            second = local(self.second[name]).mul_(two).addcmul_(grad, grad, value=1 - two)
            root = second.sqrt().div_((1 - two**done) ** 0.5).add_(self.rule.eps)
            update = first.div(root).div_(1 - one**done)
            held.mul_(1 - speed * self.rule.decay).sub_(update, alpha=speed)
            squares += float(update.square().sum())
            count += update.numel()
        squares, count = self.world.sum(torch.tensor([squares, count], dtype=torch.float64)).tolist()
        return (squares / max(count, 1)) ** 0.5

    def state_dict(self) -> dict[str, Tensor]:
        """The moments and counts, as `<parameter>.first`, `.second` and `.steps`; they are not copied."""
        state = {}
        for name in self.params:
            state[f"{name}.first"] = self.first[name]
            state[f"{name}.second"] = self.second[name]
            state[f"{name}.steps"] = self.steps[name]
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            KeyError: something is missing.
        """
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
