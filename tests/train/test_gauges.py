"""Index recall and sink mass against loops over queries, heads and blocks."""

from __future__ import annotations

import math

import pytest
import torch

from abyssal.model.recorder import Attended
from abyssal.train.gauges import QUERIES, Gauges

RATIO = 4


def attended(lengths: list[int], seed: int = 0) -> Attended:
    """Random numbers: 2 heads of 8 channels, 16 index heads of 4 (so that no scores are equal), windows of 5."""
    rng = torch.Generator().manual_seed(seed)
    total, most = sum(lengths), max(lengths) // RATIO
    groups, first = [], 0
    for length in lengths:
        groups.append((first, length, 1))
        first += length
    return Attended(
        q_THC=torch.randn(total, 2, 8, generator=rng),
        near_KC=torch.randn(total, 8, generator=rng),
        index_TW=torch.randint(0, total, (total, 5), generator=rng),
        mask_TW=torch.rand(total, 5, generator=rng) < 0.7,
        blocks_GBC=torch.randn(len(lengths), most, 8, generator=rng),
        read_TB=torch.zeros(total, most, dtype=torch.bool),  # what it reads now does not matter
        sink_H=torch.randn(2, generator=rng),
        scale=8**-0.5,
        index_q_TIJ=torch.randn(total, 16, 4, generator=rng),
        index_weights_TI=torch.randn(total, 16, generator=rng),
        keys_GBJ=torch.randn(len(lengths), most, 4, generator=rng),
        groups=tuple(groups),
    )


def by_hand(seen: Attended, sequence: int, topk: int) -> tuple[list[float], list[float]]:
    """Recalls of the queries that choose, and sink masses of all queries and heads."""
    first, length, _ = seen.groups[sequence]
    recalls, sinks = [], []
    for place in range(max(length - QUERIES, 0), length):
        row, visible = first + place, (place + 1) // RATIO
        shares = [0.0] * visible
        for head in range(2):
            q = seen.q_THC[row, head] * seen.scale
            far = [math.exp(float(q @ seen.blocks_GBC[sequence, b])) for b in range(visible)]
            near = [
                math.exp(float(q @ seen.near_KC[seen.index_TW[row, w]])) for w in range(5) if seen.mask_TW[row, w]
            ]
            sink = math.exp(float(seen.sink_H[head]))
            whole = sum(far) + sum(near) + sink
            shares = [share + f / whole for share, f in zip(shares, far, strict=True)]
            sinks.append(sink / whole)
        if visible > topk:
            weights, q, keys = seen.index_weights_TI[row], seen.index_q_TIJ[row], seen.keys_GBJ[sequence]
            scores = [
                sum(float(weights[i]) * max(float(q[i] @ keys[b]), 0) for i in range(16)) for b in range(visible)
            ]
            best, chosen = (set(sorted(range(visible), key=x.__getitem__)[-topk:]) for x in (shares, scores))
            recalls.append(len(best & chosen) / topk)
    return recalls, sinks


@pytest.mark.parametrize(("lengths", "sequence"), [([37], 0), ([9, 90, 41], 1), ([100, 130], 1)])
def test_against_loops(lengths: list[int], sequence: int) -> None:
    seen, gauges = attended(lengths), Gauges(RATIO, topk=3)
    gauges.add(seen)
    recalls, sinks = by_hand(seen, sequence, 3)
    assert gauges.recall == pytest.approx(sum(recalls) / len(recalls))
    assert gauges.sink_mass == pytest.approx(sum(sinks) / len(sinks), rel=1e-5)


def test_an_indexer_that_scores_as_attention_does_finds_all() -> None:
    seen = attended([80])
    scored = Attended(**{
        **seen.__dict__, "q_THC": seen.q_THC[:, :1], "sink_H": seen.sink_H[:1], "index_weights_TI": torch.ones(80, 1),
        # relu(x + 100) orders as x does: one more channel carries the 100
        "index_q_TIJ": torch.cat([seen.q_THC[:, :1], torch.ones(80, 1, 1)], -1),
        "keys_GBJ": torch.cat([seen.blocks_GBC, torch.full((1, 20, 1), 100.0)], -1),
    })  # fmt: skip
    gauges = Gauges(RATIO, topk=4)
    gauges.add(scored)
    assert gauges.recall == 1.0


def test_nothing_to_count() -> None:
    gauges = Gauges(RATIO, topk=3)
    gauges.add(attended([4]))
    assert gauges.recall is None
    assert gauges.sink_mass is not None
    assert Gauges(RATIO, topk=3).sink_mass is None
