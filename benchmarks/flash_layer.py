"""One real-shaped Flash layer of each kind over a cache of 1M tokens, and the tokens/s that their sum would give.

    python benchmarks/flash_layer.py [--kinds swa csa hca head] [--out benchmarks/results/flash_layer.json]

The weights are synthetic, in the formats of the release, packed, with all 256 experts in memory; the cache is filled
with synthetic entries. Layers run one after another in memory, through `Block`, as `Transformer.run` calls it. Every
token has another input, so that it chooses other experts, other blocks, and nothing waits in a cache.

- decode: seconds of a token, the bytes that it needs, and the time that reading these bytes takes at the rate that the
  kernel `read` reaches in the same run; both sides alternate and the fastest of each counts. A layer that completes
  a block does more; the mean weighs these tokens by their share.
- prefill: tokens a second of whole prompts of 512 and 2,048 tokens.
- sum: all layers of Flash and the head, as if they lay in memory together.

What this does not show: a machine that cannot hold 150 GB of weights, or the quality of answers.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from abyssal.arch.config import ModelConfig
from abyssal.arch.presets import preset
from abyssal.arch.tensors import TensorSpec, inventory
from abyssal.base.files import write_json
from abyssal.base.machine import this_machine
from abyssal.checkpoint.load import fill
from abyssal.checkpoint.release import Release
from abyssal.kernels.choice import choice, native
from abyssal.kvcache import Memory, SequenceCache
from abyssal.kvcache.memory import LayerMemory
from abyssal.model import Batch
from abyssal.model.block import Block
from abyssal.model.linear import PackedModule
from abyssal.model.rope import Rope
from abyssal.model.transformer import Transformer
from abyssal.quant.fp8 import quantise_fp8
from abyssal.quant.numerics import Numerics

CONTEXT = 1_000_000
READ_BYTES = 1 << 29
RATIOS = {"swa": 0, "csa": 4, "hca": 128}
Row = dict[str, Any]


class Synthetic:
    """Stands for a release: tensors in its formats, with values of the size that a trained model has."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.specs = {spec.name: spec for spec in inventory(config)}
        self.shards = self

    def read(self, name: str) -> Tensor:
        """A plain tensor."""
        return self.stored(name)[0]

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A weight and its scale, or a plain tensor and None."""
        spec = self.specs[name]
        if spec.format == "fp8":
            return quantise_fp8(torch.randn(spec.shape) * spec.shape[1] ** -0.5)
        if spec.format == "fp4":
            return self._fp4(spec)
        if spec.dtype == "I64":
            return torch.rand(spec.shape[0], self.config.n_routed_experts).topk(spec.shape[1]).indices, None
        if len(spec.shape) == 2:
            return (torch.randn(spec.shape) * spec.shape[1] ** -0.5).bfloat16().to(_PLAIN[spec.dtype]), None
        return torch.ones(spec.shape, dtype=_PLAIN[spec.dtype]), None

    def _fp4(self, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        rows, columns = spec.shape
        codes = torch.empty(rows * columns // 8, dtype=torch.int64).random_().view(torch.int8).view(rows, columns)
        # random codes have a size of 2.7; powers of two on both sides of what makes outputs as large as inputs
        power = round(-torch.tensor(2.0 * columns).log2().item() / 2 - 1.4)
        scales = torch.randint(126 + power, 129 + power, (rows, columns // 16), dtype=torch.uint8)
        return codes, scales.view(torch.float8_e8m0fnu)


_PLAIN = {"BF16": torch.bfloat16, "F32": torch.float32}


@dataclass
class Stage:
    """A layer in memory, and the memory that it reads.

    Attributes:
        config: of a model of this layer alone.
        kind: swa, csa or hca.
    """

    config: ModelConfig
    kind: str
    block: Block
    rope: Rope
    memory: Memory

    @property
    def layer(self) -> LayerMemory:
        """The layer's arrays."""
        return self.memory.layers[0]

    def run(self, streams_TND: Tensor, ids_T: Tensor, batch: Batch) -> Tensor:
        """The layer, as `Transformer.run` calls it."""
        turn = self.rope.at(batch.positions)
        return cast(Tensor, self.block(streams_TND, batch.pad(ids_T), batch, self.layer, self.rope, turn))


def build(kind: str, pages: int) -> Stage:
    """A layer of this kind with synthetic weights, packed."""
    flash, ratio = preset("flash"), RATIOS[kind]
    hashed = kind == "swa"  # Flash's two window layers are among the first three, which choose experts by token
    config = replace(flash, num_hidden_layers=1, compress_ratios=(ratio, 0), num_hash_layers=int(hashed))
    numerics = Numerics.of("packed")
    with torch.device("meta"):
        block = Block(config, ratio, hashed, numerics)
    fill(block, "layers.0.", cast(Release, Synthetic(config)), torch.float32, True)
    pack(block)
    memory = Memory(config, numerics, pages=pages, slots=2)
    for ring in memory.layers[0].rings():
        _fill(ring.data, memory.layers[0].codec)
    for compressed in memory.compressors():
        _fill(compressed.entries[1:], compressed.codec)
    return Stage(config, kind, block.eval(), Rope(config, ratio, torch.float32), memory)


def pack(module: nn.Module) -> None:
    """As `Transformer.pack`."""
    for part in module.modules():
        if isinstance(part, PackedModule):
            part.pack()


def _fill(rows: Tensor, codec: Any) -> None:
    """Entries that decode to ordinary values."""
    if rows.dtype != torch.uint8:
        rows.normal_()
        return
    for part in rows.split(65536):
        part.copy_(codec.encode(torch.randn(4096, codec.dim))[torch.randint(4096, (len(part),))])


def packed_bytes(module: nn.Module) -> int:
    """Bytes of all weights of a module, packed or not."""
    weights = [w for m in module.modules() if isinstance(m, PackedModule) for w in m.packed.values()]
    return sum(w.nbytes for w in weights) + sum(p.numel() * p.element_size() for p in module.parameters())


def bytes_of(stage: Stage, position: int) -> dict[str, int]:
    """Bytes that a token at this position needs, by what they are."""
    c, block, layer = stage.config, stage.block, stage.layer
    experts = packed_bytes(block.ffn.experts)
    chosen = experts // c.n_routed_experts * c.num_experts_per_tok
    table = {
        "attention weights": packed_bytes(block.attn),
        "chosen experts": chosen,
        "other weights": packed_bytes(block) - packed_bytes(block.attn) - experts,
        "window": c.sliding_window * layer.codec.width,
    }
    if layer.compressed is not None:
        blocks = (position + 1) // layer.compressed.ratio
        read = blocks if layer.index is None else min(c.index_topk, blocks)
        table["entries"] = read * layer.compressed.entries.shape[1]
        if layer.index is not None:
            table["index keys"] = blocks * layer.index.entries.shape[1]
    return table


def inputs(config: ModelConfig, tokens: int, padded: int) -> tuple[Tensor, Tensor]:
    """Streams and ids that no token had before."""
    return torch.randn(padded, config.hc_mult, config.hidden_size), torch.randint(2, config.vocab_size, (tokens,))


def reading(memory: Tensor) -> float:
    """Seconds to read a byte."""
    module = native()
    assert module is not None
    begin = time.perf_counter()
    module.read(memory)
    return (time.perf_counter() - begin) / len(memory)


def decode(stage: Stage, context: int, repeat: int, memory: Tensor) -> Row:
    """Single tokens at the end of a context."""
    ratio = stage.layer.compressed.ratio if stage.layer.compressed is not None else 1
    cache = at(stage.memory, context)
    once: list[float] = []
    plain: list[float] = []
    complete: list[float] = []
    read: list[float] = []
    for turn in range(repeat):
        # every other token completes a block
        cache.position = context - (1 if turn % 2 else 2)
        begin = time.perf_counter()
        batch = Batch([cache], [1])
        x, ids = inputs(stage.config, 1, batch.padded)
        made = time.perf_counter()
        stage.run(x, ids, batch)
        first = time.perf_counter() - made
        # what all layers of a kind share is there now
        x, ids = inputs(stage.config, 1, batch.padded)
        begin_layer = time.perf_counter()
        y = stage.run(x, ids, batch)
        took = time.perf_counter() - begin_layer
        assert bool(y[:1].isfinite().all())
        once.append(made - begin + max(first - took, 0.0))
        (complete if turn % 2 else plain).append(took)
        read.append(reading(memory))
    cache.release()
    seconds = (min(plain) * (ratio - 1) + min(complete)) / ratio
    table = bytes_of(stage, context - 1)
    least = sum(table.values()) * min(read)
    return {
        "op": "decode", "kind": stage.kind, "context": context, "seconds": seconds, "seconds_plain": min(plain),
        "seconds_completing": min(complete), "seconds_once_a_pass": min(once), "bytes": table,
        "total_bytes": sum(table.values()), "read_bytes_per_s": 1 / min(read), "least_seconds": least,
        "of_bandwidth": least / seconds, "times_the_limit": seconds / least,
    }  # fmt: skip


def at(memory: Memory, position: int) -> SequenceCache:
    """A sequence that stands at a position, over synthetic entries."""
    cache = SequenceCache(memory)
    cache.extend(memory.pages_for(position + 64))
    cache.position = cache._highest = position
    return cache


def prefill(stage: Stage, tokens: int, repeat: int) -> Row:
    """A whole prompt in one pass."""
    times = []
    for _ in range(repeat):
        cache = SequenceCache(stage.memory)
        cache.reserve(tokens)
        x, ids = inputs(stage.config, tokens, tokens)
        begin = time.perf_counter()
        stage.run(x, ids, Batch([cache], [tokens]))
        times.append(time.perf_counter() - begin)
        cache.release()
    return {"op": "prefill", "kind": stage.kind, "tokens": tokens, "seconds": min(times)}


def head(repeat: int, memory: Tensor) -> Row:
    """The last collapse, the norm and the logits of one token."""
    config = replace(preset("flash"), num_hidden_layers=1, compress_ratios=(0, 0), num_hash_layers=0)
    with torch.device("meta"):
        model = Transformer(config)
    # a token needs a row of the embedding, and the layers are measured for themselves
    model.embed, model.layers, model.mtp = nn.Identity(), nn.ModuleList(), nn.ModuleList()  # type: ignore[assignment]
    fill(model, "", cast(Release, Synthetic(config)), torch.float32, True)
    model.pack()
    times, read = [], []
    for _ in range(repeat):
        x, _ = inputs(config, 1, 1)
        begin = time.perf_counter()
        model.logits(model.leave(x))
        times.append(time.perf_counter() - begin)
        read.append(reading(memory))
    size = packed_bytes(model)
    return {
        "op": "decode", "kind": "head", "seconds": min(times), "total_bytes": size, "read_bytes_per_s": 1 / min(read),
        "least_seconds": size * min(read), "of_bandwidth": size * min(read) / min(times),
        "times_the_limit": min(times) / size / min(read),
    }  # fmt: skip


def show(row: Row) -> None:
    if row["op"] == "prefill":
        print(f"{row['kind']:4s} prefill {row['tokens']:5d} tokens {1e3 * row['seconds']:9.1f} ms", flush=True)
        return
    print(
        f"{row['kind']:4s} decode  {1e3 * row['seconds']:7.2f} ms  {row['total_bytes'] / 1e6:7.1f} MB"
        f"  limit {1e3 * row['least_seconds']:6.2f} ms at {row['read_bytes_per_s'] / 1e9:.1f} GB/s:"
        f" {row['times_the_limit']:.2f} of it",
        flush=True,
    )


def total(rows: list[Row]) -> Row:
    """All layers of Flash."""
    ratios = preset("flash").backbone_ratios
    counts = {kind: ratios.count(ratio) for kind, ratio in RATIOS.items()}
    of = {row["kind"]: row for row in rows if row["op"] == "decode"}
    seconds = sum(n * of[kind]["seconds"] + of[kind]["seconds_once_a_pass"] for kind, n in counts.items())
    seconds += of["head"]["seconds"]
    least = sum(n * of[kind]["least_seconds"] for kind, n in counts.items()) + of["head"]["least_seconds"]
    result: Row = {
        "layers": counts, "decode_seconds": seconds, "decode_tokens_per_s": 1 / seconds,
        "least_seconds": least, "times_the_limit": seconds / least, "prefill_tokens_per_s": {},
    }  # fmt: skip
    for tokens in sorted({row["tokens"] for row in rows if row["op"] == "prefill"}):
        took = sum(counts[r["kind"]] * r["seconds"] for r in rows if r["op"] == "prefill" and r["tokens"] == tokens)
        result["prefill_tokens_per_s"][tokens] = tokens / (took + of["head"]["seconds"])
    return result


def measured(kinds: list[str], args: argparse.Namespace) -> Iterator[Row]:
    """Rows of all layers, one layer in memory at a time."""
    memory = torch.ones(READ_BYTES, dtype=torch.uint8)
    pages = -(-(args.context + 64) // 128) + max([0, *args.prompts]) // 128 + 1
    for kind in kinds:
        if kind == "head":
            yield head(args.repeat, memory)
            continue
        stage = build(kind, pages)
        yield decode(stage, args.context, args.repeat, memory)
        for tokens in args.prompts:
            yield prefill(stage, tokens, max(args.repeat // 10, 2))


def main() -> None:
    """Measure, print, store JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=[*RATIOS, "head"], choices=[*RATIOS, "head"])
    parser.add_argument("--context", type=int, default=CONTEXT, help="a multiple of 128")
    parser.add_argument("--prompts", nargs="*", type=int, default=[512, 2048])
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "flash_layer.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    with torch.inference_mode():
        for row in measured(args.kinds, args):
            show(row)
            rows.append(row)
    machine = this_machine()
    result: Row = {
        "machine": {"cpu": machine.cpu, "cores": machine.cores, "memory": machine.memory_total},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": choice().name,
        "rows": rows,
    }
    if set(args.kinds) == {*RATIOS, "head"}:
        result["flash"] = total(rows)
        flash = result["flash"]
        prompts = ", ".join(f"{n}: {rate:.1f}" for n, rate in flash["prefill_tokens_per_s"].items())
        print(
            f"Flash: {flash['decode_tokens_per_s']:.2f} tokens/s at {args.context:,} tokens of context"
            f" ({flash['times_the_limit']:.2f} of the limit); prefill tokens/s {prompts}"
        )
        write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
