"""transformers' DeepSeek-V4 as an oracle, also in true float64.

Its own source casts to float32 in norms, mHC and softmax; for float64 that source text is widened and run as
a module of its own. Names are mapped by architecture.md 3.5.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DeepseekV4Config

assert Version(transformers.__version__) >= Version("5.10.1"), "older releases compute another model"

RENAMED = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
PARTS = (
    (r"attn\.indexer\.compressor\.wkv\.", "self_attn.compressor.indexer.kv_proj."),
    (r"attn\.indexer\.compressor\.wgate\.", "self_attn.compressor.indexer.gate_proj."),
    (r"attn\.indexer\.compressor\.ape", "self_attn.compressor.indexer.position_bias"),
    (r"attn\.indexer\.compressor\.norm\.", "self_attn.compressor.indexer.kv_norm."),
    (r"attn\.indexer\.wq_b\.", "self_attn.compressor.indexer.q_b_proj."),
    (r"attn\.indexer\.weights_proj\.", "self_attn.compressor.indexer.scorer.weights_proj."),
    (r"attn\.compressor\.wkv\.", "self_attn.compressor.kv_proj."),
    (r"attn\.compressor\.wgate\.", "self_attn.compressor.gate_proj."),
    (r"attn\.compressor\.ape", "self_attn.compressor.position_bias"),
    (r"attn\.compressor\.norm\.", "self_attn.compressor.kv_norm."),
    (r"attn\.attn_sink", "self_attn.sinks"),
    (r"attn\.wq_a\.", "self_attn.q_a_proj."),
    (r"attn\.q_norm\.", "self_attn.q_a_norm."),
    (r"attn\.wq_b\.", "self_attn.q_b_proj."),
    (r"attn\.wkv\.", "self_attn.kv_proj."),
    (r"attn\.kv_norm\.", "self_attn.kv_norm."),
    (r"attn\.wo_a\.", "self_attn.o_a_proj."),
    (r"attn\.wo_b\.", "self_attn.o_b_proj."),
    (r"attn_norm\.", "input_layernorm."),
    (r"ffn_norm\.", "post_attention_layernorm."),
    (r"hc_attn_", "attn_hc."),
    (r"hc_ffn_", "ffn_hc."),
    (r"ffn\.gate\.bias", "mlp.gate.e_score_correction_bias"),
    (r"ffn\.gate\.", "mlp.gate."),
    (r"ffn\.shared_experts\.w1\.", "mlp.shared_experts.gate_proj."),
    (r"ffn\.shared_experts\.w2\.", "mlp.shared_experts.down_proj."),
    (r"ffn\.shared_experts\.w3\.", "mlp.shared_experts.up_proj."),
)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict (official names, experts stacked) under transformers' names; MTP is left out."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("mtp."):
            continue
        if name in RENAMED:
            out[RENAMED[name]] = tensor
            continue
        layer, rest = re.fullmatch(r"(layers\.\d+\.)(.*)", name).groups()  # type: ignore[union-attr]
        prefix = f"model.{layer}"
        if rest == "ffn.experts.w1":
            up = state[f"{layer}ffn.experts.w3"]
            out[f"{prefix}mlp.experts.gate_up_proj"] = torch.cat([tensor, up], dim=1)
        elif rest == "ffn.experts.w2":
            out[f"{prefix}mlp.experts.down_proj"] = tensor
        elif rest != "ffn.experts.w3":
            for pattern, target in PARTS:
                if re.match(pattern, rest):
                    out[prefix + re.sub(f"^{pattern}", target, rest)] = tensor
                    break
            else:
                raise KeyError(name)
    return out


@functools.cache
def _modeling(widened: bool) -> Any:
    spec = importlib.util.find_spec("transformers.models.deepseek_v4.modeling_deepseek_v4")
    assert spec is not None and spec.origin is not None
    if not widened:
        return importlib.import_module(spec.name)
    with open(spec.origin, encoding="utf-8") as file:
        source = file.read()
    source = source.replace(".float()", ".double()").replace("torch.float32", "torch.float64")
    source = re.sub(r"dtype=torch\.float\b", "dtype=torch.float64", source)
    module = types.ModuleType("transformers.models.deepseek_v4.modeling_widened")
    module.__package__ = "transformers.models.deepseek_v4"
    module.__file__ = spec.origin
    sys.modules[module.__name__] = module
    exec(compile(source, "modeling_widened", "exec"), module.__dict__)
    return module


def build(
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """transformers' model with our weights.

    Args:
        config: the content of config.json.
        state: our state dict.
        dtype: float32 or float64.
        rotary: frequencies of window-only and of compressed layers, to take the place of its rounded ones.
    """
    cleaned = {k: v for k, v in config.items() if k not in ("quantization_config", "expert_dtype", "torch_dtype")}
    hf_config = DeepseekV4Config(**cleaned, attn_implementation="eager", experts_implementation="eager")
    modeling = _modeling(dtype == torch.float64)
    model = modeling.DeepseekV4ForCausalLM(hf_config).to(dtype).eval()
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in renamed(state).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert not [m for m in missing if "inv_freq" not in m], missing
    if rotary is not None:
        for module in model.modules():  # compressors hold embeddings of their own
            if hasattr(module, "compress_inv_freq"):
                for name, table in zip(("main", "compress"), rotary, strict=True):
                    setattr(module, f"{name}_inv_freq", table.to(dtype))
    return model


@torch.no_grad()
def logits(model: Any, ids: Sequence[int]) -> Tensor:
    """[S, V] of one whole pass."""
    return model(torch.tensor([list(ids)]), use_cache=False).logits[0]
