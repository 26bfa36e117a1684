"""Plans against numbers computed by hand, and against what a pass really keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from abyssal.arch.presets import preset
from abyssal.arch.schedule import LayerKind
from abyssal.base.errors import ConfigError
from abyssal.train.plan import USABLE, Gpu, kept_floats, plan, training_flops
from tests.train.test_recompute import kept_values
from tests.train.tiny import RULES, trainer

FLASH = preset("flash")
BIG = Gpu("big", 200e9, 1e15)
PARAMETERS = 290_942_289_362  # of the whole model with its MTP block


def test_memory_of_flash() -> None:
    found = plan(FLASH, 256, gpu=BIG, tokens=4096, length=4096)
    assert (found.experts, found.replicas) == (1, 256)
    found = plan(FLASH, 256, gpu=replace(BIG, memory=110e9), tokens=4096, length=4096)
    assert (found.experts, found.replicas) == (2, 128)
    need = found.need
    assert need.weights == need.gradients == PARAMETERS * 4 / 256
    # AdamW keeps two moments of embedding, head and vectors, Muon one buffer of everything else
    assert need.optimiser == pytest.approx((PARAMETERS + 2 * 129280 * 4096) * 4 / 256, rel=1e-4)
    # embedding, head, last norm, last collapse
    root = 2 * 129280 * 4096 + 4096 + 4 * 4 * 4096 + 4 + 1
    experts = 256 * 3 * 4096 * 2048
    assert need.gathered == pytest.approx(4 * (2 * root + 3 * (experts / 2 + 167_597_947)), rel=1e-6)
    streams, largest = 4 * 4096, 398_092
    assert need.activations == 4 * 4096 * (44 * streams + 2 * largest)
    assert need.total == pytest.approx(sum((need.weights * 2, need.optimiser, need.gathered, need.activations)))
    assert found.other.activations > 8 * need.activations and found.other.weights == need.weights


def test_what_a_csa_block_of_flash_keeps() -> None:
    mixes = 2 * (4 * 4096 + 2 * 4096)
    attention = 2 * 1024 + 3 * 64 * 512 + 2 * 512 + 8 * 1024
    experts = 2 * 2048 * 7 + 3 * 256 + 2 * 6 * 4097
    blocks = 4 * 2 * 512 + 4 * 2 * 128 + 3 * 64 * 128 + 512 * (2 * 64 + 128)
    assert kept_floats(FLASH, LayerKind.CSA, True) == mixes + attention + experts + blocks == 398_092


def test_operations_of_flash() -> None:
    """Six for each parameter that a token multiplies with, and what it reads at the mean context of 2,048."""
    D, heads = 4096, 64 * 512
    attention = D * 1024 + 1024 * heads + D * 512 + heads * 1024 + 8 * 1024 * D
    block = attention + 7 * 3 * D * 2048 + D * 256 + 2 * 6 * 16 * D
    csa = 1024 * 64 * 128 + 4 * D * 512 + 4 * D * 128 + D * 64
    head = 16 * D + 129280 * D
    products = 43 * block + 21 * csa + 20 * 2 * D * 512 + head
    products += block + head + 5 * D * D  # MTP: the next embedding and four streams enter
    entries = 2 * 128 + 21 * (128 + 512) + 20 * (128 + 16) + 128
    scores = 21 * 2 * 64 * 128 * 512
    assert training_flops(FLASH, 4096) == 3 * (2 * products + 4 * heads * entries + scores)


def test_speed_is_the_stated_share_of_the_peak() -> None:
    found = plan(FLASH, 512, gpu=BIG, mfu=0.5)
    assert found.tokens_per_s == 0.5 * 1e15 * 512 / found.flops
    text = found.text()
    assert text.startswith("computed, not measured: 512 x big") and f"{found.tokens_per_s:,.0f} tokens/s" in text
    assert f"{found.need.total / 1e9:.2f} GB of 200" in text


def test_one_gpu_gathers_nothing() -> None:
    found = plan(preset("nano"), 1, tokens=1024, length=1024)
    assert found.need.gathered == 0 and found.replicas == 1
    assert found.need.weights == 4 * 17_345_472


def test_the_smallest_number_that_fits_is_named() -> None:
    with pytest.raises(ConfigError, match=r"does not fit into 8 x H100 80 GB: it needs (\d+) at least") as refusal:
        plan(FLASH, 8)
    least = int(str(refusal.value).split("needs ")[1].split()[0])
    assert plan(FLASH, least).need.total <= USABLE * 80e9
    for fewer in range(least - 16, least):
        with pytest.raises(ConfigError):
            plan(FLASH, fewer)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gpus": 0}, "cannot plan 0 GPUs"),
        ({"gpus": 8, "tokens": 100}, "passes of 100 tokens"),
        ({"gpus": 8, "mfu": 1.5}, "MFU 1.5"),
        ({"gpus": 8, "tokens": 1 << 20}, "make them shorter"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        plan(FLASH, **options)  # type: ignore[arg-type]


def test_a_pass_keeps_about_what_is_planned() -> None:
    """Saved tensors of a real pass; the formula leaves out indices, masks and rotations, and counts no reuse."""
    tiny = trainer(RULES)
    (packed, *_) = tiny._packs(0)
    kinds = [*tiny.model.config.kinds, LayerKind.SWA]
    planned = 4 * packed.tokens * sum(kept_floats(tiny.model.config, kind, False) for kind in kinds)
    assert 0.6 < kept_values(False) / planned < 1.7
