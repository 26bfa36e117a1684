"""Prefill and decode against transformers on the same weights, in float32 on the CPU.

    python benchmarks/forward.py [--contexts 1024 8192 32768] [--out benchmarks/results/forward.json]

Both sides get the shape of the preset `nano` with equal random weights, read the prompt in chunks of 1,024
tokens (transformers cannot hold the index scores of 32K tokens at once in 24 GiB) and then decode. Each side
runs in a process of its own, whose peak memory is measured; sides alternate. What this does not show: a batch
of requests, quantised weights, or a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from abyssal.arch.presets import preset
from abyssal.base.files import write_json
from abyssal.base.machine import this_machine
from abyssal.engine.runner import Runner
from abyssal.model import Transformer
from abyssal.model.init import initialise

CHUNK = 1024
DECODED = 24
SIDES = ("abyssal", "transformers")


def model() -> Transformer:
    """The preset nano with random weights, the same in every process."""
    config = replace(preset("nano"), expert_dtype=None)
    return initialise(Transformer(config), 0).requires_grad_(False)


class Ours:
    """abyssal's model and its cache."""

    def __init__(self) -> None:
        self.runner = Runner(model())
        self.cache = self.runner.model.new_cache()

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits after the last token."""
        output = self.runner.run([self.cache], [ids.tolist()])
        return torch.from_numpy(self.runner.logits(output.z_TD[-1:])[0])


class Theirs:
    """transformers' model and its cache; the experts loop that its eager mode has."""

    def __init__(self) -> None:
        from transformers import DynamicCache

        from tests.oracle import hf

        ours = model()
        self.model = hf.build(ours.config.to_dict(), ours.state_dict(), torch.float32)
        self.cache = DynamicCache(config=self.model.config)
        self.with_cache = hf.with_cache

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits after the last token."""
        return self.with_cache(self.model, ids[None], self.cache, logits_to_keep=1)[0, -1]


def measure(side: str, context: int) -> dict[str, Any]:
    """Run one side in this process."""
    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, preset("nano").vocab_size, (context + DECODED,), generator=generator)
    with torch.inference_mode():
        warm = (Ours if side == "abyssal" else Theirs)()
        for part in (ids[:CHUNK], ids[:1], ids[:1]):
            warm.step(part)
        del warm
        runner = (Ours if side == "abyssal" else Theirs)()
        begin = time.perf_counter()
        for part in ids[:context].split(CHUNK):
            runner.step(part)
        prefill = time.perf_counter() - begin
        times = []
        for token in ids[context:]:
            begin = time.perf_counter()
            logits = runner.step(token[None])
            times.append(time.perf_counter() - begin)
    return {
        "prefill_tokens_per_s": context / prefill,
        "decode_tokens_per_s": 1 / statistics.median(times),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "last_logits": logits[:8].tolist(),
    }


def main() -> None:
    """Alternate the sides, print ratios, store JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "forward.json")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], int(args.measure[1]))))
        return
    rows = []
    for context in args.contexts:
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(args.repeat):
            for side in SIDES:
                command = [sys.executable, __file__, "--measure", side, str(context)]
                text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                runs[side].append(json.loads(text.splitlines()[-1]))
        first, second = (torch.tensor(runs[side][0]["last_logits"]) for side in SIDES)
        row: dict[str, Any] = {"context": context, "largest_difference": float((first - second).abs().max())}
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_bytes"):
            ours, theirs = (statistics.median(run[key] for run in runs[side]) for side in SIDES)
            row[key] = {"abyssal": ours, "transformers": theirs, "ratio": ours / theirs}
        rows.append(row)
        print(
            f"{context:6d} tokens"
            + "".join(
                f"  {name} {row[key]['abyssal'] / unit:9,.1f} / {row[key]['transformers'] / unit:9,.1f}"
                f" = {row[key]['ratio']:5.2f}"
                for name, key, unit in (
                    ("prefill/s", "prefill_tokens_per_s", 1),
                    ("decode/s", "decode_tokens_per_s", 1),
                    ("peak MB", "peak_bytes", 1e6),
                )
            ),
            flush=True,
        )
    machine = this_machine()
    import transformers

    result = {
        "machine": {"cpu": machine.cpu, "cores": machine.cores, "memory": machine.memory_total},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "chunk": CHUNK,
        "rows": rows,
    }
    write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
