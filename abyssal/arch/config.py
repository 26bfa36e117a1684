"""config.json as a checked, frozen value (architecture.md 1)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from abyssal.arch.schedule import RATIOS, LayerKind
from abyssal.base.errors import ConfigError

DSPARK_STAGES = 3
_FP8_SETTINGS = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
# constants of every V4 release: another value is another architecture
_FIXED: dict[str, Any] = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_REFUSED_TYPES = {
    "deepseek_v41": "V4.1 is another architecture, which abyssal does not support yet",
    "deepseek_v3": "this is DeepSeek-V3, and abyssal runs V4 alone",
    "deepseek_v32": "this is DeepSeek-V3.2, and abyssal runs V4 alone",
    "deepseek_v2": "this is DeepSeek-V2, and abyssal runs V4 alone",
}
_REFUSED_KEYS = {
    "vision_config": "it describes a vision model (V4-Flash-Vision-Exp), which abyssal does not support yet",
    "engram_config": "it describes V4.1, which abyssal does not support yet",
    "kv_lora_rank": "it describes DeepSeek-V3 or V3.2, and abyssal runs V4 alone",
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN, which applies to the layers with a compression ratio alone."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True, kw_only=True)
class DSpark:
    """The speculative module of Flash-0731 and Pro-0813 (architecture.md 1.4)."""

    block_size: int
    noise_token_id: int
    target_layer_ids: tuple[int, ...]
    markov_rank: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The numbers of a V4 model, under config.json's own names.

    `compress_ratios` has one entry for each backbone block, then a 0 for each MTP block or DSpark stage.
    `expert_dtype` is fp4, fp8 (Base), or None for a release without quantisation.

    Raises:
        ConfigError: the numbers contradict each other.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_hash_layers: int
    num_nextn_predict_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    compress_rope_theta: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    n_shared_experts: int = 1
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    initializer_range: float
    bos_token_id: int
    eos_token_id: int
    torch_dtype: str
    expert_dtype: str | None
    dspark: DSpark | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        for name in _POSITIVE_FLOATS:
            value = getattr(self, name)
            if not (0 < value < math.inf):
                raise ConfigError(f"{name} is {value}: it must be positive and finite")
        for name in ("num_hash_layers", "num_nextn_predict_layers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must not be negative")
        odd = [r for r in self.compress_ratios if r not in RATIOS]
        if odd:
            hint = " (ratios 1 and 2 belong to V4.1, which abyssal does not support yet)" if set(odd) & {1, 2} else ""
            raise ConfigError(f"compress_ratios has {odd[0]}: V4 knows {', '.join(map(str, RATIOS))}{hint}")
        want = self.num_hidden_layers + self.draft_stages
        if len(self.compress_ratios) != want:
            raise ConfigError(
                f"compress_ratios has {len(self.compress_ratios)} entries: {self.num_hidden_layers} blocks and"
                f" {self.draft_stages} draft stages need {want}"
            )
        if any(self.compress_ratios[self.num_hidden_layers :]):
            raise ConfigError("compress_ratios must end in 0 for each draft stage: those blocks are window-only")
        checks = (
            (self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim is {self.qk_rope_head_dim}: it must be even"),
            (
                self.qk_rope_head_dim < self.head_dim,
                f"qk_rope_head_dim {self.qk_rope_head_dim} must be smaller than head_dim {self.head_dim}",
            ),
            (
                self.num_attention_heads % self.o_groups == 0,
                f"{self.num_attention_heads} heads do not form {self.o_groups} o_groups of equal size",
            ),
            (
                self.num_experts_per_tok <= self.n_routed_experts,
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds n_routed_experts {self.n_routed_experts}",
            ),
            (
                self.num_hash_layers <= self.num_hidden_layers,
                f"num_hash_layers {self.num_hash_layers} exceeds num_hidden_layers {self.num_hidden_layers}",
            ),
            (
                self.index_head_dim & (self.index_head_dim - 1) == 0,
                f"index_head_dim is {self.index_head_dim}: the Hadamard transform needs a power of two",
            ),
            (
                self.qk_rope_head_dim < self.index_head_dim,
                f"qk_rope_head_dim {self.qk_rope_head_dim} must be smaller than index_head_dim {self.index_head_dim}",
            ),
            (self.n_shared_experts == 1, f"n_shared_experts is {self.n_shared_experts}: V4 has exactly 1"),
            (
                self.expert_dtype in ("fp4", "fp8", None),
                f"expert_dtype is {self.expert_dtype!r}: use fp4, fp8, or leave out quantization_config",
            ),
        )
        if self.dspark is not None:
            outside = [i for i in self.dspark.target_layer_ids if not 0 <= i < self.num_hidden_layers]
            if outside or not self.dspark.target_layer_ids:
                raise ConfigError(
                    f"dspark_target_layer_ids is {list(self.dspark.target_layer_ids)}:"
                    f" name backbone blocks, 0..{self.num_hidden_layers - 1}"
                )
            if self.dspark.markov_rank < 1 or self.dspark.block_size < 1:
                raise ConfigError("dspark_markov_rank and dspark_block_size must be at least 1")
        for holds, message in checks:
            if not holds:
                raise ConfigError(message)

    @property
    def backbone_ratios(self) -> tuple[int, ...]:
        """Compression ratio of each backbone block, without the entries of the draft stages (trap 36)."""
        return self.compress_ratios[: self.num_hidden_layers]

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Attention kind of each backbone block."""
        return tuple(LayerKind.of(ratio) for ratio in self.backbone_ratios)

    @property
    def draft_stages(self) -> int:
        """Blocks under `mtp.`: DSpark has three although num_nextn_predict_layers says 1."""
        return DSPARK_STAGES if self.dspark else self.num_nextn_predict_layers

    @classmethod
    def from_file(cls, path: Path | str) -> ModelConfig:
        """Read config.json.

        Raises:
            ConfigError: the file is missing, is not JSON, or describes a model that we refuse.
        """
        path = Path(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: give a folder that holds a V4 release") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not JSON ({error}): fetch the file again") from None
        if not isinstance(found, dict):
            raise ConfigError(f"{path} holds a {type(found).__name__}: config.json is an object")
        return cls.from_dict(found)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> ModelConfig:
        """Check and take over the content of config.json.

        Raises:
            ConfigError: another architecture, a missing key, a wrong type, or numbers that contradict.
        """
        kind = d.get("model_type")
        if kind != "deepseek_v4":
            why = _REFUSED_TYPES.get(str(kind), "abyssal runs deepseek_v4 alone")
            raise ConfigError(f"model_type is {kind!r}: {why}")
        for key, why in _REFUSED_KEYS.items():
            if d.get(key) is not None:
                raise ConfigError(f"config has {key}: {why}")
        for key, fixed in _FIXED.items():
            if d.get(key, fixed) != fixed:
                raise ConfigError(f"{key} is {d[key]!r}: every V4 release has {fixed!r}")
        values: dict[str, Any] = {}
        for f in fields(cls):
            if f.name in _SPECIAL:
                continue
            if f.name not in d:
                if f.name == "n_shared_experts":
                    continue
                raise ConfigError(f"config lacks {f.name}: fetch config.json of the release again")
            values[f.name] = _typed(f.name, d[f.name], str(f.type))
        ratios = d.get("compress_ratios")
        if not isinstance(ratios, list) or not all(type(r) is int for r in ratios):
            raise ConfigError(f"compress_ratios is {ratios!r}: it must be a list of integers")
        known = {f.name for f in fields(cls)} | set(_FIXED) | _WRITTEN | set(_DSPARK)
        return cls(
            **values,
            compress_ratios=tuple(ratios),
            rope_scaling=_rope_scaling(d.get("rope_scaling")),
            expert_dtype=_expert_dtype(d),
            dspark=_dspark(d),
            extra={k: v for k, v in d.items() if k not in known},
        )

    def to_dict(self) -> dict[str, Any]:
        """config.json with the official keys."""
        out: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
        for f in fields(self):
            if f.name not in _SPECIAL:
                out[f.name] = getattr(self, f.name)
        out["compress_ratios"] = list(self.compress_ratios)
        if self.rope_scaling is not None:
            r = self.rope_scaling
            out["rope_scaling"] = {
                "beta_fast": r.beta_fast,
                "beta_slow": r.beta_slow,
                "factor": r.factor,
                "original_max_position_embeddings": r.original_max_position_embeddings,
                "type": "yarn",  # the release's spelling, not rope_type (trap 37)
            }
        out |= {**_FIXED, "attention_dropout": 0.0, "use_cache": True}
        if self.expert_dtype is not None:
            out |= {"expert_dtype": self.expert_dtype, "quantization_config": dict(_FP8_SETTINGS)}
        if self.dspark is not None:
            out |= {key: getattr(self.dspark, name) for key, name in _DSPARK.items()}
            out["dspark_target_layer_ids"] = list(self.dspark.target_layer_ids)
        return dict(sorted((out | dict(self.extra)).items()))


_SPECIAL = {"compress_ratios", "rope_scaling", "expert_dtype", "dspark", "extra"}
_DSPARK = {
    "dspark_block_size": "block_size",
    "dspark_noise_token_id": "noise_token_id",
    "dspark_target_layer_ids": "target_layer_ids",
    "dspark_markov_rank": "markov_rank",
}
_WRITTEN = {"architectures", "model_type", "quantization_config", "attention_dropout", "use_cache"}
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "max_position_embeddings",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "hc_mult",
    "hc_sinkhorn_iters",
)


_POSITIVE_FLOATS = (
    "compress_rope_theta",
    "rope_theta",
    "routed_scaling_factor",
    "swiglu_limit",
    "hc_eps",
    "rms_norm_eps",
    "initializer_range",
)


def _typed(name: str, value: Any, wanted: str) -> Any:
    if wanted == "int" and type(value) is int:
        return value
    if wanted == "float" and type(value) in (int, float):
        return float(value) if name not in ("rope_theta", "compress_rope_theta") else value
    if wanted == "str" and isinstance(value, str):
        return value
    raise ConfigError(f"{name} is {value!r}: it must be a {wanted}")


def _rope_scaling(found: Any) -> RopeScaling | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ConfigError(f"rope_scaling is {found!r}: it must be an object or null")
    kind = found.get("type", found.get("rope_type"))
    if kind != "yarn":
        raise ConfigError(f"rope_scaling has type {kind!r}: V4 uses yarn")
    for f in fields(RopeScaling):
        if type(found.get(f.name)) not in (int, float) or not 0 < found[f.name] < math.inf:
            raise ConfigError(f"rope_scaling.{f.name} is {found.get(f.name)!r}: it must be a positive number")
    return RopeScaling(**{f.name: found[f.name] for f in fields(RopeScaling)})


def _expert_dtype(d: Mapping[str, Any]) -> str | None:
    quantisation = d.get("quantization_config")
    if quantisation is None:
        return None
    if not isinstance(quantisation, dict):
        raise ConfigError(f"quantization_config is {quantisation!r}: it must be an object")
    for key, fixed in _FP8_SETTINGS.items():
        if quantisation.get(key, fixed) != fixed:
            raise ConfigError(f"quantization_config.{key} is {quantisation[key]!r}: V4 releases have {fixed!r}")
    # the April files do not say it, and hold FP4
    found: Any = d.get("expert_dtype") or "fp4"
    return str(found)


def _dspark(d: Mapping[str, Any]) -> DSpark | None:
    if "dspark_block_size" not in d:
        return None
    missing = [key for key in _DSPARK if key not in d]
    if missing:
        raise ConfigError(f"config has dspark_block_size but lacks {missing[0]}: fetch config.json again")
    layers = d["dspark_target_layer_ids"]
    if not isinstance(layers, list) or not all(type(i) is int for i in layers):
        raise ConfigError(f"dspark_target_layer_ids is {layers!r}: it must be a list of integers")
    return DSpark(
        block_size=_typed("dspark_block_size", d["dspark_block_size"], "int"),
        noise_token_id=_typed("dspark_noise_token_id", d["dspark_noise_token_id"], "int"),
        target_layer_ids=tuple(layers),
        markov_rank=_typed("dspark_markov_rank", d["dspark_markov_rank"], "int"),
    )
