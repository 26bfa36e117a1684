"""What a trainer asks of a pass, and what the layers tell it; a pass that serves has no recorder.

A recorder changes no bit of what a pass computes, but for the choices that it makes itself (`topk`, `choice`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Attended:
    """What the queries of a CSA layer read, and what its indexer thought of it.

    All but `index_q_TIJ`, `index_weights_TI` and `keys_GBJ` are cut off from the graph; these three lead to the
    indexer's own parameters and nowhere else.

    Attributes:
        q_THC: queries, normed and turned; T counts tokens, without rows of nobody.
        near_KC: window entries that `index_TW` points into, `mask_TW` True where there is one.
        blocks_GBC: compressed entries of each sequence.
        read_TB: whether a token reads a block of its own sequence.
        sink_H: raw logits of the sink.
        scale: factor of the products.
        index_q_TIJ, index_weights_TI: index queries, and head weights.
        keys_GBJ: index keys of each sequence.
        groups: neighbouring sequences of equal length: first row, length of each, how many.
    """

    q_THC: Tensor
    near_KC: Tensor
    index_TW: Tensor
    mask_TW: Tensor
    blocks_GBC: Tensor
    read_TB: Tensor
    sink_H: Tensor
    scale: float
    index_q_TIJ: Tensor
    index_weights_TI: Tensor
    keys_GBJ: Tensor
    groups: tuple[tuple[int, int, int], ...]


class Recorder:
    """Notes nothing; a trainer overrides what it needs.

    Attributes:
        topk: how many blocks a query of a CSA layer reads at most, or None for the configured number. With a
            number that no query exceeds, selection is dense.
        watches_attention: whether `attended` is called; what it is told costs about an attention more.
        recompute: whether blocks keep nothing for the way back and run again there; changes no bit.
    """

    topk: int | None = None
    watches_attention = False
    recompute = False

    def again(self) -> Recorder:
        """Who listens where a block runs again: it makes the same choices, and what it notes counts no more."""
        return Recorder()

    def choice(self, gate: nn.Module) -> Tensor | None:
        """Expert numbers [T, K] that a router shall take in place of its own choice, or None."""
        del gate
        return None

    def routed(self, gate: nn.Module, logits_TE: Tensor, chosen_TK: Tensor) -> None:
        """A router has chosen.

        Args:
            gate: the router.
            logits_TE: its logits, with gradients; T counts tokens, without rows of nobody.
            chosen_TK: the experts of each token.
        """

    def attended(self, layer: nn.Module, seen: Attended) -> None:
        """The attention of a CSA layer has read; not called where no block is complete."""
