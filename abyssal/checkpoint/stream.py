"""Run a release larger than memory: one block at a time, one expert at a time, from disk.

The order is layer by layer, and inside a layer chunk by chunk, so each block is read once for a pass and each
expert once for a chunk. The equations are those of `abyssal.model`; only where weights come from differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from abyssal.base.errors import InputError, TokenError
from abyssal.base.files import write_aside
from abyssal.base.progress import Progress
from abyssal.checkpoint.disk_model import DiskEmbedding, DiskExperts
from abyssal.checkpoint.expert_cache import ExpertCache, expert_bytes, staging_bytes
from abyssal.checkpoint.load import fill
from abyssal.checkpoint.release import Release
from abyssal.kernels.linear import BAND_ELEMENTS, dequantise
from abyssal.kvcache.memory import Memory
from abyssal.kvcache.sequence import SequenceCache
from abyssal.model.batch import Batch
from abyssal.model.block import Block
from abyssal.model.mhc import collapse_head
from abyssal.model.mtp import MTPBlock
from abyssal.model.rope import Rope
from abyssal.model.transformer import check_ids
from abyssal.quant.numerics import Numerics
from abyssal.quant.precision import wide, wide_dtype

BASE_BYTES = 400 * 2**20  # the interpreter with torch loaded
LARGEST_CHUNK = 2048
SLOTS = 6  # experts that are there or on their way


@dataclass(frozen=True)
class StreamPlan:
    """How a pass stays within its memory.

    Attributes:
        chunk: tokens that go through a block at once.
        need: bytes that the pass will hold at its peak, by this arithmetic.
    """

    chunk: int
    need: int


def plan_stream(release: Release, tokens: int, dtype: torch.dtype, max_memory: int | None) -> StreamPlan:
    """Choose the chunk that fits.

    Args:
        tokens: length of the pass.
        max_memory: bytes for the whole process, or None for no limit.
    Raises:
        InputError: even one chunk of 16 tokens needs more; the text names both numbers.
    """
    c = release.config
    item = 8 if dtype == torch.float64 else 4
    blocks: dict[str, int] = {}
    for spec in release.specs.values():
        if ".experts." not in spec.name and spec.name.startswith(("layers.", "mtp.")):
            key = ".".join(spec.name.split(".")[:2])
            # plain matrices are cast, FP8 stays; counting every byte twice covers both
            blocks[key] = blocks.get(key, 0) + 2 * spec.nbytes
    streams = 3 * tokens * c.hc_mult * c.hidden_size * item
    cache = tokens * c.head_dim * item // 2
    expert = 4 * c.moe_intermediate_size * c.hidden_size * item
    cached = SLOTS * expert_bytes(release) + staging_bytes(release)
    grouped = c.num_attention_heads * c.head_dim * c.o_lora_rank * item
    largest = max(expert, 2 * grouped, 2 * BAND_ELEMENTS * item)
    fixed = BASE_BYTES + max(blocks.values()) + streams + cache + cached + largest
    heads = c.num_attention_heads * c.head_dim
    per_token = item * (8 * heads + 24 * c.hidden_size + c.num_experts_per_tok * 6 * c.moe_intermediate_size)
    per_token += item * 3 * (c.index_n_heads * (c.index_head_dim + tokens // 4) if 4 in c.backbone_ratios else 0)
    chunk = LARGEST_CHUNK if max_memory is None else min((max_memory - fixed) // per_token, LARGEST_CHUNK)
    if chunk < min(tokens, 16):
        need = fixed + 16 * per_token
        assert max_memory is not None
        raise InputError(
            f"{tokens} tokens of this release need {need / 2**30:.2f} GiB layer by layer,"
            f" --max-memory allows {max_memory / 2**30:.2f} GiB: raise it or give fewer tokens"
        )
    chunk = min(chunk, tokens)
    return StreamPlan(chunk, fixed + chunk * per_token)


def stream_logits(
    folder: Path | str,
    ids: Sequence[int],
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    numerics: Numerics | None = None,
    chunks: Sequence[int] | None = None,
    mtp: bool = False,
    max_memory: int | None = None,
    silent: bool = False,
) -> StreamPlan:
    """Write the logits of a pass to a .npy file, [tokens, vocabulary] in float32 (float64 for float64).

    Args:
        folder: a release of any size.
        ids: token ids.
        out: the file.
        chunks: lengths in which the tokens pass, which must add up; by default what fits.
        mtp: write the MTP head's logits instead, [tokens - 1, vocabulary]: row i sees token i + 1.
        max_memory: bytes for the whole process.
    Raises:
        ConfigError, CheckpointError, TokenError, InputError: bad input; nothing is written.
        SaveError: the file cannot be written.
    """
    release = Release(folder)
    c = release.config
    numerics = numerics or Numerics()
    ids_T = torch.tensor(list(ids), dtype=torch.long)
    if not len(ids_T):
        raise TokenError("no tokens: give at least one token id")
    check_ids(ids_T, c.vocab_size)
    if len(ids_T) > c.max_position_embeddings:
        raise TokenError(f"{len(ids_T)} tokens exceed the context of {c.max_position_embeddings}: give fewer")
    if mtp and (c.dspark or not c.num_nextn_predict_layers):
        raise InputError("this release has no MTP block: leave out --mtp")
    if mtp and len(ids_T) < 2:
        raise TokenError("the MTP block reads the token after each one: give at least two token ids")
    plan = plan_stream(release, len(ids_T), dtype, max_memory)
    lengths = _lengths(len(ids_T), chunks, plan.chunk)
    with torch.inference_mode(), write_aside(out) as aside:
        stream = _Stream(release, dtype, numerics, silent)
        streams_TND = stream.backbone(ids_T, lengths)
        z_TD = stream.draft(streams_TND, ids_T, lengths) if mtp else stream.collapse(streams_TND)
        del streams_TND
        stream.head(z_TD, aside)
    return plan


def _lengths(tokens: int, chunks: Sequence[int] | None, chunk: int) -> list[int]:
    """Lengths of the passes; given ones are cut further where they exceed what fits."""
    given = list(chunks) if chunks is not None else [tokens]
    if sum(given) != tokens or min(given) < 1:
        raise InputError(f"chunks {given} do not add up to {tokens} tokens: give positive lengths that do")
    lengths: list[int] = []
    for length in given:
        lengths += [chunk] * (length // chunk) + ([length % chunk] if length % chunk else [])
    return lengths


class _Stream:
    def __init__(self, release: Release, dtype: torch.dtype, numerics: Numerics, silent: bool):
        self.release, self.dtype, self.numerics, self.silent = release, dtype, numerics, silent
        self.c = release.config
        self.experts = ExpertCache(release, SLOTS, dtype)
        self.embed = DiskEmbedding(self.c, release)
        # arrays are handed out as they are touched, and given back layer by layer
        self.cache = SequenceCache(Memory(self.c, numerics, dtype=dtype))

    def _block(self, block: Block, prefix: str) -> Block:
        block.ffn.experts = DiskExperts(self.c, self.numerics, self.experts, f"{prefix}ffn.experts.")
        fill(block, prefix, self.release, self.dtype, keep_stored=True)
        return block.eval()

    def backbone(self, ids_T: Tensor, lengths: list[int]) -> Tensor:
        streams_TND = self.embed(ids_T).to(self.dtype).unsqueeze(1).repeat(1, self.c.hc_mult, 1)
        memory = self.cache.memory
        self.cache.reserve(len(ids_T))
        with Progress(self.c.num_hidden_layers, "layers", "streaming", silent=self.silent) as progress:
            for i, ratio in enumerate(self.c.backbone_ratios):
                with torch.device("meta"):
                    block = Block(self.c, ratio, i < self.c.num_hash_layers, self.numerics)
                self._block(block, f"layers.{i}.")
                rope = Rope(self.c, ratio, self.dtype)
                first = 0
                for length in lengths:
                    rows = slice(first, first + length)
                    batch = Batch([self.cache], [length], [first])
                    turn = rope.at(batch.positions)
                    streams, ids = batch.pad(streams_TND[rows]), batch.pad(ids_T[rows])
                    streams_TND[rows] = block(streams, ids, batch, memory.layers[i], rope, turn)[:length]
                    first += length
                memory.clear_layer(i)
                progress.advance()
        return streams_TND

    def _plain(self, name: str) -> Tensor:
        return self.release.shards.read(name).to(wide_dtype(self.dtype))

    def collapse(self, streams_TND: Tensor) -> Tensor:
        fn, base, scale = (self._plain(f"hc_head_{part}") for part in ("fn", "base", "scale"))
        return collapse_head(streams_TND, fn, base, scale, self._plain("norm.weight"), self.c)

    def draft(self, streams_TND: Tensor, ids_T: Tensor, lengths: list[int]) -> Tensor:
        with torch.device("meta"):
            block = MTPBlock(self.c, self.numerics)
        self._block(block, "mtp.0.")
        rope = Rope(self.c, 0, self.dtype)
        parts, first = [], 0
        for length in lengths:
            last = min(first + length, len(ids_T) - 1)
            if last > first:
                batch = Batch([self.cache], [last - first], [first])
                following = batch.pad(ids_T[first + 1 : last + 1])
                states = batch.pad(streams_TND[first:last])
                memory = self.cache.memory.mtp[0]
                embedded = self.embed(following).to(self.dtype)
                z, _ = block.predict(states, embedded, following, batch, memory, rope)
                parts.append(z[: last - first])
            first += length
        return torch.cat(parts)

    def head(self, z_TD: Tensor, path: Path) -> None:
        z = wide(z_TD)
        kind = np.float64 if self.dtype == torch.float64 else np.float32
        shape = (len(z), self.c.vocab_size)
        written = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
        band = max(BAND_ELEMENTS // self.c.hidden_size, 1)
        for first in range(0, self.c.vocab_size, band):
            last = min(first + band, self.c.vocab_size)
            rows = dequantise(self.release.shards.read_rows("head.weight", first, last), None, z.dtype)
            written[:, first:last] = (z @ rows.T).numpy()
        written.flush()
