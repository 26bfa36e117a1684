"""A step of our trainer against transformers and nano-deepseek-v4: the same shape, batch and length, in one run.

    pip install --no-deps --target FOLDER nano-deepseek-v4
    python benchmarks/training.py [--nano FOLDER] [--batch 4] [--length 1024] [--out benchmarks/results/training.json]

All sides train the shape of the preset `nano` in float32 without MTP on random tokens, with sparse selection:

- abyssal: the trainer's whole step: losses of the language model, the experts' balance and the indexers, Muon;
- abyssal, AdamW: the same with AdamW for all parameters;
- transformers: its model, torch's autograd and AdamW; eager attention, once with its loop over experts and once with
  grouped products. It does not train the indexers and balances nothing;
- nano-deepseek-v4: its own `train_step`, with Muon and AdamW. Nor does it train the indexers.

Each side runs in a process of its own on one thread; sides alternate, the best step of all rounds counts. Time is the
process's on the processor, so that other work on the machine counts little. Peak is the process's largest memory, of
which `before` was there when the model and its data were.

A batch has the tokens of a step of the recipe `nano`: Muon costs the same whatever a step reads, so shorter steps show
its price alone.

What this does not show: that the sides learn equally well, more threads, GPUs, or longer sequences.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from abyssal.arch.config import ModelConfig
from abyssal.arch.presets import preset
from abyssal.base.files import write_json
from abyssal.base.machine import resident_bytes, this_machine

SIDES = ("abyssal", "abyssal, AdamW", "transformers", "transformers, grouped experts", "nano-deepseek-v4")
Step = Callable[[], float]  # a step's loss


def shape() -> ModelConfig:
    """The preset nano without its MTP block, and without stored formats."""
    config = preset("nano")
    return replace(config, num_nextn_predict_layers=0, compress_ratios=config.backbone_ratios, expert_dtype=None)


def tokens_of(batch: int, length: int) -> torch.Tensor:
    """[batch, length + 1] random ids: all but the last are read, all but the first predicted."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, shape().vocab_size, (batch, length + 1), generator=generator)


def ours(batch: int, length: int, muon: float) -> Step:
    """The trainer's step."""
    from abyssal.model import Transformer
    from abyssal.model.init import initialise
    from abyssal.train.order import Mixture, Source
    from abyssal.train.schedule import Schedule
    from abyssal.train.trainer import Rules, Trainer

    documents = [row.numpy().astype(np.int64) for row in tokens_of(batch, length)]
    data = Mixture({"random": Source(documents, 0, length)}, {"random": 1})
    schedule = Schedule(1000, dense_until=0.0, fp4_from=1.0, fp8_from=1.0)
    rules = Rules(schedule, tokens=batch * length, length=length, muon=muon)
    trainer = Trainer(initialise(Transformer(shape()), 0), data, rules)

    def step() -> float:
        line = trainer.step()
        assert trainer.tokens == trainer.step_number * batch * length, line["tokens"]
        return line["loss"]

    return step


def transformers_model(batch: int, length: int, experts: str) -> Step:
    """transformers' model with AdamW."""
    from abyssal.model import Transformer
    from abyssal.model.init import initialise
    from tests.oracle import hf

    start = initialise(Transformer(shape()), 0)
    model = hf.build(start.config.to_dict(), start.state_dict(), torch.float32).train()
    model.set_experts_implementation(experts)
    del start
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    ids = tokens_of(batch, length)

    def step() -> float:
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def nano_model(batch: int, length: int) -> Step:
    """nano-deepseek-v4's model and step; it shifts the targets itself."""
    from nano_deepseek_v4.config import DeepSeekV4Config
    from nano_deepseek_v4.modeling import DeepSeekV4ForCausalLM
    from nano_deepseek_v4.training import build_deepseek_v4_optimizers, train_step

    told = shape().to_dict()
    known = DeepSeekV4Config.__dataclass_fields__
    changes = {key: value for key, value in told.items() if key in known and key != "expert_dtype"}
    changes |= {
        "partial_rotary_factor": told["qk_rope_head_dim"] / told["head_dim"],
        "compress_ratios": list(shape().backbone_ratios),
    }
    torch.manual_seed(0)
    model = DeepSeekV4ForCausalLM(DeepSeekV4Config(**changes))
    optimisers = build_deepseek_v4_optimizers(model, lr=3e-3, adamw_eps=1e-12)
    ids = tokens_of(batch, length)
    return lambda: float(train_step(model, ids, optimisers))


def measure(side: str, batch: int, length: int, steps: int) -> dict[str, Any]:
    """Run one side in this process; the first step is not counted."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if side.startswith("abyssal"):
        step = ours(batch, length, 0.0 if side.endswith("AdamW") else 0.01)
    elif side.startswith("transformers"):
        step = transformers_model(batch, length, "grouped_mm" if side.endswith("experts") else "eager")
    else:
        step = nano_model(batch, length)
    before = resident_bytes()
    losses, times = [], []
    for _ in range(1 + steps):
        begin = time.process_time()
        losses.append(step())
        times.append(time.process_time() - begin)
    return {
        "tokens_per_s": batch * length / min(times[1:]),
        "seconds": times,
        "losses": losses,
        "before_bytes": before,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    """Alternate the sides, print ratios, store JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nano", type=Path, help="folder that nano-deepseek-v4 was installed to")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training.json")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.nano is not None:
        sys.path.insert(0, str(args.nano))
    if args.measure:
        print(json.dumps(measure(args.measure, args.batch, args.length, args.steps)))
        return
    found: dict[str, dict[str, Any]] = {}
    sizes = ["--batch", str(args.batch), "--length", str(args.length), "--steps", str(args.steps)]
    sizes += ["--nano", str(args.nano)] if args.nano else []
    for _ in range(args.rounds):
        for side in SIDES:
            if "error" in found.get(side, {}):
                continue
            done = subprocess.run(
                [sys.executable, __file__, "--measure", side, *sizes], capture_output=True, text=True, check=False
            )
            if done.returncode:
                found[side] = {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
                continue
            one = json.loads(done.stdout.splitlines()[-1])
            best = found.setdefault(side, one)
            best["tokens_per_s"] = max(best["tokens_per_s"], one["tokens_per_s"])
            best["peak_bytes"] = min(best["peak_bytes"], one["peak_bytes"])
    base = found["abyssal"]
    for side, one in found.items():
        if "error" in one:
            print(f"{side:30s} {one['error']}")
            continue
        one["speed_ratio"] = base["tokens_per_s"] / one["tokens_per_s"]
        one["peak_ratio"] = base["peak_bytes"] / one["peak_bytes"]
        print(
            f"{side:30s} {one['tokens_per_s']:7.0f} tokens/s  peak {one['peak_bytes'] / 1e6:6.0f} MB"
            f"  ours is {one['speed_ratio']:.2f}x the speed, {one['peak_ratio']:.2f}x the memory"
        )
    machine = this_machine()
    import transformers

    result = {
        "machine": {"cpu": machine.cpu, "cores": machine.cores, "memory": machine.memory_total},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": 1,
        "batch": args.batch,
        "length": args.length,
        "sides": found,
    }
    write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
