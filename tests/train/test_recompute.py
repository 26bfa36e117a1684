"""Blocks that run again on the way back: equal bits everywhere, counts and losses once, less memory."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from abyssal.model.recorder import Recorder
from abyssal.model.transformer import Transformer
from abyssal.train.schedule import Schedule
from abyssal.train.trainer import Choices, Rules, Trainer, _Clock
from abyssal.train.watch import Watch
from tests.train.tiny import RULES, trainer

DENSE, SPARSE, FP4, ALL = range(4)


def stage(number: int) -> Schedule:
    """A schedule whose first step is of this stage."""
    return replace(
        RULES.schedule,
        dense_until=1.0 if number == DENSE else 0.0,
        fp4_from=0.0 if number >= FP4 else 1.0,
        fp8_from=0.0 if number == ALL else 1.0,
    )


def learned(rules: Rules, choices: bool) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]:
    tiny = trainer(rules)
    packs = tiny._packs(0)
    assert max(len(packed.lengths) for packed in packs) > 2 and any(s is not None for p in packs for s in p.skips)
    work: list[tuple[object, Choices]] = [(packed, tiny._choices(packed) if choices else {}) for packed in packs]
    if choices:
        with torch.no_grad():  # the choices are of other parameters, as after an update
            for gate in tiny._gates.values():
                gate.weight.neg_()
    losses, loads, gauges = tiny._learn(work, _Clock())  # type: ignore[arg-type]
    assert gauges.heads > 0
    losses |= {f"gauges.{name}": value for name, value in asdict(gauges).items() if value}
    return losses, loads, {n: p.grad for n, p in tiny.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("choices", [False, True], ids=["own choice", "anticipated"])
@pytest.mark.parametrize("number", [DENSE, SPARSE, FP4, ALL], ids=["dense", "sparse", "fp4", "all rounded"])
def test_gradients_losses_and_loads_keep_their_bits(number: int, choices: bool) -> None:
    """Packed documents with skips, MTP, both losses of the layers."""
    rules = replace(RULES, schedule=stage(number))
    losses, loads, grads = learned(rules, choices)
    again, counted, same = learned(replace(rules, recompute=True), choices)
    assert again == losses and all(math.isfinite(v) and v > 0 for v in losses.values())
    assert set(counted) == set(loads) and all(torch.equal(counted[n], load_E) for n, load_E in loads.items())
    assert set(same) == set(grads)
    for name, grad in grads.items():
        assert torch.equal(same[name], grad), name


def test_what_a_block_tells_its_recorder_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks do run again, and then another recorder listens."""
    heard: list[tuple[int, str]] = []
    routed = Watch.routed

    def noted(self: Watch, gate: torch.nn.Module, logits_TE: Tensor, chosen_TK: Tensor) -> None:
        heard.append((id(self), str(id(gate))))
        routed(self, gate, logits_TE, chosen_TK)  # type: ignore[arg-type]

    monkeypatch.setattr(Watch, "routed", noted)
    tiny = trainer(replace(RULES, passes=1, recompute=True))
    tiny._learn([(packed, {}) for packed in tiny._packs(0)], _Clock())
    layers = len(tiny._gates)
    assert len(heard) == 2 * layers
    assert len({who for who, _ in heard[:layers]}) == 1
    assert heard[0][0] not in {who for who, _ in heard[layers:]}


def kept_values(recompute: bool) -> int:
    """Values that the graph of a pass holds, parameters left out."""
    tiny = trainer(replace(RULES, schedule=stage(DENSE), recompute=recompute))
    (packed, *_) = tiny._packs(0)
    held: dict[int, int] = {}
    own = {p.data_ptr() for p in tiny.model.parameters()}

    def hold(x: Tensor) -> Tensor:
        if x.data_ptr() not in own:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    watch = Watch(packed.lengths, topk=100, attention=True, recompute=recompute)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        packed.run(tiny.model, watch)
    return sum(held.values())


def test_a_pass_keeps_little_more_than_what_enters_its_blocks() -> None:
    whole, little = kept_values(False), kept_values(True)
    assert little < whole / 5


def test_recomputation_wants_passes_from_the_start() -> None:
    tiny = trainer()
    model: Transformer = tiny.model
    cache = model.new_cache()
    ids = torch.arange(8)
    recorder = Recorder()
    model.run(ids, [cache], [8], recorder=recorder)
    recorder.recompute = True
    with pytest.raises(ValueError, match="set recompute to False"):
        model.run(ids, [cache], [8], recorder=recorder)


def test_a_run_may_begin_to_recompute() -> None:
    """It changes no bit, so checkpoints of either kind go on, those from before the rule too."""
    tiny, other = trainer(), trainer(replace(RULES, recompute=True))
    assert isinstance(other, Trainer)
    tiny.step()
    saved = tiny.saved()
    del saved.state["rules"]["recompute"]  # type: ignore[attr-defined]
    other.resume(saved)
    assert other.step()["loss"] == tiny.step()["loss"]
    older = tiny.saved()
    del older.state["rules"]["bfloat16_muon"]  # type: ignore[attr-defined]
    del older.state["rules"]["schedule"]["fp8_from"]  # type: ignore[attr-defined]
    trainer(replace(RULES, schedule=replace(RULES.schedule, fp8_from=0.9))).resume(older)
