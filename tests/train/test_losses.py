"""Every loss against autograd, finite differences or NumPy; and that recording changes no bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from abyssal.kernels.choice import choice, forced
from abyssal.kvcache import SequenceCache
from abyssal.model import Attended, Batch, Recorder, Transformer
from abyssal.model.moe import Gate
from abyssal.quant.numerics import Numerics
from abyssal.train.balance import max_violation, move_bias
from abyssal.train.losses import (
    attention_shares,
    balance_loss,
    cross_entropy,
    index_loss,
    index_scores,
    reading_queries,
)
from abyssal.train.watch import Watch
from tests.cases import random_config, random_ids, random_model


@pytest.mark.parametrize(("tokens", "rows"), [(1, 4), (7, 3), (9, 64), (64, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cross_entropy_and_its_gradient(tokens: int, rows: int, dtype: torch.dtype) -> None:
    """Against torch's, with masked tokens, a factor behind the loss, and extreme logits."""
    generator = torch.Generator().manual_seed(tokens)
    z = (torch.randn(tokens, 12, generator=generator, dtype=dtype) * 3).requires_grad_(True)
    head = (torch.randn(31, 12, generator=generator, dtype=dtype) * 3).requires_grad_(True)
    targets = torch.randint(31, (tokens,), generator=generator)
    weights = (torch.arange(tokens) % 3 != 1) / 5.0
    ours = cross_entropy(z, head, targets, weights, rows)
    plain = (F.cross_entropy(z @ head.T, targets, reduction="none") * weights).sum()
    mine = torch.autograd.grad(ours * 0.7, (z, head))
    theirs = torch.autograd.grad(plain * 0.7, (z, head))
    # a handful of roundings of terms that are at most 200
    tolerance = 1e-12 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(ours, plain, rtol=0, atol=tolerance)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=tolerance)


def test_cross_entropy_of_no_target_is_zero_and_a_bad_masked_target_is_not_read() -> None:
    z = torch.randn(3, 4, requires_grad=True)
    head = torch.randn(5, 4, requires_grad=True)
    loss = cross_entropy(z, head, torch.tensor([-100, 99, 0]), torch.zeros(3))
    loss.backward()
    assert loss.item() == 0 and z.grad is not None and not z.grad.any()


def test_cross_entropy_of_one_step_is_numpys() -> None:
    """The loss of a whole model's pass, computed from its hidden states in NumPy's float64."""
    config = random_config(0)
    model = random_model(config, 0)
    ids = torch.tensor(random_ids(config, 40))
    z = model.run(ids[:-1], [model.new_cache()]).z_TD
    ours = float(cross_entropy(z, model.head.weight, ids[1:], torch.full((39,), 1 / 39)))
    logits = z.numpy() @ model.head.weight.numpy().T
    logits -= logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert abs(ours + logs[np.arange(39), ids[1:].numpy()].mean()) < 1e-7  # weights are float32 here


def balance_in_numpy(logits: np.ndarray, chosen: np.ndarray, lengths: list[int]) -> float:
    total, first = 0.0, 0
    scores = np.sqrt(np.log1p(np.exp(logits)))
    E, K = logits.shape[1], chosen.shape[1]
    for length in lengths:
        f, share = np.zeros(E), np.zeros(E)
        for t in range(first, first + length):
            f[chosen[t]] += E / (K * length)
            share += scores[t] / scores[t].sum() / length
        total += float(f @ share)
        first += length
    return total


def test_balance_loss_is_its_formula_and_its_gradient_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(11)])
    lengths = [4, 1, 6]
    loss = balance_loss(logits, chosen, lengths)
    assert abs(loss.item() - balance_in_numpy(logits.detach().numpy(), chosen.numpy(), lengths)) < 1e-12
    assert torch.autograd.gradcheck(lambda x: balance_loss(x, chosen, lengths), (logits,))


def test_balance_loss_is_one_in_balance_and_more_beside_it() -> None:
    logits = torch.zeros(8, 4)
    even = torch.arange(8).remainder(4).unsqueeze(1)
    assert float(balance_loss(logits, even, [8])) == pytest.approx(1.0)
    biased = F.one_hot(torch.zeros(8, dtype=torch.int64), 4) * 5.0
    assert float(balance_loss(biased, torch.zeros(8, 1, dtype=torch.int64), [8])) > 1.5


def test_bias_moves_against_the_load() -> None:
    gate = Gate(random_config(0), hashed=False)
    assert gate.bias is not None
    E = len(gate.bias)
    loads = torch.full((E,), 10)
    loads[0], loads[1] = 15, 5
    move_bias(gate, loads, 0.25)
    expected = torch.zeros(E)
    expected[0], expected[1] = -0.25, 0.25
    assert torch.equal(gate.bias.data, expected)
    assert max_violation(loads) == pytest.approx(0.5)
    assert max_violation(torch.zeros(E, dtype=torch.int64)) == 0.0
    hashed = Gate(random_config(0), hashed=True)
    move_bias(hashed, loads, 0.25)
    assert hashed.bias is None


class Keep(Recorder):
    """Keeps what it is told."""

    watches_attention = True

    def __init__(self, topk: int | None = None) -> None:
        self.topk = topk
        self.seen: list[Attended] = []

    def attended(self, layer: torch.nn.Module, seen: Attended) -> None:
        self.seen.append(seen)


def scores_of(seen: Attended, part: slice, sequence: int) -> torch.Tensor:
    return index_scores(seen.index_q_TIJ[part], seen.index_weights_TI[part], seen.keys_GBJ[sequence])


def shares_of(seen: Attended, part: slice, sequence: int) -> torch.Tensor:
    return attention_shares(seen, part, seen.blocks_GBC[sequence], seen.read_TB[part])[0]


def seen_by(model: Transformer, lengths: list[int], topk: int | None = None) -> list[Attended]:
    memory = model.new_memory()
    ids = torch.tensor(random_ids(model.config, sum(lengths), 3))
    keep = Keep(topk)
    model.run(ids, [SequenceCache(memory) for _ in lengths], lengths, recorder=keep)
    return keep.seen


@pytest.mark.parametrize("kernels", ["reference", *choice().supported])
@pytest.mark.parametrize("topk", [None, 64])
def test_shares_are_those_that_attention_uses(kernels: str, topk: int | None) -> None:
    """With values that name their block, the output of attention would be the shares; so compute them by hand."""
    config = random_config(3 if topk else 1)
    config = replace(config, compress_ratios=(4, 0), num_hidden_layers=1, num_hash_layers=0, index_topk=3)
    with forced(kernels):
        model = random_model(config, 1, torch.float32)
        (seen,) = seen_by(model, [30, 17, 17, 3], topk)
    first = 0
    for group, length in enumerate([30, 17, 17, 3]):
        for t in range(length):
            row = first + t
            blocks = seen.read_TB[row].nonzero().squeeze(1)
            assert len(blocks) == min((t + 1) // 4, topk or 3)
            near = seen.near_KC[seen.index_TW[row][seen.mask_TW[row]]]
            assert len(near) == min(t + 1, config.sliding_window)
            keys = torch.cat([seen.blocks_GBC[group][blocks], near]).double()
            logits = torch.cat([seen.q_THC[row].double() @ keys.T * seen.scale, seen.sink_H.double()[:, None]], 1)
            by_hand = logits.softmax(1)[:, : len(blocks)].sum(0)
            shares = shares_of(seen, slice(row, row + 1), group)[0].double()
            if len(blocks):
                torch.testing.assert_close(shares[blocks], by_hand / by_hand.sum(), rtol=1e-4, atol=1e-6)
            assert float(shares.sum()) == pytest.approx(float(len(blocks) > 0), abs=1e-5)
        first += length


@pytest.mark.parametrize("kernels", ["reference", *choice().supported])
def test_a_sparse_selection_takes_the_best_scores(kernels: str) -> None:
    """What is read is what the recorded scores choose: queries, keys and blocks belong together."""
    config = replace(
        random_config(0), compress_ratios=(4, 4, 0), num_hidden_layers=2, num_hash_layers=0, index_topk=2
    )
    with forced(kernels):
        seen_of_layers = seen_by(random_model(config, 1, torch.float32), [41, 26])
    for seen in seen_of_layers:
        first = 0
        for group, length in enumerate([41, 26]):
            scores = scores_of(seen, slice(first, first + length), group)
            for t in range(8, length):
                visible = (t + 1) // 4
                read = seen.read_TB[first + t]
                assert int(read.sum()) == min(visible, 2) and not read[visible:].any()
                worst, rest = scores[t][read].min(), scores[t][:visible][~read[:visible]]
                assert not len(rest) or float(worst) >= float(rest.max()) - 1e-4 * float(scores[t].abs().max())
            first += length


@pytest.mark.parametrize("topk", [None, 64])
def test_index_loss_reaches_the_indexer_alone_and_agrees_with_finite_differences(topk: int | None) -> None:
    config = replace(random_config(0), compress_ratios=(0, 4, 4, 0), num_hash_layers=1, index_topk=3)
    model = random_model(config, 2).requires_grad_(True)

    def loss() -> torch.Tensor:
        return torch.stack([index_loss(seen, 16) for seen in seen_by(model, [37, 22, 22, 2], topk)]).sum()

    loss().backward()
    indexers = {n: p for n, p in model.named_parameters() if ".indexer." in n}
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == (name in indexers), name
    checked = 0
    for name, p in indexers.items():
        assert p.grad is not None
        place = int(p.grad.abs().argmax())
        flat, step = p.data.view(-1), 1e-6
        value = float(flat[place])
        with torch.no_grad():
            flat[place] = value + step
            above = float(loss())
            flat[place] = value - step
            below = float(loss())
            flat[place] = value
        numeric = (above - below) / (2 * step)
        # a loss of some tens in float64, and a relu that may bend inside the step for a few of many products
        assert abs(numeric - float(p.grad.view(-1)[place])) <= 1e-6 + 1e-3 * abs(numeric), name
        checked += 1
    assert checked == 2 * 6


def test_index_loss_is_the_divergence_by_hand_and_steps_do_not_matter() -> None:
    config = replace(random_config(0), compress_ratios=(4, 0), num_hidden_layers=1, num_hash_layers=0)
    (seen,) = seen_by(random_model(config, 2), [23, 9], topk=64)
    total, queries = 0.0, 0
    for group, (first, length) in enumerate([(0, 23), (23, 9)]):
        for t in range(3, length):
            visible = (t + 1) // 4
            row = slice(first + t, first + t + 1)
            p = shares_of(seen, row, group)[0, :visible].numpy()
            scores = scores_of(seen, row, group)[0, :visible].numpy()
            q = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            total += float((p * np.log(p / q)).sum())
            queries += 1
    assert abs(float(index_loss(seen)) - total) < 1e-9 * max(total, 1)
    assert abs(float(index_loss(seen, 5)) - total) < 1e-9 * max(total, 1)
    assert queries == reading_queries([23, 9], 4) and total > 0.1


def test_gathered_blocks_give_the_same_loss_and_gradients() -> None:
    config = replace(random_config(0), compress_ratios=(4, 0), num_hidden_layers=1, num_hash_layers=0, index_topk=3)
    model = random_model(config, 2).requires_grad_(True)
    found = []
    for sparse in (0, 1000):
        model.zero_grad()
        (seen,) = seen_by(model, [90, 33, 33, 2])
        loss = index_loss(seen, 40, sparse)
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (one, gradients), (two, others) = found
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
    assert set(gradients) == set(others) and len(gradients) == 6
    for name, grad in gradients.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["exact", "fake"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recording_changes_no_bit(mode: str, dtype: torch.dtype) -> None:
    """Of the logits, the streams and the gradients of the main loss."""
    config = replace(random_config(5), index_topk=2)
    model = random_model(config, 1, dtype, Numerics.of(mode)).requires_grad_(True)  # type: ignore[arg-type]
    ids = torch.tensor(random_ids(config, 150, 1))
    lengths = [101, 49]

    def run(recorder: Recorder | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        memory = model.new_memory()
        caches = [SequenceCache(memory) for _ in lengths]
        out = model.run(ids, caches, lengths, recorder=recorder)
        start = Batch(caches, lengths, [0, 0])
        start.recorder = recorder
        z, _ = model.draft(out.streams_TND, ids.roll(-1), start)
        model.zero_grad()
        (model.logits(out.z_TD).square().mean() + model.logits(z).square().mean()).backward()
        main = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and ".indexer." not in n}
        with torch.no_grad():
            again = model.run(ids, [SequenceCache(m := model.new_memory()), SequenceCache(m)], lengths)
        assert torch.equal(again.z_TD, out.z_TD)  # training has the bits of inference
        return torch.cat([out.z_TD, z]).detach(), main

    watch = Watch(lengths, attention=True)
    z, grads = run(None)
    z_watched, grads_watched = run(watch)
    assert torch.equal(z, z_watched)
    assert set(grads) == set(grads_watched)
    assert all(torch.equal(grads[n], grads_watched[n]) for n in grads)
    assert watch.loads and all(int(n.sum()) == 150 * config.num_experts_per_tok for n in watch.loads.values())
    assert watch.balance.item() > 0 and watch.index.item() > 0


def test_given_choices_replace_the_routers() -> None:
    """The same choice changes no bit; another one is taken, with weights from the current scores."""
    config = replace(random_config(0), num_hash_layers=0)
    model = random_model(config, 1, torch.float32)
    ids = torch.tensor(random_ids(config, 33, 1))
    first = Watch([33])
    z = model.run(ids, [model.new_cache()], recorder=first).z_TD
    again = Watch([33], choices=first.chosen)
    assert torch.equal(model.run(ids, [model.new_cache()], recorder=again).z_TD, z)
    others = {gate: (chosen + 1) % config.n_routed_experts for gate, chosen in first.chosen.items()}
    moved = Watch([33], choices=others)
    assert not torch.equal(model.run(ids, [model.new_cache()], recorder=moved).z_TD, z)
    assert all(torch.equal(moved.chosen[gate], others[gate]) for gate in others)
