"""The whole model: embedding, blocks, head (architecture.md 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from abyssal.arch.config import ModelConfig
from abyssal.base.errors import TokenError
from abyssal.kernels.linear import linear
from abyssal.kvcache.memory import Memory
from abyssal.kvcache.sequence import SequenceCache
from abyssal.model.batch import Batch
from abyssal.model.block import Block
from abyssal.model.linear import Linear, PackedModule
from abyssal.model.mhc import collapse_head, head_parameters
from abyssal.model.mtp import MTPBlock
from abyssal.model.norm import RMSNorm
from abyssal.model.recompute import through
from abyssal.model.recorder import Recorder
from abyssal.model.rope import Rope
from abyssal.quant.numerics import Numerics
from abyssal.quant.precision import wide


class Embedding(nn.Module):
    """Rows of the embedding matrix [V, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, ids_T: Tensor) -> Tensor:
        """ids [T] -> [T, D] in the type of the weight."""
        return nn.functional.embedding(ids_T, self.weight)


@dataclass(frozen=True)
class Output:
    """What a pass over packed tokens gives.

    Attributes:
        streams_TND: the streams after the last block, before the collapse; the MTP block reads them.
        z_TD: collapsed and normed hidden states, which the head reads.
        chosen: if it was watched: for each CSA layer and sequence, the blocks that the last token read.
    """

    streams_TND: Tensor
    z_TD: Tensor
    chosen: list[list[NDArray[np.int64]]] = field(default_factory=list)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        TokenError: names the first bad id and its place.
    """
    bad = ((ids < 0) | (ids >= vocab_size)).flatten().nonzero()
    if len(bad):
        place = int(bad[0])
        value = int(ids.flatten()[place])
        raise TokenError(f"token id {value} at place {place} is outside the vocabulary: use 0..{vocab_size - 1}")


class Transformer(nn.Module):
    """DeepSeek-V4.

    Args:
        config: the model's numbers.
        numerics: which of the reference's roundings are simulated; default none.
        dtype: type of weights and activations: float32, bfloat16 or float64.
    """

    def __init__(
        self, config: ModelConfig, *, numerics: Numerics | None = None, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.config = config
        self.numerics = numerics or Numerics()
        self.dtype = dtype
        self.ropes = {ratio: Rope(config, ratio, dtype) for ratio in (0, *config.backbone_ratios)}
        self.embed = Embedding(config)
        self.layers = nn.ModuleList(
            Block(config, ratio, i < config.num_hash_layers, self.numerics)
            for i, ratio in enumerate(config.backbone_ratios)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = head_parameters(config)
        # DSpark stages live under mtp.* too, but are another module; a release keeps them, we do not run them
        depth = 0 if config.dspark else config.num_nextn_predict_layers
        self.mtp = nn.ModuleList(MTPBlock(config, self.numerics) for _ in range(depth))

    def pack(self) -> Transformer:
        """Put all weights without gradients into the order of the native kernels, where these run; no bit changes."""
        for module in self.modules():
            if isinstance(module, PackedModule):
                module.pack()
        return self

    @property
    def size(self) -> int:
        """Values that the weights hold, packed or not."""
        packed = (w for module in self.modules() if isinstance(module, PackedModule) for w in module.packed.values())
        return sum(p.numel() for p in self.parameters()) + sum(weight.shape.numel() for weight in packed)

    def unpack(self) -> Transformer:
        """Turn packed weights into parameters again."""
        for module in self.modules():
            if isinstance(module, PackedModule):
                module.unpack()
        return self

    def new_memory(self, *, pages: int | None = None, slots: int | None = None) -> Memory:
        """Memory for sequences of this model; without limits it grows."""
        return Memory(
            self.config, self.numerics, dtype=self.dtype, device=self.norm.weight.device, pages=pages, slots=slots
        )

    def new_cache(self) -> SequenceCache:
        """The state of a new sequence in a memory of its own."""
        return SequenceCache(self.new_memory())

    def forward(self, ids_BS: Tensor, caches: Sequence[SequenceCache] | None = None) -> Tensor:
        """Logits of sequences of equal length.

        Args:
            ids_BS: token ids.
            caches: the state of each, advanced by S tokens; None starts and forgets new sequences.
        Returns:
            logits_BSV in float32 (float64 for a float64 model).
        Raises:
            TokenError: an id is outside the vocabulary.
        """
        if caches is None:
            memory = self.new_memory()
            caches = [SequenceCache(memory) for _ in ids_BS]
        lengths = [ids_BS.shape[1]] * len(caches)
        return self.logits(self.run(ids_BS.flatten(), caches, lengths).z_TD).unflatten(0, ids_BS.shape)

    def run(
        self,
        ids_T: Tensor,
        caches: Sequence[SequenceCache],
        lengths: Sequence[int] | None = None,
        *,
        watch: bool = False,
        recorder: Recorder | None = None,
        skips: Sequence[NDArray[np.int64] | None] | None = None,
    ) -> Output:
        """One pass over packed tokens of sequences of any lengths, each at its own position.

        The result for a sequence has the same bits whatever else is in the pass and however its tokens are
        cut into passes (on processors where `kernels.linear` and torch's batched products allow it).

        Args:
            ids_T: tokens of all sequences, one sequence after another.
            caches: the state of each, all in one memory; advanced.
            lengths: tokens of each; needed when there is more than one.
            watch: report which blocks the indexers choose.
            recorder: what a trainer asks and notes.
            skips: how much further the positions of some sequences are turned; see `Batch`.
        Raises:
            TokenError: an id is outside the vocabulary, or there is no token.
            ValueError: the lengths do not add up.
            CapacityError: the memory is bounded and full; no sequence has advanced.
        """
        lengths = lengths or [len(ids_T)]
        if not len(ids_T):
            raise TokenError("no tokens: give at least one token id")
        if len(lengths) != len(caches) or sum(lengths) != len(ids_T):
            raise ValueError(f"lengths {list(lengths)} do not add up to {len(ids_T)} tokens: give one for each cache")
        check_ids(ids_T, self.config.vocab_size)
        for cache, length in zip(caches, lengths, strict=True):
            cache.reserve(length)
        for block in self.layers:
            assert isinstance(block, Block)
            block.ffn.expect(ids_T)
        batch = Batch(caches, lengths, skips=skips)
        batch.watched = [] if watch else None
        batch.recorder = recorder
        ids_T = batch.pad(ids_T)
        streams_TND = self.enter(ids_T)
        turns = {ratio: self.ropes[ratio].at(batch.positions) for ratio in set(self.config.backbone_ratios)}
        for ratio, block, memory in zip(self.config.backbone_ratios, self.layers, batch.memory.layers, strict=True):
            run = partial(block, ids_T=ids_T, batch=batch, rope=self.ropes[ratio], turn_T=turns[ratio])
            streams_TND = through(run, streams_TND, batch, memory)
        for cache, length in zip(caches, lengths, strict=True):
            cache.advance(length)
        return Output(streams_TND[: batch.count], self.leave(streams_TND)[: batch.count], batch.watched or [])

    def enter(self, ids_T: Tensor) -> Tensor:
        """Embed tokens and copy them into every stream, unscaled, [T, N, D]."""
        x_TD = self.embed(ids_T).to(self.dtype)
        return x_TD.unsqueeze(1).expand(-1, self.config.hc_mult, -1)

    def leave(self, streams_TND: Tensor) -> Tensor:
        """Collapse the streams and apply the final norm, [T, D]."""
        head = self.hc_head_fn, self.hc_head_base, self.hc_head_scale
        return collapse_head(streams_TND, *head, self.norm.weight, self.config)

    def logits(self, z_TD: Tensor) -> Tensor:
        """The head, in float32 (float64 for float64): z [..., D] -> [..., V]."""
        return linear(wide(z_TD), self.head.matrix, self.head.scale)

    def draft(
        self, streams_TND: Tensor, next_ids_T: Tensor, batch: Batch, depth: int = 0
    ) -> tuple[Tensor, Tensor]:
        """One step of the MTP block.

        Args:
            streams_TND: `Output.streams_TND` at tokens i, or this block's own for a longer draft.
            next_ids_T: the tokens i + 1.
            batch: where the tokens i stand, and the trainer's recorder; the MTP block's window is advanced.
        Returns:
            z_TD, which `logits` turns into those of token i + 2, and streams_TND for the next step.
        """
        block = self.mtp[depth]
        assert isinstance(block, MTPBlock)
        check_ids(next_ids_T, self.config.vocab_size)
        ids_T = batch.pad(next_ids_T)
        embedded_TD = self.embed(ids_T).to(self.dtype)
        run = partial(
            block.predict, next_embedding_TD=embedded_TD, next_ids_T=ids_T, batch=batch, rope=self.ropes[0]
        )
        z_TD, streams_TND = through(run, batch.pad(streams_TND), batch, batch.memory.mtp[depth])
        return z_TD[: batch.count], streams_TND[: batch.count]
