"""A model whose routed experts and embedding stay on disk, for releases larger than memory.

Everything else is held as stored, packed. The bits are those of the same release in memory: an expert is the same
product wherever it comes from, and a token adds its experts in rising order, whichever arrived first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from abyssal.arch.config import ModelConfig
from abyssal.arch.tensors import TensorSpec, is_draft_copy
from abyssal.base.errors import InputError
from abyssal.base.machine import resident_bytes
from abyssal.checkpoint.expert_cache import ExpertCache, Key, expert_bytes, staging_bytes
from abyssal.checkpoint.load import fill
from abyssal.checkpoint.release import Release
from abyssal.kernels.choice import native
from abyssal.kernels.linear import BAND_ELEMENTS, linear_by_rows
from abyssal.kernels.rounding import fake_fp8
from abyssal.kvcache.memory import Memory
from abyssal.model.linear import ACTIVATION_BLOCK
from abyssal.model.moe import EXPERT_WEIGHTS, Experts
from abyssal.model.transformer import Embedding, Transformer
from abyssal.quant.numerics import Numerics
from abyssal.quant.precision import wide

MOST_TOKENS, FEWEST_TOKENS = 1024, 16  # of a pass
MOST_SEQUENCES = 64
ROWS_OF_LOGITS = 64  # that the engine holds at once
SPARE = 96 << 20  # what torch, the allocator and threads take beyond what is counted here


class DiskExperts(Experts):
    """The routed experts of one layer, read through a cache when a token chose them."""

    on_disk = True

    def __init__(self, config: ModelConfig, numerics: Numerics, cache: ExpertCache, prefix: str):
        with torch.device("meta"):
            super().__init__(config, numerics)
        self._cache = cache
        self._prefix = prefix
        self._slots: dict[int, int] = {}
        # nothing to fill: a real but empty weight tells `fill` so
        for part in EXPERT_WEIGHTS:
            setattr(self, part, nn.Parameter(torch.empty(0), requires_grad=False))

    def expert(self, number: int, name: str) -> tuple[Tensor, Tensor | None]:
        """The stored weight of an expert that has arrived, and its scale."""
        weight, scale = self._cache.stored[name]
        slot = self._slots[number]
        return weight[slot], None if scale is None else scale[slot]

    def expect(self, chosen_TK: Tensor) -> None:
        """Begin to read them."""
        self._cache.expect(self._keys(chosen_TK.unique().tolist()))

    def _keys(self, numbers: Iterable[int]) -> list[Key]:
        return [(self._prefix, number) for number in numbers]

    def forward(self, x_TD: Tensor, weights_TK: Tensor, chosen_TK: Tensor, count: int) -> Tensor:
        """Weighted sum of each token's experts; they are computed as they arrive, and added in rising order."""
        if self.numerics.activations:
            x_TD = fake_fp8(x_TD, ACTIVATION_BLOCK)
        x_TD, weights_TK, chosen_TK = x_TD[:count], weights_TK[:count], chosen_TK[:count]
        by_expert = chosen_TK.flatten().sort(stable=True)
        rows = by_expert.indices // chosen_TK.shape[1]
        gains = weights_TK.flatten()[by_expert.indices]
        numbers, sizes = by_expert.values.unique_consecutive(return_counts=True)
        spans, first = {}, 0
        for key, size in zip(self._keys(numbers.tolist()), sizes.tolist(), strict=True):
            spans[key] = range(first, first + size)
            first += size
        parts = wide(x_TD).new_empty(len(rows), x_TD.shape[1])
        while spans:
            there = self._cache.arrived(spans)
            some = {key: spans.pop(key) for key in there}
            self._cache.expect(spans)  # read while these are computed
            self._compute(there, some, x_TD, rows, gains, parts)
            self._cache.done(there)
        total = parts.new_zeros(count, x_TD.shape[1])
        for place in rows.sort(stable=True).indices.view(chosen_TK.shape).T:  # a token's parts, rising by expert
            total = total + parts[place]
        return total

    def _compute(
        self, slots: dict[Key, int], spans: dict[Key, range], x_TD: Tensor, rows: Tensor, gains: Tensor, parts: Tensor
    ) -> None:
        """Write the parts of these experts."""
        if not self._cache.packed:
            self._slots = {number: slot for (_, number), slot in slots.items()}
            for (_, number), span in spans.items():
                part = slice(span.start, span.stop)
                parts[part] = self._one(number, x_TD[rows[part]], gains[part])
            return
        order = sorted(slots, key=slots.__getitem__)
        places = torch.tensor([place for key in order for place in spans[key]])
        counts_S = torch.zeros(self._cache.slots, dtype=torch.int64)
        counts_S[[slots[key] for key in order]] = torch.tensor([len(spans[key]) for key in order])
        x, packed = x_TD[rows[places]], self._cache.packed
        up, gate = (linear_by_rows(x, packed[name], counts_S) for name in ("w3", "w1"))
        a = self._activate(gate, up, gains[places], x.dtype)
        parts[places] = wide(linear_by_rows(a, packed["w2"], counts_S))


class DiskEmbedding(Embedding):
    """The embedding, of which only the rows of the given tokens are read."""

    def __init__(self, config: ModelConfig, release: Release):
        with torch.device("meta"):
            super().__init__(config)
        del self.weight  # nothing to fill
        self._shards = release.shards

    def forward(self, ids_T: Tensor) -> Tensor:
        """ids [T] -> [T, D] as stored."""
        ids, places = ids_T.unique(return_inverse=True)
        return torch.cat([self._shards.read_rows("embed.weight", i, i + 1) for i in ids.tolist()])[places]


@dataclass(frozen=True)
class DiskPlan:
    """How a model on disk stays within its memory; bytes.

    Attributes:
        resident: weights that are held.
        fixed: all but the experts' cache.
        slots: experts that are cached.
        cache: for the pages and slots of sequences.
        sequences: that may run at once.
        tokens: of a pass.
    """

    resident: int
    fixed: int
    slots: int
    cache: int
    sequences: int
    tokens: int


def plan_disk(release: Release, numerics: Numerics, max_memory: int, cache: int | None = None) -> DiskPlan:
    """Divide the memory of the process.

    Args:
        max_memory: bytes for the whole process, with what it holds already.
        cache: bytes for the sequences' memory; by default a 32nd, or what one sequence needs at least.
    Raises:
        InputError: what is held beside the experts leaves no room for those of one token; names both numbers.
    """
    c = release.config
    memory = Memory(c, numerics, dtype=torch.float32, pages=0, slots=0)
    least = memory.slot_bytes + 8 * memory.page_bytes
    cache = max(max_memory // 32, least) if cache is None else cache
    held = [spec for spec in release.specs.values() if _is_held(spec, release)]
    resident = sum(map(_held_bytes, held))
    band = 0 if native() is not None else 2 * 4 * BAND_ELEMENTS
    base = resident_bytes() + SPARE + resident + staging_bytes(release) + band
    heads = c.num_attention_heads * c.head_dim
    per_expert = 2 * c.hidden_size + 4 * c.moe_intermediate_size
    per_token = 4 * (6 * heads + 24 * c.hidden_size + c.num_experts_per_tok * per_expert)
    row = 12 * c.vocab_size  # of logits, in float32 and float64
    tokens = max(min(max_memory // 32 // per_token, MOST_TOKENS), FEWEST_TOKENS)
    sequences = max(min(cache // 2 // max(memory.slot_bytes, 1), MOST_SEQUENCES), 1)
    fixed = base + cache + tokens * per_token + max(min(tokens, ROWS_OF_LOGITS), sequences) * row
    expert = expert_bytes(release)
    slots = (max_memory - fixed) // expert
    if slots < c.num_experts_per_tok:
        need = fixed + c.num_experts_per_tok * expert
        raise InputError(
            f"this release needs {need / 2**30:.2f} GiB with the experts of one token, of which {resident / 2**30:.2f}"
            f" GiB are weights that are always held; --max-memory allows {max_memory / 2**30:.2f} GiB: raise it,"
            " or use `abyssal logits --max-memory`, which reads them layer by layer"
        )
    routed = c.n_routed_experts * (c.num_hidden_layers + (0 if c.dspark else c.num_nextn_predict_layers))
    return DiskPlan(resident, fixed, min(slots, routed), cache, sequences, tokens)


def _is_held(spec: TensorSpec, release: Release) -> bool:
    if ".ffn.experts." in spec.name or spec.name == "embed.weight" or is_draft_copy(spec.name):
        return False
    return release.config.dspark is None or not spec.name.startswith("mtp.")


def _held_bytes(spec: TensorSpec) -> int:
    """Scales are kept as stored and as float32, vectors as float32, matrices as they are."""
    if spec.name.endswith(".scale"):
        return 5 * spec.nbytes
    return spec.nbytes * (1 if len(spec.shape) > 1 else 2)


def load_from_disk(
    release: Release, slots: int, *, dtype: torch.dtype = torch.float32, numerics: Numerics | None = None
) -> tuple[Transformer, ExpertCache]:
    """A model that reads its routed experts when they are chosen, and the cache that holds some of them.

    Args:
        slots: experts that the cache holds, of all layers together.
        dtype: of activations.
        numerics: which roundings are simulated.
    Raises:
        CheckpointError: the release is wrong, or its experts are stored in several types.
    """
    cache = ExpertCache(release, slots, dtype)
    with torch.device("meta"):
        model = Transformer(release.config, numerics=numerics, dtype=dtype)
    model.embed = DiskEmbedding(release.config, release)
    for prefix, blocks in (("layers", model.layers), ("mtp", model.mtp)):
        for i, block in enumerate(blocks):
            experts = DiskExperts(release.config, model.numerics, cache, f"{prefix}.{i}.ffn.experts.")
            block.ffn.experts = experts  # type: ignore[union-attr]
    fill(model, "", release, dtype, keep_stored=True, pack=True)
    return model.eval(), cache
