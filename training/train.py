"""Train the first small model: a plain script, in the tree until the training room replaces it.

    python training/train.py --corpus DIR --run RUN --minutes 45     (again with the same --run to resume)

Next-token and MTP loss, Muon with the hybrid Newton-Schulz on matrices, AdamW on the rest, aux-free expert
balance, and the release's own FP4/FP8 rounding of the weights (straight through) in the last fifth.
Writes RUN/state.pt (resumable), RUN/metrics.jsonl, and at the end RUN/final.pt.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abyssal.arch.config import ModelConfig
from abyssal.arch.presets import preset
from abyssal.base.files import write_aside
from abyssal.kernels.linear import dequantise
from abyssal.kvcache import SequenceCache
from abyssal.model import Batch, Transformer
from abyssal.model.init import initialise
from abyssal.model.linear import GroupedLinear, QuantLinear
from abyssal.model.moe import Experts, Gate
from abyssal.quant.fp4 import quantise_fp4
from abyssal.quant.fp8 import quantise_fp8

LENGTH = 256  # at most 64 blocks: a CSA layer reads them all, and the untrained indexer plays no part
BATCH = 16
MTP_EVERY = 3  # the MTP loss costs a second pass of the head; these steps carry its weight
PEAK_MUON, PEAK_ADAM = 0.006, 0.003
QUANTISE_FROM, DECAY_FROM = 0.8, 0.5  # fractions of the run
NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2


class Muon:
    """Orthogonalised momentum for matrices; stacked experts are taken one by one, in one batched product."""

    def __init__(self, params: list[nn.Parameter]):
        self.params = params
        self.momentum = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with Nesterov momentum 0.95, update RMS 0.18 and decoupled weight decay 0.1."""
        groups: dict[torch.Size, list[int]] = {}
        for i, p in enumerate(self.params):
            groups.setdefault(p.shape[-2:], []).append(i)
        for shape, members in groups.items():
            updates = []
            for i in members:
                grad = self.params[i].grad
                assert grad is not None
                self.momentum[i].mul_(0.95).add_(grad)
                updates.append((self.momentum[i] * 0.95 + grad).reshape(-1, *shape))
            whole = orthogonal(torch.cat(updates)) * (max(shape) ** 0.5 * 0.18)
            for i, update in zip(members, whole.split([len(u) for u in updates]), strict=True):
                self.params[i].mul_(1 - lr * 0.1).sub_(update.view_as(self.params[i]), alpha=lr)


def orthogonal(x: Tensor) -> Tensor:
    """The nearest orthogonal matrices of a stack, by ten Newton-Schulz steps in bfloat16."""
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


@contextmanager
def released_precision(model: Transformer, active: bool) -> Iterator[None]:
    """Inside, matrices hold what a release would store; the gradients then reach the masters unchanged."""
    masters: list[tuple[nn.Parameter, Tensor]] = []
    if active:
        for module in model.modules():
            if isinstance(module, Experts):
                masters += [(p, p.data) for p in (module.w1, module.w2, module.w3)]
            elif isinstance(module, QuantLinear | GroupedLinear):
                masters.append((module.weight, module.weight.data))
    for p, master in masters:
        p.data = dequantise(*(quantise_fp4 if p.dim() == 3 else quantise_fp8)(master), torch.float32)
    try:
        yield
    finally:
        for p, master in masters:
            p.data = master


class Balance:
    """Moves each router's bias against overloaded experts, by the sign of the load (architecture.md 5.1)."""

    def __init__(self, model: Transformer):
        self.loads: dict[Gate, Tensor] = {}
        for module in model.modules():
            gate = getattr(module, "gate", None)
            if isinstance(gate, Gate) and gate.bias is not None:
                self.loads[gate] = torch.zeros(gate.weight.shape[0])
                gate.route = partial(self._route, gate, gate.route)  # type: ignore[method-assign]

    def _route(
        self, gate: Gate, route: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x_TD: Tensor, ids_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights_TK, chosen_TK = route(x_TD, ids_T)
        self.loads[gate] += torch.bincount(chosen_TK.flatten(), minlength=len(self.loads[gate]))
        return weights_TK, chosen_TK

    def step(self, speed: float) -> float:
        """Update every bias; the worst overload, max / mean - 1."""
        worst = 0.0
        for gate, load in self.loads.items():
            assert gate.bias is not None
            gate.bias.data += speed * (load.mean() - load).sign()
            worst = max(worst, float(load.max() / load.mean() - 1))
            load.zero_()
        return worst


def shape() -> ModelConfig:
    """Nano with four blocks, one of each kind and a second CSA block: what an hour on two cores can teach."""
    return replace(preset("nano"), num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0))


def losses(model: Transformer, ids_BS: Tensor, mtp: bool = True) -> tuple[Tensor, Tensor]:
    """Next-token loss and MTP loss (zero unless `mtp`) of a batch of windows [B, S + 2]."""
    batch, length = ids_BS.shape[0], ids_BS.shape[1] - 2
    memory = model.new_memory()
    caches = [SequenceCache(memory) for _ in range(batch)]
    out = model.run(ids_BS[:, :length].flatten(), caches, [length] * batch)
    main = F.cross_entropy(model.logits(out.z_TD), ids_BS[:, 1 : length + 1].flatten())
    if not mtp:
        return main, torch.zeros(())
    start = Batch(caches, [length] * batch, [0] * batch)
    z_TD, _ = model.draft(out.streams_TND, ids_BS[:, 1 : length + 1].flatten(), start)
    return main, F.cross_entropy(model.logits(z_TD), ids_BS[:, 2 : length + 2].flatten())


def read_ids(path: Path) -> np.ndarray:
    """The ids of a DSV4TOK1 file, memory-mapped."""
    return np.memmap(path, dtype="<u2", mode="r", offset=64)


def windows(ids: np.ndarray, step: int) -> Tensor:
    """The batch of a step: a function of its number alone, so that a resumed run sees the same data."""
    starts = np.random.default_rng((7, step)).integers(0, len(ids) - LENGTH - 2, BATCH)
    return torch.from_numpy(np.stack([ids[s : s + LENGTH + 2] for s in starts]).astype(np.int64))


@torch.no_grad()
def evaluate(model: Transformer, ids: np.ndarray) -> float:
    """Mean next-token loss in nats over the held-out ids, as a release would store the model."""
    total = []
    with released_precision(model, True):
        for start in range(0, min(len(ids), 60 * LENGTH) - LENGTH - 2, LENGTH):
            window = torch.from_numpy(ids[start : start + LENGTH + 2].astype(np.int64))
            total.append(losses(model, window[None], mtp=False)[0].item())
    return float(np.mean(total))


def save(path: Path, state: dict[str, Any]) -> None:
    """torch.save, but never half-written."""
    with write_aside(path) as aside:
        torch.save(state, aside)


def main() -> None:
    """Train until the minutes are over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--steps", type=int, help="stop earlier, to measure")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("medium")
    model = initialise(Transformer(shape()), seed=0)
    balance = Balance(model)
    matrices, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            plain = p.dim() < 2 or "ape" in name or "hc_" in name or "gate.weight" in name
            (rest if plain or name in ("embed.weight", "head.weight") else matrices).append(p)
    muon = Muon(matrices)
    adam = torch.optim.AdamW(rest, lr=PEAK_ADAM, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.01)
    step, spent = 0, 0.0
    if (args.run / "state.pt").exists():
        state = torch.load(args.run / "state.pt")
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        muon.momentum = state["muon"]
        step, spent = state["step"], state["spent"]
    train, valid = read_ids(args.corpus / "train.bin"), read_ids(args.corpus / "valid.bin")
    begin, saved = time.monotonic() - spent, time.monotonic()
    while (spent := time.monotonic() - begin) < args.minutes * 60 and step != args.steps:
        done = spent / (args.minutes * 60)
        decay = 0.95 * max(done - DECAY_FROM, 0.0) / (1 - DECAY_FROM)
        rate = min((step + 1) / 50, 1 - decay)
        with released_precision(model, done > QUANTISE_FROM):
            main_loss, mtp_loss = losses(model, windows(train, step), step % MTP_EVERY == 0)
            (main_loss + MTP_EVERY * (0.3 if done < DECAY_FROM else 0.1) * mtp_loss).backward()
        for p in (*matrices, *rest):  # the indexer's get none from a dense selection
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = nn.utils.clip_grad_norm_([*matrices, *rest], 1.0)
        muon.step(PEAK_MUON * rate)
        for group in adam.param_groups:
            group["lr"] = PEAK_ADAM * rate
        adam.step()
        model.zero_grad()
        worst = balance.step(0.005 if done < 0.5 else 0.001)
        step += 1
        line = {
            "step": step,
            "tokens": step * BATCH * LENGTH,
            "loss": main_loss.item(),
            "mtp_loss": mtp_loss.item(),
            "grad_norm": float(norm),
            "max_violation": worst,
            "tokens_per_s": step * BATCH * LENGTH / (time.monotonic() - begin),
            "seconds": time.monotonic() - begin,
        }
        if step % 200 == 0:
            line["valid_loss"] = evaluate(model, valid)
        with (args.run / "metrics.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        if step % 10 == 0:
            print(json.dumps(line), flush=True)
        if time.monotonic() - saved > 600:
            saved = time.monotonic()
            state = {"model": model.state_dict(), "adam": adam.state_dict(), "muon": muon.momentum}
            save(args.run / "state.pt", state | {"step": step, "spent": time.monotonic() - begin})
    save(args.run / "final.pt", {"model": model.state_dict(), "step": step, "valid_loss": evaluate(model, valid)})


if __name__ == "__main__":
    main()
