"""What context costs: bytes and FLOPs of our own cache and kernels, and the time of a token, up to 1M tokens.

    python benchmarks/context.py [--quick] [--out benchmarks/results/context.json]

Four parts, each measured and not only computed:

- bytes: the memory of Flash's and Pro's shapes at 1M tokens, as the allocator counts it, against V3.2's layout
  and GQA-8's by the specification's arithmetic;
- real: Flash's whole cache at 1M tokens is allocated packed, every page of it is filled with synthetic entries,
  and a block with one real-shaped CSA or HCA layer and hardly any experts reads it;
- flops: matrix products of one decoded token of Flash-shaped layers, counted as torch executes them, against the
  formulas of architecture.md 4.2;
- time: one decoded token of the bundled model at growing contexts. The entries are synthetic, so that 1M tokens
  need not be read first; the time does not depend on their values. Sides of a pair are measured in turns.

What this does not show: the quality of answers over long contexts, or other machines.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from abyssal.arch.presets import preset
from abyssal.base.files import write_json
from abyssal.base.machine import this_machine
from abyssal.checkpoint.load import load_model
from abyssal.cli.models import bundled_folder
from abyssal.efficiency.baselines import gqa8_kv_per_token, v32_kv_per_token
from abyssal.kernels.choice import forced
from abyssal.kvcache import Memory, SequenceCache
from abyssal.model import Batch, Transformer
from abyssal.model.attention import Attention
from abyssal.model.block import Block
from abyssal.model.linear import PackedModule
from abyssal.model.rope import Rope
from abyssal.quant.numerics import Numerics

MILLION = 1_000_000
CONTEXTS = (1_000, 8_000, 64_000, 256_000, 1_000_000)


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


def bytes_of(name: str) -> dict[str, Any]:
    """What a memory for 1M tokens of one sequence takes, as its arrays say."""
    config = preset(name)
    tokens = MILLION // 128 * 128
    pages = tokens // 128
    memory = Memory(config, Numerics.of("packed"), pages=pages, slots=1)
    growing = sum(c.entries[1:].numel() * c.entries.element_size() for c in memory.compressors())
    fixed = sum(ring.data.numel() * ring.data.element_size() for ring in memory.rings())
    token = growing / tokens
    return {
        "bytes_per_token": token,
        "growing_bytes_at_1M": token * MILLION,
        "fixed_bytes": fixed,
        "against_v32": token / v32_kv_per_token(),
        "against_gqa8": token / gqa8_kv_per_token(config.num_hidden_layers),
    }


def synthetic(memory: Memory, seed: int = 0) -> None:
    """Fill every page and ring with entries that decode to ordinary values."""
    generator = torch.Generator().manual_seed(seed)
    for layer in memory.all_layers():
        for ring in layer.rings():
            ring.data.copy_(_values(layer.codec, ring.data, generator))
    for c in memory.compressors():
        for first in range(1, len(c.entries), 65536):
            part = c.entries[first : first + 65536]
            part.copy_(_values(c.codec, part, generator))


def _values(codec: Any, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if like.dtype == torch.uint8:
        rows = codec.encode(torch.randn(min(len(like), 4096), codec.dim, generator=generator))
        return rows[torch.arange(len(like)) % len(rows)]
    return torch.randn(like.shape, generator=generator)


def at(memory: Memory, position: int) -> SequenceCache:
    """A sequence that stands at a position, over synthetic entries."""
    cache = SequenceCache(memory)
    cache.extend(memory.pages_for(position + 64))
    cache.position = cache._highest = position
    return cache


def real_flash(context: int) -> dict[str, Any]:
    """Allocate Flash's cache, fill it, and read it by one layer of each kind."""
    config = preset("flash")
    before = resident()
    memory = Memory(config, Numerics.of("packed"), pages=-(-(context + 64) // 128), slots=1)
    synthetic(memory)
    held = resident() - before
    arrays = sum(c.entries.numel() for c in memory.compressors())
    arrays += sum(ring.data.numel() * ring.data.element_size() for ring in memory.rings())
    cache = at(memory, context)
    result: dict[str, Any] = {"context": context, "resident_bytes": held, "array_bytes": arrays}
    result["growing_bytes_of_sequence"] = cache.growing_bytes
    for kind, ratio in (("csa", 4), ("hca", 128)):
        number = config.backbone_ratios.index(ratio)
        small = replace(config, n_routed_experts=8, moe_intermediate_size=32)
        block = Block(small, ratio, False, Numerics.of("packed")).requires_grad_(False)
        with torch.inference_mode():
            for p in block.parameters():
                p.copy_(torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1))
            for module in block.modules():
                if isinstance(module, PackedModule):
                    module.pack()
            rope = Rope(config, ratio, torch.float32)
            times = []
            for _ in range(3):
                batch = Batch([cache], [1])
                x = torch.randn(batch.padded, config.hc_mult, config.hidden_size)
                ids, turn = torch.zeros(batch.padded, dtype=torch.long), rope.at(batch.positions)
                begin = time.perf_counter()
                y = block(x, ids, batch, memory.layers[number], rope, turn)
                times.append(time.perf_counter() - begin)
            assert y.isfinite().all()
        result[f"{kind}_s"] = min(times)
    return result


def flops_of(context: int) -> dict[str, Any]:
    """Products of attention and index scores of a token, counted while they run, against 4.2's formulas.

    The last 64 tokens before `context` pass at once, so that rows that fill up a product do not count.
    """
    config, tokens = preset("flash"), 64
    rows: dict[str, Any] = {"context": context}
    for kind, ratio in (("csa", 4), ("hca", 128)):
        one = replace(config, num_hidden_layers=1, compress_ratios=(ratio, 0), num_hash_layers=0)
        memory = Memory(one, pages=-(-(context + 64) // 128), slots=1)
        layer = Attention(one, ratio, Numerics()).requires_grad_(False)
        rope = Rope(one, ratio, torch.float32)
        batch = Batch([at(memory, context - tokens)], [tokens])
        x = torch.randn(batch.padded, one.hidden_size)
        # torch counts its own products alone; the native kernels compute the same ones
        with torch.inference_mode(), forced("reference"), FlopCounterMode(display=False) as counter:
            layer(x, batch, memory.layers[0], rope, rope.at(batch.positions))
        weights = sum(p.numel() for name, p in layer.named_parameters() if p.dim() == 2 and "ape" not in name)
        counted = counter.get_total_flops() / tokens - 2 * weights
        keys = one.sliding_window + (one.index_topk if ratio == 4 else context // 128)
        core = 4 * one.num_attention_heads * one.head_dim * keys
        index = 2 * one.index_n_heads * one.index_head_dim * (context // 4) if ratio == 4 else 0
        rows[kind] = {"counted": counted, "formula": core + index, "core": core, "index": index}
    return rows


def decode_times(model: Transformer, contexts: tuple[int, ...], repeat: int) -> list[dict[str, Any]]:
    """Seconds of one decoded token at each context, in turns."""
    caches = {}
    for context in contexts:
        memory = model.new_memory(pages=-(-(context + 128) // 128), slots=1)
        synthetic(memory)
        caches[context] = at(memory, context)
    from abyssal.engine.runner import Runner

    runner = Runner(model)
    times: dict[int, list[float]] = {context: [] for context in contexts}
    for turn in range(repeat + 2):
        for context, cache in caches.items():
            begin = time.perf_counter()
            with runner.working(1, context):
                output = runner.run([cache], [[100 + turn]])
                runner.logits(output.z_TD)
            cache.rewind(context)
            if turn >= 2:
                times[context].append(time.perf_counter() - begin)
    return [
        {"context": c, "seconds": statistics.median(t), "best": min(t), "bytes": caches[c].growing_bytes}
        for c, t in times.items()
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Bytes and seconds over context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    x = np.array(CONTEXTS)
    for name, value in (("V3.2", v32_kv_per_token()), ("V4-Pro", None), ("V4-Flash", None)):
        token = value or result["bytes"][name[3:].lower()]["bytes_per_token"]
        left.loglog(x, x * token / 1e9, marker="o", label=name)
    left.set_xlabel("context, tokens")
    left.set_ylabel("cache that grows with context, GB")
    left.legend()
    rows = result["time"]
    right.semilogx([r["context"] for r in rows], [1e3 * r["seconds"] for r in rows], marker="o")
    right.set_ylim(bottom=0)
    right.set_xlabel("context, tokens")
    right.set_ylabel("one decoded token of the bundled model, ms")
    for axis in (left, right):
        axis.grid(True, alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print ratios, store JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64K tokens at most, a few repeats")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "context.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    contexts = CONTEXTS[:3] if args.quick else CONTEXTS
    real = real_flash(contexts[-1])  # first, while no memory lies about that could be used again
    sizes = {name: bytes_of(name) for name in ("flash", "pro")}
    for name, row in sizes.items():
        print(
            f"{name}: {row['bytes_per_token']:.2f} B/token = {row['against_v32']:.2%} of V3.2,"
            f" {row['against_gqa8']:.2%} of GQA-8; fixed {row['fixed_bytes'] / 1e6:.1f} MB"
        )
    flops = flops_of(contexts[-1])
    for kind in ("csa", "hca"):
        row = flops[kind]
        extra = row["counted"] / row["formula"]
        print(f"{kind}: products counted {row['counted']:.3e}, formula {row['formula']:.3e}, ratio {extra:.3f}")
    model = load_model(bundled_folder(), keep_stored=True).requires_grad_(False)
    times = decode_times(model, contexts, 5 if args.quick else 15)
    for row in times:
        print(f"{row['context']:9,d} tokens: {1e3 * row['seconds']:7.1f} ms a token (best {1e3 * row['best']:.1f})")
    by = {row["context"]: row["seconds"] for row in times}
    print(f"{contexts[-1]:,} against 8,000 tokens: {by[contexts[-1]] / by[8_000]:.2f} times the time")
    print(
        f"real Flash cache at {real['context']:,} tokens: {real['resident_bytes'] / 1e9:.3f} GB resident,"
        f" {real['growing_bytes_of_sequence'] / 1e9:.3f} GB of entries;"
        f" a CSA layer {1e3 * real['csa_s']:.1f} ms, HCA {1e3 * real['hca_s']:.1f} ms a token"
    )
    machine = this_machine()
    result = {
        "machine": {"cpu": machine.cpu, "cores": machine.cores, "memory": machine.memory_total},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bytes": sizes,
        "flops": flops,
        "time": times,
        "real": real,
    }
    write_json(args.out, result)
    if not args.quick:
        plot(result, args.out.with_suffix(".png"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
