"""Many requests at once through the engine, against transformers' generate on the same weights.

    python benchmarks/serving.py [--concurrent 1 4 16 64] [--out benchmarks/results/serving.json]

Every request has a prompt of 768 tokens, of which 512 are shared by all, and takes 64 tokens, greedily and
without a stop. For each number of requests at once: decoded tokens a second over all, time to the first token,
time between tokens (p50, p99), share of the prompt that was reused. transformers reads the same prompts with the
same float32 weights as one batch of equal lengths, which suits it best. Sides run in turns in one process.

What this does not show: requests that arrive over time, a GPU, or a model whose weights exceed the caches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from abyssal.base.files import write_json
from abyssal.base.machine import this_machine
from abyssal.checkpoint.load import load_model
from abyssal.cli.models import bundled_folder
from abyssal.engine.engine import Engine
from abyssal.engine.prefix_cache import PrefixCache
from abyssal.engine.request import Request
from abyssal.engine.sampler import Sampling
from abyssal.model import Transformer

SHARED, OWN, TAKEN = 512, 256, 64


def prompts(count: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Prompts with a common beginning."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randint(2, vocabulary, (SHARED,), generator=generator).tolist()
    return [common + torch.randint(2, vocabulary, (OWN,), generator=generator).tolist() for _ in range(count)]


def quantile(values: list[float], share: float) -> float:
    """The value below which this share lies."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def ours(model: Transformer, count: int, drafts: int) -> dict[str, Any]:
    """All requests at once, in an engine that has nothing cached yet."""
    engine = Engine(model, budget=2 << 30, slots=64, prefix=lambda memory: PrefixCache(memory, "benchmark"))
    begin = time.perf_counter()
    numbers = [
        engine.add(
            Request(prompt=tuple(p), max_tokens=TAKEN, sampling=Sampling(temperature=0), drafts=drafts)
        )
        for p in prompts(count, model.config.vocab_size)
    ]
    arrived: dict[int, list[float]] = {number: [] for number in numbers}
    decode_s, decoded = 0.0, 0
    while engine.busy:
        before = time.perf_counter()
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            arrived[event.request].append(now - begin)
        if all(arrived.values()):  # all have their first token: nothing but decoding from here
            decode_s += now - before
            decoded += len(events)
    gaps = [b - a for times in arrived.values() for a, b in itertools.pairwise(times)]
    records = [engine.records[number] for number in numbers]
    return {
        "decode_tokens_per_s": decoded / decode_s,
        "tokens_per_s": count * TAKEN / max(times[-1] for times in arrived.values()),
        "first_token_s": statistics.median(times[0] for times in arrived.values()),
        "gap_p50_s": quantile(gaps, 0.5),
        "gap_p99_s": quantile(gaps, 0.99),
        "hit_rate": sum(r.prefix.hit for r in records) / sum(r.prompt_tokens for r in records),
        "accepted": sum(r.accepted for r in records) / max(sum(r.drafted for r in records), 1),
        "tokens": [r.answers[0].tokens for r in records],
    }


class Peer:
    """transformers on the same weights."""

    def __init__(self, model: Transformer):
        from tests.oracle import hf

        warnings.simplefilter("ignore")
        self.model = hf.build(model.config.to_dict(), model.state_dict(), torch.float32)
        self.vocabulary = model.config.vocab_size

    def run(self, count: int, tokens: int = TAKEN) -> dict[str, Any]:
        """One batch of `count` prompts; the clock is read at every token."""
        ids_BS = torch.tensor(prompts(count, self.vocabulary))
        times: list[float] = []

        def note(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        begin = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids_BS, attention_mask=torch.ones_like(ids_BS), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, use_cache=True, pad_token_id=1, stopping_criteria=[note],
            )  # fmt: skip
        gaps = [b - a for a, b in itertools.pairwise(times)]
        return {
            "decode_tokens_per_s": count * len(gaps) / sum(gaps),
            "tokens_per_s": count * tokens / (times[-1] - begin),
            "first_token_s": times[0] - begin,
            "gap_p50_s": quantile(gaps, 0.5),
            "gap_p99_s": quantile(gaps, 0.99),
            "tokens": out[:, ids_BS.shape[1] :].tolist(),
        }


def main() -> None:
    """Alternate the sides, print ratios, store JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--drafts", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serving.json")
    args = parser.parse_args()
    model = load_model(bundled_folder(), keep_stored=True).requires_grad_(False)
    peer = Peer(load_model(bundled_folder()))
    ours(model, 1, args.drafts)
    peer.run(1, 4)
    rows = []
    alone = 0.0
    for count in args.concurrent:
        sides: dict[str, list[dict[str, Any]]] = {"abyssal": [], "transformers": []}
        for _ in range(args.repeat if count < 64 else 1):
            sides["abyssal"].append(ours(model, count, args.drafts))
            sides["transformers"].append(peer.run(count))
        same = sum(
            a == b for a, b in zip(sides["abyssal"][0]["tokens"], sides["transformers"][0]["tokens"], strict=True)
        )
        row: dict[str, Any] = {"concurrent": count, "equal_answers": same}
        for name, runs in sides.items():
            row[name] = {
                key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "tokens"
            }
        rates = {name: row[name]["decode_tokens_per_s"] for name in sides}
        alone = alone or rates["transformers"]
        row["ratio"] = rates["abyssal"] / rates["transformers"]
        row["ratio_to_one_at_a_time"] = rates["abyssal"] / alone
        rows.append(row)
        mine = row["abyssal"]
        print(
            f"{count:3d} at once: decode {rates['abyssal']:7.1f} / {rates['transformers']:7.1f} tokens/s"
            f" = {row['ratio']:.2f} ({row['ratio_to_one_at_a_time']:.2f} of transformers one at a time),"
            f" first token {mine['first_token_s']:.2f} / {row['transformers']['first_token_s']:.2f} s,"
            f" gap p50 {1e3 * mine['gap_p50_s']:.0f} p99 {1e3 * mine['gap_p99_s']:.0f} ms,"
            f" hits {mine['hit_rate']:.0%}, equal answers {same}/{count}",
            flush=True,
        )
    machine = this_machine()
    import transformers

    result = {
        "machine": {"cpu": machine.cpu, "cores": machine.cores, "memory": machine.memory_total},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "drafts": args.drafts,
        "rows": rows,
    }
    write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
