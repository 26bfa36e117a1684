"""DeepSeekMoE: a router, routed experts and one shared expert (paper 2.1, architecture.md 2.10)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abyssal.arch.config import ModelConfig
from abyssal.kernels.experts import fused_experts
from abyssal.kernels.linear import linear, linear_by_rows
from abyssal.kernels.packed import Packed
from abyssal.kernels.rounding import fake_fp8
from abyssal.kernels.router import router_weights
from abyssal.kernels.swiglu import swiglu
from abyssal.model.linear import ACTIVATION_BLOCK, PackedModule, QuantLinear, WideLinear
from abyssal.model.recorder import Recorder
from abyssal.quant.numerics import Numerics
from abyssal.quant.precision import wide

EXPERT_WEIGHTS = ("w1", "w2", "w3")
ORDER = ("w1", "w3", "w2")  # in which an expert uses them


class Gate(WideLinear):
    """Chooses K experts for each token: by score, or in the first blocks by the token's id.

    Attributes:
        bias: [E], moves the choice and never the weights; None in hash-routed blocks.
        tid2eid: [V, K], the fixed table of a hash-routed block, else None.
    """

    bias: nn.Parameter | None
    tid2eid: Tensor | None

    def __init__(self, config: ModelConfig, hashed: bool):
        super().__init__(config.hidden_size, config.n_routed_experts)
        self.config = config
        K, E = config.num_experts_per_tok, config.n_routed_experts
        self.register_parameter("bias", None if hashed else nn.Parameter(torch.zeros(E), requires_grad=False))
        table = torch.zeros(config.vocab_size, K, dtype=torch.int64) if hashed else None
        self.register_buffer("tid2eid", table)

    def route(
        self, x_TD: Tensor, ids_T: Tensor, count: int | None = None, recorder: Recorder | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weights [T, K] in float32, which sum to `routed_scaling_factor`, and expert numbers [T, K].

        Args:
            x_TD, ids_T: input of the sublayer, and the tokens' ids.
            count: rows from here on belong to nobody; by default there are none.
            recorder: may choose in place of the router, and notes what was chosen.
        """
        logits = self.forward(x_TD)
        chosen = None if self.tid2eid is None else self.tid2eid[ids_T].long()
        if recorder is not None and (given := recorder.choice(self)) is not None:
            chosen = F.pad(given, (0, 0, 0, len(x_TD) - len(given)))
        weights_TK, chosen_TK = router_weights(
            logits, self.bias, chosen, self.config.num_experts_per_tok, self.config.routed_scaling_factor
        )
        if recorder is not None:
            recorder.routed(self, logits[:count], chosen_TK[:count])
        return weights_TK, chosen_TK


class Experts(PackedModule):
    """The routed experts, stacked: w1 (gate) and w3 (up) [E, F, D], w2 (down) [E, D, F].

    A weight may be packed FP4 or FP8 with its scales in `w1_scale` and so on. A subclass can read experts from
    disk instead: `expert` is the one place that looks up a single one, and `expect` tells which will be used.

    Attributes:
        on_disk: whether it does.
    """

    on_disk = False

    w1_scale: Tensor | None
    w2_scale: Tensor | None
    w3_scale: Tensor | None
    pairs = tuple((name, f"{name}_scale") for name in EXPERT_WEIGHTS)

    def __init__(self, config: ModelConfig, numerics: Numerics):
        super().__init__()
        self.config = config
        self.numerics = numerics
        E, D, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.w1 = nn.Parameter(torch.empty(E, width, D))
        self.w2 = nn.Parameter(torch.empty(E, D, width))
        self.w3 = nn.Parameter(torch.empty(E, width, D))
        for name in EXPERT_WEIGHTS:
            self.register_buffer(f"{name}_scale", None)

    def expert(self, number: int, name: str) -> tuple[Tensor, Tensor | None]:
        """The stored weight of one expert and its scale; `name` is w1, w2 or w3."""
        scale = getattr(self, f"{name}_scale")
        return getattr(self, name)[number], None if scale is None else scale[number]

    def expect(self, chosen_TK: Tensor) -> None:
        """The experts that the next call will use, as soon as they are known; nothing to do in memory."""

    def stacked(self) -> tuple[Packed | tuple[Tensor, Tensor | None], ...]:
        """w1, w3 and w2 of all experts, packed or with their scales; empty ones where they lie elsewhere."""
        return tuple(self.packed.get(name) or (getattr(self, name), getattr(self, f"{name}_scale")) for name in ORDER)

    def forward(self, x_TD: Tensor, weights_TK: Tensor, chosen_TK: Tensor, count: int) -> Tensor:
        """Weighted sum of each token's experts, [count, D] in float32 (float64 for float64)."""
        if self.numerics.activations:
            x_TD = fake_fp8(x_TD, ACTIVATION_BLOCK)
        if len(self.packed) == len(EXPERT_WEIGHTS):
            return self._packed(x_TD[:count], weights_TK[:count], chosen_TK[:count])
        if count == 1:  # nothing to sort into groups; the rows of nobody fill the products
            pairs = sorted((number, place) for place, number in enumerate(chosen_TK[0].tolist()))
            parts = [self._one(number, x_TD, weights_TK[:1, place])[:1] for number, place in pairs]
            return functools.reduce(torch.add, parts)
        x_TD, weights_TK, chosen_TK = x_TD[:count], weights_TK[:count], chosen_TK[:count]
        K = chosen_TK.shape[1]
        by_expert = chosen_TK.flatten().sort(stable=True)
        rows = by_expert.indices // K
        gains = weights_TK.flatten()[by_expert.indices]
        counts = torch.bincount(by_expert.values, minlength=self.config.n_routed_experts).tolist()
        parts, first = [], 0
        for number, size in enumerate(counts):
            if size:
                part = slice(first, first + size)
                parts.append(self._one(number, x_TD[rows[part]], gains[part]))
                first += size
        # every token adds its experts in rising order, whatever else is in the batch
        total = wide(x_TD).new_zeros(count, x_TD.shape[1])
        return total.index_add(0, rows, torch.cat(parts))

    def _packed(self, x_TD: Tensor, weights_TK: Tensor, chosen_TK: Tensor) -> Tensor:
        """All experts of a weight in one call."""
        by_expert = chosen_TK.flatten().sort(stable=True)
        rows = by_expert.indices // chosen_TK.shape[1]
        counts_E = torch.bincount(by_expert.values, minlength=self.config.n_routed_experts)
        x = x_TD[rows]
        up, gate = (linear_by_rows(x, self.packed[name], counts_E) for name in ("w3", "w1"))
        a = self._activate(gate, up, weights_TK.flatten()[by_expert.indices], x.dtype)
        parts = wide(linear_by_rows(a, self.packed["w2"], counts_E))
        # every token adds its experts in rising order, whatever else is in the batch
        return parts.new_zeros(len(x_TD), parts.shape[1]).index_add(0, rows, parts)

    def _activate(self, gate: Tensor, up: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
        a = swiglu(gate, up, self.config.swiglu_limit, gain)  # before the cast and before w2
        a = a.to(dtype)
        return fake_fp8(a, ACTIVATION_BLOCK) if self.numerics.activations else a

    def _one(self, number: int, x: Tensor, gain: Tensor) -> Tensor:
        up, gate = linear(x, *self.expert(number, "w3")), linear(x, *self.expert(number, "w1"))
        a = self._activate(gate, up, gain, x.dtype)
        return wide(linear(a, *self.expert(number, "w2")))


class SharedExpert(nn.Module):
    """The expert that every token passes; clamped like the routed ones (trap 15)."""

    def __init__(self, config: ModelConfig, numerics: Numerics):
        super().__init__()
        D, width = config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        self.limit = config.swiglu_limit
        self.w1 = QuantLinear(D, width, numerics)
        self.w2 = QuantLinear(width, D, numerics)
        self.w3 = QuantLinear(D, width, numerics)

    def three(self) -> tuple[Packed | tuple[Tensor, Tensor | None], ...]:
        """w1, w3 and w2, packed or with their scales."""
        return tuple(m.packed.get("weight") or (m.weight, m.scale) for m in (self.w1, self.w3, self.w2))

    def forward(self, x_TD: Tensor) -> Tensor:
        """x [T, D] -> [T, D], same dtype."""
        return self.w2(swiglu(self.w1(x_TD), self.w3(x_TD), self.limit).to(x_TD.dtype))


class MoE(nn.Module):
    """Routed experts plus the shared one; the sum is taken in float32."""

    def __init__(self, config: ModelConfig, hashed: bool, numerics: Numerics):
        super().__init__()
        self.gate = Gate(config, hashed)
        self.experts = Experts(config, numerics)
        self.shared_experts = SharedExpert(config, numerics)

    def expect(self, ids_T: Tensor) -> None:
        """Tokens of the next call: a hash-routed layer knows from them alone what to read from disk."""
        if self.experts.on_disk and self.gate.tid2eid is not None:
            self.experts.expect(self.gate.tid2eid[ids_T])

    def forward(self, x_TD: Tensor, ids_T: Tensor, count: int, recorder: Recorder | None = None) -> Tensor:
        """x [T, D] and token ids [T] (hash routing) -> [T, D], same dtype.

        Rows from `count` on belong to nobody and pass no routed expert.
        """
        weights_TK, chosen_TK = self.gate.route(x_TD, ids_T, count, recorder)
        self.experts.expect(chosen_TK[:count])
        tokens = x_TD[:count], weights_TK[:count], chosen_TK[:count]
        block = ACTIVATION_BLOCK if self.experts.numerics.activations else 0
        limit = self.shared_experts.limit
        fused = fused_experts(*tokens, self.experts.stacked(), self.shared_experts.three(), limit, block)
        if fused is not None:
            return F.pad(fused, (0, 0, 0, len(x_TD) - count)) if count < len(x_TD) else fused
        y_TD = wide(self.shared_experts(x_TD))
        routed = self.experts(x_TD, weights_TK, chosen_TK, count)
        return torch.cat([routed + y_TD[:count], y_TD[count:]]).to(x_TD.dtype)
