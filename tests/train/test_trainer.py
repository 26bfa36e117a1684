"""One step against NumPy and against itself in other cuts; what is skipped, refused and gone back to."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from abyssal.base.errors import ConfigError
from abyssal.train import checkpoint, muon
from abyssal.train.packing import Pack, Sample, pack
from abyssal.train.trainer import Trainer, _Clock, joined
from tests.model.test_against_plain import official
from tests.oracle import plain
from tests.train.tiny import RULES, trainer


def surprise(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(1, keepdims=True)
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(targets)), targets]


def test_the_loss_of_a_step_is_numpys() -> None:
    """Next-token and MTP loss over both passes of a step, by the plain forward, document by document."""
    tiny = trainer(replace(RULES, skip_share=0.0))
    config, weights = asdict(tiny.model.config), official(tiny.model)
    config["index_topk"] = 1000  # the first steps read all blocks
    packs = trainer(replace(RULES, skip_share=0.0))._packs(0)
    main: list[float] = []
    draft: list[float] = []
    for packed in packs:
        first = 0
        for length in packed.lengths:
            ids = [*packed.ids_T[first : first + length].tolist(), int(packed.targets_T[first + length - 1])]
            logits = plain.forward(config, weights, ids)
            main += surprise(logits[:-1], np.array(ids[1:])).tolist()
            later = plain.forward(config, weights, ids, mtp=True)
            draft += surprise(later[:-1], np.array(ids[2:])).tolist()
            first += length
    line = tiny.step()
    # a mean of hundreds of float32 logarithms near 4.6
    assert abs(line["loss"] - np.mean(main)) < 2e-5
    assert abs(line["mtp_loss"] - np.mean(draft)) < 2e-5
    assert line["tokens"] == len(main) == sum(packed.tokens for packed in packs)


def gradients(packs: list[Pack]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    tiny = trainer(replace(RULES, length=1))
    losses, _, _ = tiny._learn([(packed, {}) for packed in packs], _Clock())
    return losses, {n: p.grad for n, p in tiny.model.named_parameters() if p.grad is not None}


def test_passes_of_a_step_add_up_to_one_mean() -> None:
    """Uneven passes: a mean of their means would weigh the short one's tokens more."""
    rng = np.random.default_rng(0)
    documents = [Sample(rng.integers(0, 97, n), rng.random(n) < 0.6) for n in (200, 9, 30, 150)]
    losses, whole = gradients([pack(documents)])
    again, parts = gradients([pack(documents[:1]), pack(documents[1:3]), pack(documents[3:])])
    for name in losses:
        assert again[name] == pytest.approx(losses[name], rel=1e-5), name
    assert set(whole) == set(parts)
    for name, grad in whole.items():
        # float32 sums of a few hundred terms in another order
        assert float(torch.dist(grad, parts[name])) <= 1e-4 * float(grad.norm()) + 1e-9, name


def test_every_parameter_learns_and_only_indexers_from_their_loss() -> None:
    tiny = trainer()
    packs = tiny._packs(0)
    tiny._learn([(packed, {}) for packed in packs], _Clock())
    for name, p in tiny.model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name
    without = trainer(replace(RULES, index=0.0))
    without._learn([(packed, {}) for packed in packs], _Clock())
    for name, p in without.model.named_parameters():
        if ".indexer." in name:
            assert p.grad is None or not p.grad.any()
        elif p.grad is not None:
            assert torch.equal(p.grad, tiny.model.get_parameter(name).grad), name  # type: ignore[arg-type]


def test_a_tiny_run_learns() -> None:
    """Through dense and sparse selection and all stages of rounding; every number of its lines is finite."""
    tiny = trainer()
    lines = [tiny.step() for _ in range(20)]
    # counting modulo 97 begins at log 97 = 4.57
    assert lines[0]["loss"] > 4.4 and lines[-1]["loss"] < 3.0 and lines[-1]["mtp_loss"] < 3.5
    for line in lines:
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
        assert line["verdict"] == "apply" and json.loads(json.dumps(line)) == line
        assert line["update_rms"]["muon"] == pytest.approx(0.18, rel=0.05)
        assert len(line["max_violation"]) == 3
        assert set(line["seconds"]) == {"data", "forward", "backward", "update"}
    biases = [p for n, p in tiny.model.named_parameters() if n.endswith("gate.bias")]
    assert all(bool(p.any()) for p in biases)


def test_without_a_rate_for_muon_adamw_takes_the_matrices() -> None:
    tiny = trainer(replace(RULES, muon=0.0))
    matrix = tiny.model.get_parameter("layers.0.attn.wkv.weight")
    before = matrix.detach().clone()
    line = tiny.step()
    assert line["update_rms"]["muon"] == 0 and line["update_rms"]["adamw"] > 0.1
    assert not torch.equal(matrix, before)


def test_a_step_that_is_not_finite_changes_nothing_but_the_place_in_the_data() -> None:
    tiny = trainer()
    tiny.step()
    before = {n: t.clone() for n, t in (tiny.model.state_dict() | tiny.optimiser.state_dict()).items()}
    place = tiny.data.state_dict()
    handle = tiny.model.embed.register_forward_hook(lambda module, ids, out: out * math.nan)
    line = tiny.step()
    handle.remove()
    assert line["verdict"] == "skip" and not math.isfinite(line["loss"])
    after = tiny.model.state_dict() | tiny.optimiser.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert tiny.data.state_dict() != place and tiny.step_number == 2
    line = tiny.step()
    assert line["verdict"] == "apply" and math.isfinite(line["loss"])
    assert not torch.equal(tiny.model.embed.weight, before["embed.weight"])


def test_a_spike_is_not_applied() -> None:
    tiny = trainer()
    tiny.step()
    tiny.spikes.losses, tiny.spikes.far = [0.1] * 200, 2
    before = tiny.model.embed.weight.detach().clone()
    assert tiny.step()["verdict"] == "roll back"
    assert torch.equal(tiny.model.embed.weight, before)


def test_after_a_spike_experts_are_those_of_the_parameters_before() -> None:
    """Chosen by the weights before the last update on the very batch; without a way back into another order."""
    tiny, other = trainer(), trainer()
    for _ in range(3):
        tiny.step()
        other.step()
    tiny.go_back(tiny.saved(), steps=3)
    first, same = tiny.step(), other.step()
    assert first["loss"] == same["loss"] and first["grad_norm"] == same["grad_norm"]
    assert "ahead" in first["seconds"] and len(tiny._ahead) == RULES.passes
    # the other trainer has made the same update: its choices on the same batch are the later ones
    later = [other._choices(packed) for packed, _ in tiny._ahead]
    early = trainer()
    for _ in range(3):
        early.step()
    moved = 0
    for number, (packed, choices) in enumerate(tiny._ahead):
        before = early._choices(packed)
        assert set(choices) == set(before) == {n for n, gate in tiny._gates.items() if gate.bias is not None}
        assert all(torch.equal(choices[name], before[name]) for name in choices)
        moved += sum(int((choices[name] != later[number][name]).sum()) for name in choices)
    assert moved > 0
    losses = [(tiny.step()["loss"], other.step()["loss"]) for _ in range(2)]
    assert losses[0][0] != losses[0][1] and tiny.anticipating == 0 and tiny._ahead == []
    assert "ahead" not in tiny.step()["seconds"]


def test_anticipation_resumes_to_the_bit(tmp_path: Path) -> None:
    tiny = trainer()
    tiny.go_back(tiny.saved(), steps=5)
    for _ in range(2):
        tiny.step()
    checkpoint.save(tmp_path, 2, tiny.saved())
    expected = [tiny.step()["loss"] for _ in range(5)]
    resumed = trainer()
    resumed.resume(checkpoint.load(tmp_path / "step_00000002"))
    assert [resumed.step()["loss"] for _ in range(5)] == expected
    assert resumed.data.state_dict() == tiny.data.state_dict()


def test_a_run_does_not_go_on_under_other_rules() -> None:
    tiny = trainer()
    tiny.step()
    saved = tiny.saved()
    plainly = replace(saved, state=json.loads(json.dumps(saved.state)))
    trainer().resume(plainly)
    with pytest.raises(ConfigError, match=r"other rules \(muon, schedule.warmup\)"):
        trainer(replace(RULES, muon=0.1, schedule=replace(RULES.schedule, warmup=9))).resume(plainly)
    with pytest.raises(ConfigError, match=r"other config \(.*rope_theta"):
        plainly.state["config"]["rope_theta"] = 5.0  # type: ignore[index]
        trainer().resume(plainly)


@pytest.mark.parametrize(
    ("lengths", "least", "expected"),
    [([5, 5, 5], 5, [5, 5, 5]), ([5, 5, 5], 6, [15]), ([9, 1, 1], 4, [11]), ([1], 4, [1]), ([4, 1, 3, 2], 4, [4, 6])],
)
def test_short_sequences_are_joined(lengths: list[int], least: int, expected: list[int]) -> None:
    assert joined(lengths, least) == expected and sum(expected) == sum(lengths)


@pytest.mark.parametrize("multiplies", [False, True])
def test_muon_takes_bfloat16_only_where_the_processor_multiplies_it(
    multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a checkpoint says from which step on it did; a run may go on where it does not."""
    asked = replace(RULES, bfloat16_muon=True)
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda: multiplies)
    here, there = ("bfloat16", "float32") if multiplies else ("float32", "bfloat16")
    tiny = trainer(asked)
    assert tiny.optimiser.muon.rule.dtype == getattr(torch, here)
    assert trainer(RULES).optimiser.muon.rule.dtype == torch.float32  # not asked for
    tiny.step()
    saved = tiny.saved()
    plainly = replace(saved, state=json.loads(json.dumps(saved.state)))
    assert plainly.state["muon_dtypes"] == [[0, here]]
    again = trainer(asked)
    again.resume(plainly)
    assert again.saved().state["muon_dtypes"] == [(0, here)]
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda: not multiplies)
    elsewhere = trainer(asked)
    elsewhere.resume(plainly)
    assert elsewhere.saved().state["muon_dtypes"] == [(0, here), (1, there)]


def test_packed_weights_are_no_model_to_train() -> None:
    """The trainer needs parameters; packing must not hide them from it."""
    tiny = trainer()
    assert isinstance(tiny, Trainer)
    assert {n for n, p in tiny.model.named_parameters() if p.requires_grad} == {
        *tiny.optimiser.muon.params,
        *tiny.optimiser.adamw.params,
    }
