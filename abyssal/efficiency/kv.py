"""Bytes that a sequence keeps (architecture.md 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from abyssal.arch.config import ModelConfig
from abyssal.arch.schedule import LayerKind

Storage = Literal["packed", "fp8-keys", "bf16"]
BLOCK, GROUP, ALIGN = 64, 32, 8


def entry_bytes(config: ModelConfig, storage: Storage = "packed") -> int:
    """Bytes of one window or compressed entry; 584 at V4's sizes when packed."""
    if storage == "bf16":
        return 2 * config.head_dim
    plain = config.head_dim - config.qk_rope_head_dim
    return -(-(plain + 2 * config.qk_rope_head_dim + -(-plain // BLOCK)) // ALIGN) * ALIGN


def index_key_bytes(config: ModelConfig, storage: Storage = "packed") -> int:
    """Bytes of one index key; 68 at V4's sizes when packed, 132 in FP8 with one float scale."""
    if storage == "bf16":
        return 2 * config.index_head_dim
    if storage == "fp8-keys":
        return config.index_head_dim + 4
    return config.index_head_dim // 2 + config.index_head_dim // GROUP


@dataclass(frozen=True)
class KVCost:
    """Bytes of one sequence.

    Attributes:
        per_token: what each token of context adds, on average over a block.
        window: window entries of all layers, fixed.
        tails: float32 buffers of unfinished blocks, fixed; CSA keeps two blocks of doubled width.
    """

    per_token: float
    window: int
    tails: int

    @property
    def fixed(self) -> int:
        """Bytes that do not grow."""
        return self.window + self.tails

    def at(self, context: int) -> float:
        """Growing bytes at a context of so many tokens."""
        return self.per_token * context


def kv_cost(config: ModelConfig, storage: Storage = "packed") -> KVCost:
    """Cache bytes of the backbone; MTP excluded, as in the report."""
    entry, key = entry_bytes(config, storage), index_key_bytes(config, storage)
    grow, tails = 0.0, 0
    for kind in config.kinds:
        if kind is LayerKind.CSA:
            grow += (entry + key) / kind.value
            tails += 2 * 4 * 2 * kind.value * 2 * (config.head_dim + config.index_head_dim)
        elif kind is LayerKind.HCA:
            grow += entry / kind.value
            tails += 2 * 4 * kind.value * config.head_dim
    window = config.num_hidden_layers * config.sliding_window * entry
    return KVCost(grow, window, tails)
