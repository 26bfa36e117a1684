"""Inventories of other sizes and layouts than the released ones, whose totals test_numbers.py holds."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest

from abyssal.arch.config import ModelConfig
from abyssal.arch.presets import preset
from abyssal.arch.tensors import (
    ITEM_BYTES,
    TensorSpec,
    default_layout,
    inventory,
    is_draft_copy,
    parameters,
    totals,
)
from tests.oracle import efficiency_check as oracle


def odd_config(ratios: tuple[int, ...], hashed: int) -> ModelConfig:
    """Sizes that differ from each other, and that no FP8 tile divides."""
    return replace(
        preset("nano"),
        vocab_size=97,
        hidden_size=192,
        num_hidden_layers=len(ratios),
        compress_ratios=(*ratios, 0),
        num_hash_layers=hashed,
        num_attention_heads=6,
        head_dim=72,
        qk_rope_head_dim=16,
        q_lora_rank=40,
        o_groups=3,
        o_lora_rank=24,
        index_n_heads=5,
        index_head_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=160,
        hc_mult=3,
    )


def oracle_model(c: ModelConfig) -> oracle.V4:
    """The same model for the specification's calculator."""
    return oracle.V4(
        "odd",
        c.hidden_size,
        c.num_hidden_layers,
        c.backbone_ratios,
        c.num_attention_heads,
        c.q_lora_rank,
        c.o_groups,
        c.n_routed_experts,
        c.moe_intermediate_size,
        c.index_topk,
        head_dim=c.head_dim,
        rope_dim=c.qk_rope_head_dim,
        o_lora=c.o_lora_rank,
        idx_heads=c.index_n_heads,
        idx_dim=c.index_head_dim,
        window=c.sliding_window,
        active=c.num_experts_per_tok,
        vocab=c.vocab_size,
        hc=c.hc_mult,
        n_hash=c.num_hash_layers,
    )


@pytest.mark.parametrize("hashed", [0, 1, 3])
@pytest.mark.parametrize("ratios", [(0, 4, 128), (4, 4, 4), (128, 0, 4), (0, 0, 0)])
@pytest.mark.parametrize("layout", ["flash", "base", "0731"])
def test_odd_sizes_agree_with_the_calculator(ratios: tuple[int, ...], hashed: int, layout: str) -> None:
    config = odd_config(ratios, hashed)
    tail = "mtp"
    if layout == "base":
        config = replace(config, expert_dtype="fp8")
    if layout == "0731":
        spark = preset("flash-0731").dspark
        assert spark is not None
        spark = replace(spark, markov_rank=20, target_layer_ids=(0, 0, 0))
        config = replace(config, dspark=spark, compress_ratios=(*ratios, 0, 0, 0))
        tail = "dspark"
    assert default_layout(config) == layout
    ours = [(s.name, s.dtype, s.shape) for s in inventory(config)]
    theirs = list(oracle.inventory(oracle_model(config), tail=tail, base=layout == "base", markov=20))
    assert len(set(ours)) == len(ours)
    copies = [s for s in ours if is_draft_copy(s[0])]
    assert {s for s in ours if s not in copies} == {s for s in theirs if "copy" not in s[0]}
    assert [s[1:] for s in copies] == [s[1:] for s in theirs if "copy" in s[0]]
    assert (totals(inventory(config)).tensors, totals(inventory(config)).nbytes) == oracle.tally(theirs)[:2]


@pytest.mark.parametrize(("layout", "wide"), [("bf16", "BF16"), ("fp32", "F32")])
def test_unquantised_layouts_keep_names_and_parameters(layout: str, wide: str) -> None:
    config = odd_config((0, 4, 128), 1)
    plain = replace(config, expert_dtype=None, torch_dtype="float32" if layout == "fp32" else "bfloat16")
    assert default_layout(plain) == layout
    stored = {s.name: s for s in inventory(config)}
    wider = {s.name: s for s in inventory(plain)}
    assert set(wider) == {name for name in stored if not name.endswith(".scale")}
    for name, spec in wider.items():
        before = stored[name]
        assert (spec.format, spec.scale, spec.parameters) == ("plain", None, before.parameters), name
        packed = 2 if before.format == "fp4" else 1
        assert spec.shape == (*before.shape[:-1], before.shape[-1] * packed), name
        kept = before.dtype in ("F32", "I64")  # mHC, sinks, biases and routing tables never change
        assert spec.dtype == (before.dtype if kept else wide), name
    assert parameters(inventory(plain)) == parameters(inventory(config))


@pytest.mark.parametrize("name", ["nano", "flash", "flash-base", "flash-0731"])
def test_each_scale_covers_its_weight_once(name: str) -> None:
    specs = {s.name: s for s in inventory(preset(name))}
    owners = [spec.scale for spec in specs.values() if spec.scale]
    assert sorted(owners) == sorted(n for n in specs if n.endswith(".scale"))
    for spec in specs.values():
        if spec.scale:
            rows, columns = spec.shape
            want = (rows, columns * 2 // 32) if spec.format == "fp4" else (ceil(rows / 128), ceil(columns / 128))
            assert specs[spec.scale].shape == want
            assert specs[spec.scale].dtype == ("F32" if name.endswith("base") else "F8_E8M0")


@pytest.mark.parametrize(("base", "name"), [("flash-base", "flash"), ("pro-base", "pro")])
def test_a_base_release_adds_two_copies(base: str, name: str) -> None:
    copies = [s for s in inventory(preset(base)) if is_draft_copy(s.name)]
    c = preset(base)
    assert [(s.dtype, s.shape) for s in copies] == [("BF16", (c.vocab_size, c.hidden_size))] * 2
    assert not [s for s in inventory(preset(name)) if is_draft_copy(s.name)]
    copies = parameters(inventory(preset(base))) - parameters(inventory(preset(name)))
    assert copies == 2 * c.vocab_size * c.hidden_size


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("mtp.0.emb.weight", True),
        ("mtp.0.embed.tok.weight", True),
        ("mtp.0.head.weight", True),
        ("mtp.0.shared_head.weight", True),
        ("embed.weight", False),
        ("head.weight", False),
        ("mtp.0.hc_head_fn", False),
        ("mtp.2.markov_head.markov_w1.weight", False),
        ("mtp.2.confidence_head.proj.weight", False),
    ],
)
def test_which_names_are_copies(name: str, copy: bool) -> None:
    assert is_draft_copy(name) is copy


@pytest.mark.parametrize(
    ("spec", "nbytes", "values"),
    [
        (TensorSpec("a.weight", "I8", (6, 32), "fp4", "a.scale"), 192, 384),
        (TensorSpec("a.scale", "F8_E8M0", (6, 2)), 12, 0),
        (TensorSpec("gate.tid2eid", "I64", (10, 2)), 160, 0),
        (TensorSpec("a.weight", "F8_E4M3", (3, 5), "fp8", "a.scale"), 15, 15),
        (TensorSpec("a.norm.weight", "BF16", (7,)), 14, 7),
        (TensorSpec("hc_head_scale", "F32", (1,)), 4, 1),
    ],
)
def test_bytes_and_values_of_one_tensor(spec: TensorSpec, nbytes: int, values: int) -> None:
    assert (spec.nbytes, spec.parameters) == (nbytes, values)


def test_item_sizes_agree_with_the_calculator() -> None:
    assert {name: ITEM_BYTES[name] for name in oracle.ITEM} == oracle.ITEM
