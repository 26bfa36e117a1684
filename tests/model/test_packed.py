"""A model whose weights lie in the order of the native kernels is the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from abyssal.checkpoint.load import load_model
from abyssal.checkpoint.save import make_release
from abyssal.kernels import choice
from abyssal.kernels.choice import forced
from abyssal.model import Transformer
from tests.cases import random_config, random_ids, random_model

ISAS = choice.choice().supported
pytestmark = pytest.mark.skipif(not ISAS, reason="no extension")


def same_state(a: Transformer, b: dict[str, torch.Tensor]) -> bool:
    state = a.state_dict()
    return list(state) == list(b) and all(
        x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip(state.values(), b.values(), strict=True)
    )


@pytest.mark.parametrize("seed", [0, 4])
def test_packing_changes_no_bit_and_shows_in_no_state(seed: int) -> None:
    config = random_config(seed)
    model = random_model(config, seed, torch.float32)
    ids = torch.tensor([random_ids(config, 150)])
    with forced(ISAS[0]), torch.inference_mode():
        before, state, size = model(ids), {n: t.clone() for n, t in model.state_dict().items()}, model.size
        assert model.pack().layers[0].attn.wq_a.weight is None
        assert torch.equal(model(ids), before)
        assert model.size == size
        assert same_state(model, state)
        again = Transformer(config)
        again.pack()
        again.load_state_dict(state)
        assert torch.equal(again(ids), before)
        assert torch.equal(model.unpack()(ids), before)
        assert same_state(model, state)


def test_moving_a_packed_model_unpacks_it() -> None:
    model = random_model(random_config(1), 1, torch.float32)
    with forced(ISAS[0]):
        wide = model.pack().double()
    assert wide.layers[0].attn.wq_a.weight.dtype == torch.float64


def test_quantised_weights_are_packed_as_stored(tmp_path: Path) -> None:
    from abyssal.arch.presets import preset

    make_release(preset("nano"), 0, "flash", tmp_path / "release")
    model = load_model(tmp_path / "release", keep_stored=True)
    ids = torch.tensor([random_ids(model.config, 40)])
    with forced(ISAS[0]), torch.inference_mode():
        before, state = model(ids), {n: t.clone() for n, t in model.state_dict().items()}
        model.pack()
        assert {w.format for w in model.layers[1].ffn.experts.packed.values()} == {"float4"}
        assert model.layers[1].attn.wo_a.packed["weight"].format == "float8"
        assert torch.equal(model(ids), before)
        assert same_state(model, state)


def test_weights_that_record_gradients_stay_parameters() -> None:
    model = random_model(random_config(0), 0, torch.float32).requires_grad_(True)
    with forced(ISAS[0]):
        model.pack()
    assert isinstance(model.layers[0].attn.wq_a.weight, torch.nn.Parameter)
