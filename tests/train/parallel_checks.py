"""Parts of a run on two processes against one process, as a program for torchrun; silent where all is equal.

    torchrun --nproc-per-node 2 ... -m tests.train.parallel_checks FOLDER
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from abyssal.base.errors import CheckpointError, SaveError
from abyssal.model.block import Block
from abyssal.train import checkpoint
from abyssal.train.optimiser import Rates
from abyssal.train.order import Mixture, Share, Source
from abyssal.train.parallel.parts import part_of, spread_like, whole
from abyssal.train.parallel.processes import Processes
from abyssal.train.qat import FORMATS, quantised
from abyssal.train.trainer import Trainer, _Clock
from abyssal.train.world import local
from tests.faults import largest_file
from tests.train.tiny import RULES, documents, trainer


def parameters_are_shared_out(alone: Trainer, spread: Trainer) -> None:
    held = sum(local(p).numel() for p in spread.model.parameters())
    total = sum(p.numel() for p in alone.model.parameters())
    # vectors of odd length do not halve, and each process holds the whole bias of routers
    assert abs(held / total - 0.5) < 0.01, (held, total)
    for name, p in alone.model.named_parameters():
        assert torch.equal(whole(spread.model.get_parameter(name).detach()), p), name


def weights_are_rounded_as_one_process_rounds_them(alone: Trainer, spread: Trainer) -> None:
    with quantised(alone.model, FORMATS), quantised(spread.model, FORMATS):
        for name, p in alone.model.named_parameters():
            assert torch.equal(whole(spread.model.get_parameter(name).detach()), p), name
    parameters_are_shared_out(alone, spread)  # the masters are back


def updates_are_those_of_one_process(alone: Trainer, spread: Trainer) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, p in alone.model.named_parameters():
        if p.requires_grad:
            q = spread.model.get_parameter(name)
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = spread_like(part_of(p.grad, q).clone(), q)
    for params in ("_others", "_indexers"):
        one, two = (t.world.clip(getattr(t, params), 1.0) for t in (alone, spread))
        assert abs(one - two) < 1e-5 * one
    one, two = (t.optimiser.step(Rates(0.01, 0.01)) for t in (alone, spread))
    assert all(abs(one[name] - two[name]) < 1e-5 for name in one)
    for name, p in alone.model.named_parameters():
        # rates of 0.01 times float32's rounding of updates near 1
        torch.testing.assert_close(whole(spread.model.get_parameter(name).detach()), p, atol=1e-6, rtol=1e-5)


def short_documents_reach_no_long_block(experts: int) -> None:
    """What one process leaves without a gradient gets none; what another's documents reach gets theirs."""
    for length, reached in ((30, False), (200, True)):
        rules = replace(RULES, tokens=150 if length == 30 else 200)
        found = []
        for world in (None, Processes(experts)):
            tiny = trainer(rules, world)
            docs = [ids[:length] if i % 2 else ids[:20] for i, ids in enumerate(documents(0)) if len(ids) > 200]
            tiny.data = Mixture({"a": Source(docs, 0, 200)}, {"a": Share(1)})
            work = [(packed, {}) for packed in tiny._packs(0)]
            assert (max(max(packed.lengths) for packed, _ in work) >= 128) == reached
            tiny._learn(work, _Clock())
            found.append({name for name, p in tiny.model.named_parameters() if p.grad is not None})
        assert found[0] == found[1], found[0] ^ found[1]
        assert any("layers.2.attn.compressor" in name for name in found[0]) == reached


def tokens_find_their_experts_even_if_all_go_to_one_process(experts: int) -> None:
    """One process gets no token at all, and its experts' gradients are zero, not absent."""
    found = []
    for world in (None, Processes(experts)):
        tiny = trainer(replace(RULES, passes=2), world)
        for block in (*tiny.model.layers, *tiny.model.mtp):
            assert isinstance(block, Block)
            if block.ffn.gate.bias is not None:
                block.ffn.gate.bias[2:] = -100.0
            else:
                assert block.ffn.gate.tid2eid is not None
                block.ffn.gate.tid2eid.copy_(torch.tensor([0, 1]))
        losses, _, _ = tiny._learn([(packed, {}) for packed in tiny._packs(0)], _Clock())
        found.append((losses, {n: whole(p.grad) for n, p in tiny.model.named_parameters() if p.grad is not None}))
    (losses, grads), (same, parts) = found
    assert all(abs(losses[name] - same[name]) <= 1e-6 * losses[name] for name in losses)
    assert set(grads) == set(parts)
    for name, grad in grads.items():
        # float32 sums of a few hundred terms in another order
        assert float(torch.dist(grad, parts[name])) <= 1e-5 * float(grad.norm()) + 1e-9, name


def a_full_disk_of_one_process_leaves_the_last_checkpoint(spread: Trainer, folder: Path) -> None:
    before = spread.world.save(folder, 1, spread.saved())
    small = largest_file(10_000) if spread.world.rank else nullcontext()
    with pytest.raises(SaveError, match="the checkpoints before are unchanged"), small:
        spread.world.save(folder, 2, spread.saved())
    dist.barrier()
    assert checkpoint.latest(folder) == before
    spread.world.load(before, spread.saved())
    dist.barrier()
    if spread.world.rank == 0:
        shard = before / "__1_0.distcp"
        raw = bytearray(shard.read_bytes())
        raw[len(raw) // 2] ^= 1
        shard.write_bytes(raw)
    dist.barrier()
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        spread.world.load(before, spread.saved())


def main() -> None:
    torch.set_num_threads(1)
    for experts in (1, 2):
        alone, spread = trainer(), trainer(world=Processes(experts))
        parameters_are_shared_out(alone, spread)
        weights_are_rounded_as_one_process_rounds_them(alone, spread)
        updates_are_those_of_one_process(alone, spread)
        short_documents_reach_no_long_block(experts)
        tokens_find_their_experts_even_if_all_go_to_one_process(experts)
    a_full_disk_of_one_process_leaves_the_last_checkpoint(spread, Path(sys.argv[1]))
    spread.world.end()


if __name__ == "__main__":
    main()
