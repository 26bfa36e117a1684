"""Rates and weights over a run, and the judgement of spikes."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest

from abyssal.train.schedule import Schedule
from abyssal.train.spikes import SpikeWatch, Verdict


def test_the_rate_rises_stays_and_falls() -> None:
    schedule = Schedule(1001, warmup=100, decay_from=0.6)
    rates = [schedule.rate(step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01) and rates[49] == pytest.approx(0.5) and rates[99] == 1.0
    assert rates[99:601] == [1.0] * 502
    assert all(a > b for a, b in itertools.pairwise(rates[600:]))
    assert rates[800] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_short_runs_have_finite_rates(steps: int) -> None:
    schedule = Schedule(steps, warmup=0, decay_from=1.0)
    assert all(0.1 <= schedule.rate(step) <= 1.0 for step in range(steps + 3))


def test_weights_switch_where_the_specification_says() -> None:
    schedule = Schedule(101, warmup=5, decay_from=0.5)
    assert [schedule.mtp_weight(step) for step in (0, 50, 51, 100)] == [0.3, 0.3, 0.1, 0.1]
    assert [schedule.bias_step(step) for step in (0, 50, 51, 100)] == [0.005, 0.005, 0.001, 0.001]
    assert [schedule.dense(step) for step in (0, 60, 61, 100)] == [True, True, False, False]
    assert [sorted(schedule.formats(step)) for step in (0, 80, 81, 90, 91)] == [
        [], [], ["fp4"], ["fp4"], ["fp4", "fp8", "plain"]
    ]  # fmt: skip


def calm(watch: SpikeWatch, steps: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    for _ in range(steps):
        assert watch.judge(rng.gauss(3.0, 0.1), 0.5) is Verdict.APPLY


def test_a_spike_is_three_far_losses_in_a_row() -> None:
    watch = SpikeWatch()
    calm(watch, 250)
    assert [watch.judge(9.0, 0.5) for _ in range(3)] == [Verdict.APPLY, Verdict.APPLY, Verdict.ROLL_BACK]
    calm(watch, 1)
    # a near loss between them begins the count anew
    found = [watch.judge(loss, 0.5) for loss in (9.0, 9.0, 3.0, 9.0, 9.0, 9.0)]
    assert found == [Verdict.APPLY] * 5 + [Verdict.ROLL_BACK]
    assert max(watch.losses) < 4


def test_what_is_not_finite_is_skipped_at_once_and_forgotten() -> None:
    watch = SpikeWatch(window=4)
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf), (math.inf, 1.0), (1.0, math.nan)):
        assert watch.judge(loss, norm) is Verdict.SKIP
    assert watch.losses == []


def test_nothing_is_far_before_the_window_is_full() -> None:
    watch = SpikeWatch()
    calm(watch, 196)
    assert [watch.judge(9.0, 0.5) for _ in range(4)] == [Verdict.APPLY] * 4


def test_judgement_resumes() -> None:
    watch = SpikeWatch(window=20)
    calm(watch, 30)
    watch.judge(9.0, 1.0)
    other = SpikeWatch(window=20)
    other.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert [watch.judge(9.0, 1.0) for _ in range(2)] == [other.judge(9.0, 1.0) for _ in range(2)]
    assert watch.losses == other.losses and watch.far == other.far == 0
