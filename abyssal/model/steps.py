"""Sublayers as one native call each: what a block hands to the kernels, in place of a call for each operation.

The calls run the kernels that `Attention`, `MoE` and `Site` name, in their order, from streams to streams, and give
the bits that these give one by one. They take float32 without gradients; else the modules themselves run.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from abyssal.arch.config import ModelConfig
from abyssal.kernels.choice import native
from abyssal.kernels.packed import Packed, format_of, stored_weight
from abyssal.kernels.streams import MOST_STREAMS
from abyssal.kvcache.memory import CompressedMemory, LayerMemory
from abyssal.model.attention import Attention
from abyssal.model.batch import Batch
from abyssal.model.compressor import Compressor
from abyssal.model.linear import ACTIVATION_BLOCK, GroupedLinear, Linear, PackedModule
from abyssal.model.moe import Experts, MoE
from abyssal.model.norm import RMSNorm
from abyssal.model.rope import Rope


class Block(Protocol):
    """What the steps need of `abyssal.model.block.Block`; its sites' parameters are found by their names."""

    config: ModelConfig
    ratio: int
    attn: Attention
    attn_norm: RMSNorm
    ffn: MoE
    ffn_norm: RMSNorm

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""

    def modules(self) -> Iterator[nn.Module]:
        """All modules inside, and itself."""


class _UnfitError(Exception):
    """A weight that the kernels do not read."""


def _handle(fast: ModuleType, weight: Packed | tuple[Tensor | None, Tensor | None]) -> Any:
    if isinstance(weight, Packed):
        return weight.handle
    stored, scale = weight
    if stored is None or format_of(stored, scale) is None:
        raise _UnfitError
    return stored_weight(fast, stored, scale)


def _of(fast: ModuleType, linear: Linear) -> Any:
    """The handle of a linear layer's weight."""
    packed = linear.packed.get("weight")
    if packed is None and isinstance(linear, GroupedLinear):
        return _handle(fast, linear.by_group())
    return _handle(fast, packed or (linear.weight, linear.scale))


def _plain(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
        raise _UnfitError
    return tensor.detach()


def _site(block: Block, name: str) -> tuple[Any, ...]:
    c = block.config
    if c.hc_mult > MOST_STREAMS:
        raise _UnfitError
    parts = (getattr(block, f"hc_{name}_{part}") for part in ("fn", "base", "scale"))
    norm = block.attn_norm if name == "attn" else block.ffn_norm
    return *map(_plain, parts), _plain(norm.weight), norm.eps, c.hc_eps, c.hc_sinkhorn_iters


def _compressor(fast: ModuleType, compressor: Compressor) -> tuple[Any, ...]:
    return (
        _of(fast, compressor.wkv),
        _of(fast, compressor.wgate),
        _plain(compressor.ape),
        _plain(compressor.norm.weight),
    )


def _attention_of(fast: ModuleType, block: Block) -> Any:
    c, a = block.config, block.attn
    R, J = c.qk_rope_head_dim, c.index_head_dim
    index = None
    if a.indexer is not None:
        exact = a.indexer.numerics.index == "exact"
        if J < R or (not exact and J & (J - 1)):
            raise _UnfitError
        index = (
            _of(fast, a.indexer.wq_b),
            _of(fast, a.indexer.weights_proj),
            _compressor(fast, a.indexer.compressor),
            a.indexer.factor,
            exact,
        )
    return fast.AttentionStep(
        site=_site(block, "attn"),
        q=(_of(fast, a.wq_a), _plain(a.q_norm.weight), _of(fast, a.wq_b)),
        kv=(_of(fast, a.wkv), _plain(a.kv_norm.weight)),
        sink=_plain(a.attn_sink),
        out=(_of(fast, a.wo_a), _of(fast, a.wo_b)),
        rotated=R,
        window=c.sliding_window,
        softmax_scale=c.head_dim**-0.5,
        block=ACTIVATION_BLOCK if a.wq_a.numerics.activations else 0,
        exact=a.wq_a.numerics.entries == "exact",
        compressor=None if a.compressor is None else _compressor(fast, a.compressor),
        index=index,
    )


def _moe_of(fast: ModuleType, block: Block) -> Any:
    c, moe = block.config, block.ffn
    bias = moe.gate.bias
    return fast.MoeStep(
        site=_site(block, "ffn"),
        gate=_of(fast, moe.gate),
        bias=None if bias is None else _plain(bias),
        table=moe.gate.tid2eid,
        k=c.num_experts_per_tok,
        scale=c.routed_scaling_factor,
        routed=tuple(_handle(fast, weight) for weight in moe.experts.stacked()),
        shared=tuple(_handle(fast, weight) for weight in moe.shared_experts.three()),
        limit=moe.shared_experts.limit,
        block=ACTIVATION_BLOCK if moe.experts.numerics.activations else 0,
    )


def _cache(memory: CompressedMemory | None) -> tuple[Any, ...] | None:
    if memory is None:
        return None
    return memory.values.data, memory.logits.data, memory.values.size, memory.entries, memory.per_page


class Steps:
    """The native calls of a block; kept while its weights stay packed, else made anew for each pass."""

    def __init__(self, block: Block):
        self._block = block
        self._made_at = -1
        self._attention: Any = None
        self._moe: Any = None

    def __reduce__(self) -> Any:
        return Steps, (self._block,)

    def _make(self, fast: ModuleType) -> None:
        if self._made_at == PackedModule.changes:
            return
        found = []
        for make in (_attention_of, _moe_of):
            try:
                found.append(make(fast, self._block))
            except _UnfitError:
                found.append(None)
        self._attention, self._moe = found
        self._made_at = PackedModule.changes if self._is_packed() else -1

    def _is_packed(self) -> bool:
        return all(
            getattr(module, name) is None
            for module in self._block.modules()
            if isinstance(module, PackedModule) and not (isinstance(module, Experts) and module.on_disk)
            for name, _ in module.pairs
        )

    def _native(self, streams_TND: Tensor) -> ModuleType | None:
        fast = native()
        if fast is None or streams_TND.dtype != torch.float32 or not streams_TND.is_cpu:
            return None
        if torch.is_grad_enabled() and (
            streams_TND.requires_grad or any(p.requires_grad for p in self._block.parameters())
        ):
            return None
        self._make(fast)
        return fast

    def attention(
        self, streams_TND: Tensor, batch: Batch, memory: LayerMemory, rope: Rope, turn_T: Tensor
    ) -> Tensor | None:
        """The streams behind the attention sublayer, or None where its modules have to run; see `Block.forward`."""
        if self._native(streams_TND) is None or self._attention is None:
            return None
        ratio, k = self._block.ratio, self._block.config.index_topk
        far: tuple[Any, ...] = (None,) * 6
        chosen = None
        if ratio:
            index = memory.index
            if index is not None and batch.most_visible(ratio) > k:
                chosen = torch.empty((batch.count, k), dtype=torch.long)
            far = (
                _cache(memory.compressed),
                _cache(index),
                batch.block_turns(ratio, rope),
                None if chosen is None else batch.firsts,
                None if chosen is None else batch.visible_Q(ratio),
                chosen,
            )
        out_TND = torch.empty_like(streams_TND, memory_format=torch.contiguous_format)
        ring = memory.window
        near = batch.spans_G6, ring.data, ring.size, batch.table_GP
        self._attention(streams_TND.contiguous(), turn_T, *near, *far, out_TND)
        if memory.index is not None:
            batch.note(ratio, chosen)
        return out_TND

    def moe(self, streams_TND: Tensor, ids_T: Tensor) -> Tensor | None:
        """The streams behind the MoE sublayer, or None where its modules have to run."""
        if self._native(streams_TND) is None or self._moe is None:
            return None
        out_TND = torch.empty_like(streams_TND, memory_format=torch.contiguous_format)
        self._moe(streams_TND.contiguous(), ids_T, out_TND)
        return out_TND
