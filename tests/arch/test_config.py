"""config.json: every release accepted, everything else refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV4Config

from abyssal.arch.config import ModelConfig
from abyssal.arch.presets import PRESETS, preset
from abyssal.arch.schedule import LayerKind
from abyssal.base.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    config = preset(name)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert ModelConfig.from_file(tmp_path / "config.json") == config


def test_unknown_keys_survive_the_round_trip() -> None:
    config = ModelConfig.from_dict(preset("flash").to_dict() | {"transformers_version": "4.57.1"})
    assert config.extra == {"transformers_version": "4.57.1"}
    assert config.to_dict()["transformers_version"] == "4.57.1"


def test_the_april_file_has_no_expert_dtype() -> None:
    d = preset("flash").to_dict()
    del d["expert_dtype"]
    assert ModelConfig.from_dict(d) == preset("flash")
    del d["quantization_config"]
    assert ModelConfig.from_dict(d).expert_dtype is None


@pytest.mark.parametrize("name", ["flash", "pro", "flash-0731", "nano"])
def test_transformers_reads_the_same_model(name: str) -> None:
    config = preset(name)
    theirs = DeepseekV4Config(**config.to_dict())
    kinds = {"sliding_attention": "SWA", "compressed_sparse_attention": "CSA", "heavily_compressed_attention": "HCA"}
    assert [kinds[t] for t in theirs.layer_types] == [k.name for k in config.kinds]
    assert theirs.mlp_layer_types.count("hash_moe") == config.num_hash_layers
    assert theirs.qk_rope_head_dim == config.qk_rope_head_dim
    main, compress = theirs.rope_parameters["main"], theirs.rope_parameters["compress"]
    assert main["rope_theta"] == 10000 and compress["rope_theta"] == 160000
    # trap 37: YaRN is spelt `type`, and must not get lost
    assert compress["rope_type"] == "yarn" and compress["factor"] == 16 and compress["attention_factor"] == 1.0


def test_rope_type_is_read_as_type() -> None:
    d = preset("flash").to_dict()
    d["rope_scaling"]["rope_type"] = d["rope_scaling"].pop("type")
    assert ModelConfig.from_dict(d) == preset("flash")


def test_trailing_ratios_are_no_backbone_layers() -> None:
    """Trap 36: block 42 of Flash is CSA; DSpark has three stages although the config says 1."""
    flash = preset("flash")
    assert len(flash.kinds) == 43 and flash.kinds[42] is LayerKind.CSA
    assert flash.kinds.count(LayerKind.CSA) == 21 and flash.kinds.count(LayerKind.HCA) == 20
    spark = preset("flash-0731")
    assert spark.kinds == flash.kinds and spark.num_nextn_predict_layers == 1 and spark.draft_stages == 3
    assert len(spark.compress_ratios) == 46 and len(preset("pro-0813").compress_ratios) == 64


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"model_type": "deepseek_v41"}, "V4.1"),
        ({"model_type": "deepseek_v32"}, "V3.2"),
        ({"model_type": "deepseek_v3"}, "DeepSeek-V3"),
        ({"model_type": None}, "None"),
        ({"vision_config": {"depth": 2}}, "vision"),
        ({"engram_config": {}}, "V4.1"),
        ({"kv_lora_rank": 512}, "V3"),
        ({"scoring_func": "sigmoid"}, "sigmoid"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2"),
        ({"hidden_size": "4096"}, "'4096'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hash_layers": -1}, "num_hash_layers is -1"),
        ({"num_hash_layers": 44}, "num_hash_layers 44"),
        ({"compress_ratios": [0, 2, 1]}, "V4.1"),
        ({"compress_ratios": [0, 4]}, "2 entries"),
        ({"compress_ratios": "0,4"}, "list of integers"),
        ({"compress_ratios": [0] * 43 + [4]}, "must end in 0"),
        ({"qk_rope_head_dim": 63}, "63"),
        ({"qk_rope_head_dim": 512}, "512"),
        ({"qk_rope_head_dim": 128}, "index_head_dim 128"),
        ({"o_groups": 7}, "7 o_groups"),
        ({"num_experts_per_tok": 300}, "300"),
        ({"index_head_dim": 100}, "power of two"),
        ({"expert_dtype": "int4"}, "int4"),
        ({"quantization_config": {"fmt": "e5m2"}}, "e5m2"),
        ({"quantization_config": "fp8"}, "quantization_config"),
        ({"rope_scaling": {"type": "linear"}}, "linear"),
        ({"rope_scaling": 16}, "16"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "factor"),
        ({"dspark_block_size": 5}, "dspark_noise_token_id"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"swiglu_limit": -1.0}, "swiglu_limit is -1.0"),
        ({"hc_eps": float("inf")}, "hc_eps is inf"),
    ],
)
def test_refusals_name_the_value(edit: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(preset("flash").to_dict() | edit)
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "index_topk", "hc_mult", "compress_ratios", "swiglu_limit"])
def test_missing_keys_are_named(key: str) -> None:
    d = preset("flash").to_dict()
    del d[key]
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_dict(d)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"dspark_target_layer_ids": [40, 99]}, "[40, 99]"),
        ({"dspark_target_layer_ids": []}, "[]"),
        ({"dspark_target_layer_ids": "40"}, "'40'"),
        ({"dspark_markov_rank": 0}, "dspark_markov_rank"),
    ],
)
def test_dspark_refusals(edit: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(preset("flash-0731").to_dict() | edit)
    assert message in str(caught.value)


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="'v5'"):
        preset("v5")
