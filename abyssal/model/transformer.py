"""The whole model: embedding, blocks, head (architecture.md 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from abyssal.arch.config import ModelConfig
from abyssal.base.errors import TokenError
from abyssal.kernels.linear import linear
from abyssal.kvcache.sequence import SequenceCache
from abyssal.model.block import Block
from abyssal.model.linear import Linear
from abyssal.model.mhc import collapse_head, head_parameters
from abyssal.model.mtp import MTPBlock
from abyssal.model.norm import RMSNorm
from abyssal.model.rope import Rope
from abyssal.model.span import Span, spans_of
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
    """

    streams_TND: Tensor
    z_TD: Tensor


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

    def new_cache(self, batch: int = 1) -> SequenceCache:
        """The state of `batch` new sequences in lockstep."""
        return SequenceCache(
            self.config, self.numerics, batch=batch, dtype=self.dtype, device=self.head.weight.device
        )

    def forward(self, ids_BS: Tensor, cache: SequenceCache | None = None) -> Tensor:
        """Logits of sequences in lockstep.

        Args:
            ids_BS: token ids.
            cache: their state, advanced by S tokens; None starts and forgets new sequences.
        Returns:
            logits_BSV in float32 (float64 for a float64 model).
        Raises:
            TokenError: an id is outside the vocabulary.
        """
        cache = cache or self.new_cache(ids_BS.shape[0])
        return self.logits(self.run(ids_BS.flatten(), [cache]).z_TD).unflatten(0, ids_BS.shape)

    def run(self, ids_T: Tensor, caches: Sequence[SequenceCache], lengths: Sequence[int] | None = None) -> Output:
        """One pass over packed tokens of sequences of any lengths, each at its own position.

        Args:
            ids_T: tokens of all sequences, one sequence after another.
            caches: the state of each group of sequences in lockstep; advanced.
            lengths: tokens of each group's sequences; needed when there is more than one group.
        Raises:
            TokenError: an id is outside the vocabulary, or there is no token.
            ValueError: the lengths do not add up.
        """
        lengths = lengths or [len(ids_T) // caches[0].batch]
        if not len(ids_T):
            raise TokenError("no tokens: give at least one token id")
        if sum(c.batch * n for c, n in zip(caches, lengths, strict=True)) != len(ids_T):
            raise ValueError(f"lengths {list(lengths)} do not add up to {len(ids_T)} tokens: give one for each cache")
        check_ids(ids_T, self.config.vocab_size)
        spans = spans_of([(c.batch, n, c.position) for c, n in zip(caches, lengths, strict=True)])
        streams_TND = self.enter(ids_T)
        turns = {ratio: self.ropes[ratio].over(spans, ids_T.device) for ratio in set(self.config.backbone_ratios)}
        for i, (ratio, block) in enumerate(zip(self.config.backbone_ratios, self.layers, strict=True)):
            states = [c.layers[i] for c in caches]
            streams_TND = block(streams_TND, ids_T, spans, states, self.ropes[ratio], turns[ratio])
        for cache, length in zip(caches, lengths, strict=True):
            cache.position += length
        return Output(streams_TND, self.leave(streams_TND))

    def enter(self, ids_T: Tensor) -> Tensor:
        """Embed tokens and copy them into every stream, unscaled, [T, N, D]."""
        x_TD = self.embed(ids_T).to(self.dtype)
        return x_TD.unsqueeze(1).expand(-1, self.config.hc_mult, -1)

    def leave(self, streams_TND: Tensor) -> Tensor:
        """Collapse the streams and apply the final norm, [T, D]."""
        z_TD = collapse_head(streams_TND, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.config)
        return self.norm(z_TD)

    def logits(self, z_TD: Tensor) -> Tensor:
        """The head, in float32 (float64 for float64): z [..., D] -> [..., V]."""
        return linear(wide(z_TD), self.head.weight, self.head.scale)

    def mtp_logits(
        self,
        streams_TND: Tensor,
        next_ids_T: Tensor,
        spans: Sequence[Span],
        caches: Sequence[SequenceCache],
        depth: int = 0,
    ) -> Tensor:
        """Logits of the token after the next, from the streams at i and the id at i + 1.

        Args:
            streams_TND: `Output.streams_TND` of the tokens.
            next_ids_T: the token that follows each of them.
            spans: where the sequences stand, positions included.
            caches: their states; the MTP block's window is advanced.
        Returns:
            logits_TV.
        """
        block = self.mtp[depth]
        assert isinstance(block, MTPBlock)
        check_ids(next_ids_T, self.config.vocab_size)
        embedded = self.embed(next_ids_T).to(self.dtype)
        states = [c.mtp[depth] for c in caches]
        z_TD, _ = block.predict(streams_TND, embedded, next_ids_T, spans, states, self.ropes[0])
        return self.logits(z_TD)
