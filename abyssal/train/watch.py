"""What a training pass collects on its way through the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from abyssal.model.moe import Gate
from abyssal.model.recorder import Attended, Recorder
from abyssal.train.gauges import Gauges
from abyssal.train.losses import balance_loss, index_loss


class Watch(Recorder):
    """Losses that arise inside layers, and the load of every expert.

    Args:
        lengths: tokens of each sequence over which experts shall be balanced, one behind the other.
        topk: blocks that a CSA query reads at most; None for the configured number.
        attention: collect the indexers' losses.
        choices: expert numbers [T, K] for some routers to take in place of their own choice.
        gauges: to be shown what CSA layers read.
        recompute: blocks run again on the way back, and so do the steps of the indexers' losses.

    Attributes:
        loads: of each router that chooses by score, tokens that each expert got, [E].
        chosen: the choice of each router of the last pass.
        balance: sum over these routers and the sequences of `balance_loss`.
        index: sum over CSA layers and queries of `index_loss`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        topk: int | None = None,
        attention: bool = False,
        choices: Mapping[nn.Module, Tensor] | None = None,
        gauges: Gauges | None = None,
        recompute: bool = False,
    ):
        self.topk = topk
        self.watches_attention = attention
        self.recompute = recompute
        self.loads: dict[Gate, Tensor] = {}
        self.chosen: dict[nn.Module, Tensor] = {}
        self.balance = torch.zeros(())
        self.index = torch.zeros(())
        self._gauges = gauges
        self._lengths = lengths
        self._choices = choices or {}

    def again(self) -> Watch:
        return Watch(
            self._lengths,
            topk=self.topk,
            attention=self.watches_attention,
            choices=self._choices,
            recompute=self.recompute,
        )

    def choice(self, gate: nn.Module) -> Tensor | None:
        return self._choices.get(gate)

    def routed(self, gate: nn.Module, logits_TE: Tensor, chosen_TK: Tensor) -> None:
        assert isinstance(gate, Gate)
        self.chosen[gate] = chosen_TK
        if gate.bias is None:
            return
        self.loads[gate] = torch.bincount(chosen_TK.flatten(), minlength=logits_TE.shape[1])
        self.balance = self.balance + balance_loss(logits_TE, chosen_TK, self._lengths)

    def attended(self, layer: nn.Module, seen: Attended) -> None:
        self.index = self.index + index_loss(seen, recompute=self.recompute)
        if self._gauges is not None:
            self._gauges.add(seen)
