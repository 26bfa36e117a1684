"""What each part of the architecture and of the training does, on a small model: one part is changed at a time.

    python benchmarks/ablation.py [--steps N] [--folder runs/ablation] [--out benchmarks/results/ablation.json]

The base is the recipe `test` with one more block, so that all three kinds of attention are there: window, CSA, HCA,
CSA. Every variant reads the same tokens from the same start, is exported as a release (FP4 experts, FP8) and asked
for values of pairs that it has not seen, at the length that it was trained at and at 16,384 tokens.

A variant that is finished is kept in the folder and a killed one goes on from its last checkpoint; give the same
--steps. Speed is tokens of training per second of this process's time on the processor, so that other work on the
machine counts little; memory and optimiser are part of it.

What this does not show: other seeds, other tasks than looking up, larger models or longer training, in which the
order of variants can differ.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from abyssal.base.files import write_json
from abyssal.base.machine import this_machine
from abyssal.checkpoint.load import load_model
from abyssal.model import Transformer
from abyssal.train.data.pairs import Pairs
from abyssal.train.export import export
from abyssal.train.recipe import read_recipe, trainer_of
from abyssal.train.run import run
from abyssal.train.skills.pairs import Dense, look_up

HERE = Path(__file__).parent
BASE = ("model.num_hidden_layers=4", "model.compress_ratios=[0, 4, 128, 4]")
VARIANTS: dict[str, tuple[str, ...]] = {
    "base": (),
    "without mHC": ("model.hc_mult=1",),
    "without CSA": ("model.compress_ratios=[0, 0, 128, 0]",),
    "without HCA": ("model.compress_ratios=[0, 4, 0, 4]",),
    "AdamW for Muon": ("pretrain.muon=0",),
    "AdamW, half the rate": ("pretrain.muon=0", "pretrain.adamw=0.002"),
    "dense for sparse": ("pretrain.schedule.dense_until=1",),
    "without indexer loss": ("pretrain.index=0",),
}
DENSE = "dense for sparse"  # reads all blocks, as it was trained
NEAR, FAR = 256, 16_384
ITEMS = {NEAR: 16, FAR: 4}


def train(folder: Path, changes: tuple[str, ...]) -> None:
    """Train a variant to its end, or go on; seconds of the processor for each step lie beside its metrics."""
    recipe = read_recipe("test", changes)
    trainer = trainer_of(recipe, "pretrain", folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "processor.jsonl").open("a", encoding="utf-8") as file:
        begun = time.process_time()

        def note(line: dict[str, Any]) -> None:
            nonlocal begun
            file.write(json.dumps([line["step"], time.process_time() - begun]) + "\n")
            file.flush()
            if line["step"] % 20 == 0:
                print(f"  step {line['step']}, loss {line['loss']:.3f}", file=sys.stderr, flush=True)
            begun = time.process_time()

        assert run(trainer, folder, show=note, seconds=120)


def processor_seconds(folder: Path) -> float:
    """Of all steps; one that ran twice, since the process was killed, counts once."""
    lines = (folder / "processor.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(dict(json.loads(line) for line in lines).values())


def measure(folder: Path, changes: tuple[str, ...], dense: bool) -> dict[str, Any]:
    """Train a variant and ask it."""
    train(folder / "run", changes)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    export(folder / "run", folder / "release")
    model = load_model(folder / "release")
    assert isinstance(model, Transformer)
    source = read_recipe("test").stage("pretrain").sources["pairs"]
    assert source.ids is not None
    pairs = Pairs(source.ids, source.roles)
    tail = lines[-20:]
    recall = [line["index_recall"] for line in tail if line["index_recall"] is not None]
    return {
        "changes": changes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": len(lines),
        "tokens": lines[-1]["tokens"],
        "applied": sum(line["verdict"] == "apply" for line in lines),
        "training_loss": sum(line["loss"] for line in tail) / len(tail),
        "index_recall": sum(recall) / len(recall) if recall else None,
        "tokens_per_processor_s": lines[-1]["tokens"] / processor_seconds(folder / "run"),
        "seconds": sum(sum(line["seconds"].values()) for line in lines),
        "asked": {
            str(length): look_up(model, pairs, length, ITEMS[length], Dense(length) if dense else None)
            for length in (NEAR, FAR)
        },
    }


def read_densely(folder: Path) -> dict[str, Any]:
    """The base once more, without another training, reading all blocks."""
    model = load_model(folder / "release")
    source = read_recipe("test").stage("pretrain").sources["pairs"]
    assert isinstance(model, Transformer) and source.ids is not None
    pairs = Pairs(source.ids, source.roles)
    return {str(length): look_up(model, pairs, length, ITEMS[length], Dense(length)) for length in (NEAR, FAR)}


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of Markdown; ratios are against the base."""
    speed = rows["base"]["tokens_per_processor_s"]
    out = [
        f"| variant | loss | right at {NEAR} tokens | right at {FAR:,} tokens | training tokens/s |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        near, far = (row["asked"][str(length)] for length in (NEAR, FAR))
        rates = [f"{100 * one['rate']:.1f}% ({100 * one['low']:.0f} to {100 * one['high']:.0f})" for one in (near, far)]
        own = row["tokens_per_processor_s"]
        out.append(f"| {name} | {near['loss']:.3f} | {rates[0]} | {rates[1]} | {own:,.0f} ({own / speed:.2f}x) |")
    return out


def plot(rows: dict[str, dict[str, Any]], folder: Path, path: Path) -> None:
    """Training loss over tokens, and answers at both lengths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    smooth = 15
    for number, name in enumerate(rows):
        lines = [json.loads(line) for line in (folder / name / "run" / "metrics.jsonl").read_text().splitlines()]
        losses = np.convolve([line["loss"] for line in lines], np.ones(smooth) / smooth, "valid")
        tokens = np.array([line["tokens"] for line in lines])[smooth - 1 :]
        style = {"color": "black", "linewidth": 2.2} if name == "base" else {"color": f"C{number}", "linewidth": 1.2}
        left.plot(tokens / 1e6, losses, label=name, **style)
    left.set_xlabel("million tokens read")
    left.set_ylabel(f"training loss, mean of {smooth} steps (nats)")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    names = list(rows)[::-1]
    y = np.arange(len(names))
    for length, shift, color in ((NEAR, 0.2, "C0"), (FAR, -0.2, "C1")):
        asked = [rows[name]["asked"][str(length)] for name in names]
        rate = np.array([one["rate"] for one in asked])
        ends = np.array([[one["rate"] - one["low"] for one in asked], [one["high"] - one["rate"] for one in asked]])
        label = f"at {length:,} tokens"
        right.barh(y + shift, 100 * rate, 0.38, xerr=100 * ends, color=color, label=label, error_kw={"linewidth": 1})
    right.set_yticks(y, names)
    right.set_xlim(0, 100)
    right.set_xlabel("right answers, % (with 95% intervals)")
    right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, 1.12), ncols=2, frameon=False)
    right.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Train and ask what is not finished yet, print the table, store JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of 2,048 tokens")
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ablation.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    for name, changes in VARIANTS.items():
        kept = args.folder / name / f"{args.steps}.json"
        if not kept.exists():
            print(name, file=sys.stderr, flush=True)
            told = (*BASE, f"pretrain.schedule.steps={args.steps}", *changes)
            write_json(kept, measure(args.folder / name, told, name == DENSE))
        rows[name] = json.loads(kept.read_bytes())
    print("\n".join(table(rows)))
    dense = args.folder / "base" / f"{args.steps}-dense.json"
    if not dense.exists():
        write_json(dense, read_densely(args.folder / "base"))
    for length, one in json.loads(dense.read_bytes()).items():
        print(f"the base reading all blocks, {int(length):,} tokens: {100 * one['rate']:.1f}% right")
    machine = this_machine()
    result = {
        "machine": {"cpu": machine.cpu, "cores": machine.cores, "memory": machine.memory_total},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
        "variants": rows,
        "base_reading_densely": json.loads(dense.read_bytes()),
    }
    write_json(args.out, result)
    plot(rows, args.folder, args.out.with_suffix(".png"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
