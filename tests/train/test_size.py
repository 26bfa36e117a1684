"""The test size learns to look up, far beyond the lengths that it was trained at (training.md 8.3).

One run guards compressor, indexer, its loss, sparse selection, position skips, Muon and quantised training at once.
"""

from __future__ import annotations

import pytest

from abyssal.checkpoint.load import load_model
from abyssal.model import Transformer
from abyssal.model.recorder import Recorder
from abyssal.train.data.pairs import MOST, Pairs
from abyssal.train.export import export
from abyssal.train.recipe import read_recipe, trainer_of
from abyssal.train.run import run
from abyssal.train.skills.pairs import Dense, look_up

pytestmark = pytest.mark.timeout(1500)  # the training is part of the first test
FAR = 32_768


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """Trained by its recipe, and loaded as a release: FP4 experts, FP8."""
    folder = tmp_path_factory.mktemp("size")
    recipe = read_recipe("test", ("pretrain.schedule.steps=400",))  # enough, and minutes less
    assert run(trainer_of(recipe, "pretrain", folder), folder / "run")
    export(folder / "run", folder / "release")
    loaded = load_model(folder / "release")
    assert isinstance(loaded, Transformer)
    return loaded


def right(model: Transformer, length: int, items: int, recorder: Recorder | None = None) -> float:
    """Share of the answers to pairs that no training sequence held."""
    ids = read_recipe("test").stage("pretrain").sources["pairs"].ids
    assert ids is not None
    found = look_up(model, Pairs(ids, "fixed"), length, items, recorder)
    assert found["n"] == items * MOST
    return found["rate"]


def test_sixteen_blocks_are_enough_far_beyond_the_trained_length(model: Transformer) -> None:
    assert right(model, 16_384, items=3) >= 0.99


def test_sparse_selection_answers_no_worse_than_dense_attention(model: Transformer) -> None:
    """How much worse dense reading is hangs on the bits of the training: 77% on one processor, 98% on another."""
    sparse = right(model, FAR, items=1)
    assert sparse >= 0.99
    assert right(model, FAR, items=1, recorder=Dense(FAR)) <= sparse
