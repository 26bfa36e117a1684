"""Which parameter goes to Muon, in how many matrices, and which to AdamW (training.md 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from abyssal.model import Transformer
from abyssal.model.compressor import Compressor
from abyssal.model.linear import GroupedLinear
from abyssal.train.adamw import AdamW, AdamWRule
from abyssal.train.muon import Muon, MuonRule
from abyssal.train.world import World

SMALL = 10**9  # parameters below which router, mHC projections and `ape` go to AdamW too


def takes_adamw(name: str, param: Tensor, small: bool) -> bool:
    """Whether a parameter is on AdamW's list.

    Args:
        name: as in `named_parameters`.
        param: its value or shape.
        small: whether the model has less than `SMALL` parameters.
    """
    leaf = name.rsplit(".", 1)[-1]
    # vectors: norms, attn_sink, mHC base and scale
    if param.dim() < 2 or name in ("embed.weight", "head.weight"):
        return True
    # of small models: far from square, or read as a table
    return small and (leaf == "ape" or leaf.endswith("_fn") or name.endswith(".gate.weight"))


def parts_of(model: nn.Module) -> dict[str, int]:
    """Parameters that are several independent matrices, one above the other, and how many.

    The output projection is one for each group; a CSA compressor's projections are one for the block itself and one
    for its part in the block after it.
    """
    parts = {}
    for name, module in model.named_modules():
        if isinstance(module, GroupedLinear):
            parts[f"{name}.weight"] = module.groups
        elif isinstance(module, Compressor):
            count = module.ape.shape[1] // module.channels
            parts |= {f"{name}.{leaf}.weight": count for leaf in ("wkv", "wgate")}
    return parts


@dataclass(frozen=True)
class Rates:
    """Learning rates of a step.

    Attributes:
        muon, adamw: of the parameters of each.
        embedding: of the embedding; None for AdamW's.
    """

    muon: float
    adamw: float
    embedding: float | None = None


class Optimiser:
    """Muon and AdamW over all parameters of a model that record gradients.

    Args:
        model: unpacked; the router's bias records none and gets no optimiser.
        muon, adamw: the numbers of each.
        world: the processes that the model is spread over.
        matrices: whether Muon takes them; else AdamW takes all.
    """

    def __init__(
        self,
        model: Transformer,
        muon: MuonRule | None = None,
        adamw: AdamWRule | None = None,
        world: World | None = None,
        matrices: bool = True,
    ):
        small = model.size < SMALL
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        others = {name: p for name, p in named.items() if not matrices or takes_adamw(name, p, small)}
        orthogonal = {name: p for name, p in named.items() if name not in others}
        parts = {name: count for name, count in parts_of(model).items() if name in orthogonal}
        self.muon = Muon(orthogonal, parts, muon, world)
        self.adamw = AdamW(others, adamw, world)

    @property
    def params(self) -> list[nn.Parameter]:
        """All of them."""
        return [*self.muon.params.values(), *self.adamw.params.values()]

    def step(self, rates: Rates) -> dict[str, float]:
        """One update; root mean squares of the updates before the rates, by optimiser."""
        own = {} if rates.embedding is None else {"embed.weight": rates.embedding}
        return {"muon": self.muon.step(rates.muon), "adamw": self.adamw.step(rates.adamw, own)}

    def state_dict(self) -> dict[str, Tensor]:
        """All buffers, named like the parameters; they are not copied."""
        return self.muon.state_dict() | self.adamw.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            KeyError: something is missing.
        """
        self.muon.load_state_dict(state)
        self.adamw.load_state_dict(state)
