"""transformers' DeepSeek-V4 as an oracle, also in true float64.

Its own source casts to float32 in norms, mHC and softmax; for float64 that source text is widened and run as
a module of its own. Names are mapped by architecture.md 3.5. `quantise_as_served` adds what transformers leaves out
of 3.6. Nothing here or in plain.py comes from the package under test.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from packaging.version import Version
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DeepseekV4Config, DynamicCache
from transformers.masking_utils import eager_mask

from tests.oracle import plain

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
    cleaned |= {"attn_implementation": "eager", "experts_implementation": "eager"}  # the loops, no fused kernels
    hf_config = DeepseekV4Config(**cleaned)
    modeling = _modeling(dtype == torch.float64)
    model = modeling.DeepseekV4ForCausalLM(hf_config).to(dtype).eval()
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in renamed(state).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert not [m for m in missing if "inv_freq" not in m], missing
    if rotary is not None:
        set_rotary(model, *rotary)
    return model


def hf_model(config: dict[str, Any], weights: Mapping[str, NDArray[Any]], dtype: torch.dtype) -> Any:
    """transformers' model from the checkpoint's own names, experts one by one, dequantised.

    float32 gives the installed code as it is; float64 the widened one.
    """
    state = {name: torch.from_numpy(value) for name, value in weights.items() if ".experts." not in name}
    for layer in range(config["num_hidden_layers"]):
        for part in ("w1", "w2", "w3"):
            prefix = f"layers.{layer}.ffn.experts."
            experts = [weights[f"{prefix}{j}.{part}.weight"] for j in range(config["n_routed_experts"])]
            state[prefix + part] = torch.from_numpy(np.stack(experts))
    return build(config, state, dtype)


def set_rotary(model: Any, main: Tensor, compress: Tensor) -> None:
    """Replace the frequencies [R / 2] of window-only and of compressed layers; its own are rounded to float32."""
    dtype = model.lm_head.weight.dtype
    for module in model.modules():  # compressors hold embeddings of their own
        if hasattr(module, "compress_inv_freq"):
            module.main_inv_freq, module.compress_inv_freq = main.to(dtype), compress.to(dtype)


def quantise_as_served(model: Any) -> None:
    """Hook the simulated quantisation of 3.6 into a widened float64 model, by the plain rounding functions.

    Linears see FP8 inputs, attention sees stored entries, the indexer's scorer sees Hadamard-rotated FP4.
    """
    config = model.config
    size, kept = config.index_head_dim, config.head_dim - config.qk_rope_head_dim
    hadamard = torch.from_numpy(plain.hadamard_matrix(size))

    def fp8(x: Tensor, block: int = 128) -> Tensor:
        return torch.from_numpy(plain.fake_fp8(x.numpy(), block))

    def linear_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return fp8(args[0]), *args[1:]

    def scorer_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        q, k = (torch.from_numpy(plain.fake_fp4((x @ hadamard).numpy(), 32)) for x in args[:2])
        return q, k, args[2]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert key is value  # the window's and the compressed entries together
        rotated = torch.from_numpy(plain.round_bf16(key[..., kept:].numpy()))
        entries = torch.cat([fp8(key[..., :kept], 64), rotated], dim=-1)
        return eager(module, query, entries, entries, *args, **kwargs)

    def routed(experts: Any, x: Tensor, picks: Tensor, shares: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for token, (row, chosen) in enumerate(zip(fp8(x), picks.tolist(), strict=True)):
            for place, j in enumerate(chosen):
                inner = experts._apply_gate(experts.gate_up_proj[j] @ row) * shares[token, place]
                out[token] += experts.down_proj[j] @ fp8(inner)  # the share comes before the rounding
        return out

    modeling = sys.modules[type(model).__module__]
    eager = modeling.eager_attention_forward
    model.config._attn_implementation = "as_served"
    AttentionInterface.register("as_served", attend)
    AttentionMaskInterface.register("as_served", eager_mask)
    linears = ("q_a_proj", "q_b_proj", "kv_proj", "o_b_proj", "gate_proj", "up_proj", "down_proj")
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        if own == "experts":
            module.forward = functools.partial(routed, module)
        elif own == "scorer":
            module.register_forward_pre_hook(scorer_input)
        elif own in linears and ("compressor" not in name or own == "q_b_proj"):  # wkv, wgate of compressors: none
            module.register_forward_pre_hook(linear_input)


@torch.no_grad()
def logits(model: Any, ids: Sequence[int]) -> Tensor:
    """[S, V] of one whole pass."""
    return model(torch.tensor([list(ids)]), use_cache=False).logits[0]


def with_cache(model: Any, ids_BS: Tensor, cache: DynamicCache, **more: Any) -> Tensor:
    """Logits of tokens behind a cache; 5.24 renamed the argument."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(ids_BS, use_cache=True, **{name: cache}, **more).logits


@torch.no_grad()
def hf_logits_chunked(model: Any, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
    """[S, V], fed in chunks of the given sizes through transformers' own cache."""
    assert sum(chunks) == len(ids), (chunks, len(ids))
    cache, done, out = DynamicCache(config=model.config), 0, []
    for size in chunks:
        piece = torch.tensor([list(ids[done : done + size])])
        out.append(with_cache(model, piece, cache)[0])
        done += size
    return torch.cat(out)


RATIO_SETS = ((0, 4, 128), (4,), (128, 4), (0,), (128, 128, 4), (4, 128, 4), (0, 0, 4), (4, 4))


def random_case(seed: int) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]], list[int]]:
    """A small configuration, its weights and token ids; seeds 0..7 cover every set of layer kinds.

    Weights are float32 values held as float64, MTP block included, so that a float32 model has the same ones.
    Logits have a standard deviation near 1 and every optional effect is on: sinks, ape, bias, clamp, top-k.
    """
    rng = np.random.default_rng(seed)

    def one_of(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    ratios = RATIO_SETS[seed % len(RATIO_SETS)]
    heads, rope, factor, original = one_of(2, 4, 8), one_of(8, 12, 16), one_of(4, 16), one_of(64, 4096, 65536)
    low, high = (130, 170) if 128 in ratios else (50, 80)
    length = 300 if seed % len(RATIO_SETS) == 0 else int(rng.integers(low, high))
    config: dict[str, Any] = {
        "model_type": "deepseek_v4",
        "architectures": ["DeepseekV4ForCausalLM"],
        "vocab_size": int(rng.integers(60, 101)),
        "hidden_size": one_of(32, 40, 64),
        "num_hidden_layers": len(ratios),
        "num_hash_layers": int(rng.integers(0, min(3, len(ratios)) + 1)),
        "num_nextn_predict_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": one_of(24, 32, 40, 64),
        "qk_rope_head_dim": rope,
        "q_lora_rank": one_of(16, 20, 32),
        "o_groups": one_of(1, 2, heads),
        "o_lora_rank": one_of(8, 12),
        "sliding_window": one_of(4, 7, 16, 32),
        "compress_ratios": [*ratios, 0],
        "compress_rope_theta": 160000.0,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "max_position_embeddings": factor * original,
        "index_n_heads": one_of(16, 24),  # fewer would give exact ties of scores
        "index_head_dim": one_of(32, 64),
        "index_topk": one_of(2, 3, 5),
        "n_routed_experts": one_of(4, 5, 8),
        "n_shared_experts": 1,
        "num_experts_per_tok": one_of(1, 2, 3),
        "moe_intermediate_size": one_of(16, 24),
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": one_of(1.0, 1.5, 2.5),
        "swiglu_limit": one_of(0.5, 1.0, 10.0),
        "hc_mult": one_of(4, 4, 3, 2),
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    weights = random_weights(config, rng)
    return config, weights, rng.integers(0, config["vocab_size"], length).tolist()


def random_weights(config: dict[str, Any], rng: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    """All tensors of 3.2 under the checkpoint's names."""
    c = config
    out: dict[str, NDArray[Any]] = {}
    d, n, v, e = c["hidden_size"], c["hc_mult"], c["vocab_size"], c["n_routed_experts"]
    inner = c["moe_intermediate_size"]

    def normal(name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        out[name] = (mean + std * rng.standard_normal(shape)).astype(np.float32).astype(np.float64)

    def matrix(name: str, rows: int, columns: int) -> None:
        normal(f"{name}.weight", rows, columns, std=1.3 * columns**-0.5)

    def norm(name: str, width: int) -> None:
        normal(f"{name}.weight", width, mean=1.0, std=0.3)

    def streams(name: str, rows: int, scales: int) -> None:
        normal(f"{name}_fn", rows, n * d, std=1.3 * (n * d) ** -0.5)
        normal(f"{name}_base", rows, std=0.5)
        normal(f"{name}_scale", scales, mean=1.0, std=0.3)

    def compressor(name: str, ratio: int, channels: int) -> None:
        width = channels * (2 if ratio == 4 else 1)
        matrix(f"{name}.wkv", width, d)
        matrix(f"{name}.wgate", width, d)
        normal(f"{name}.ape", ratio, width, std=0.7)
        norm(f"{name}.norm", channels)

    def block(p: str, ratio: int, hashed: bool) -> None:
        heads, head, rank, groups = c["num_attention_heads"], c["head_dim"], c["q_lora_rank"], c["o_groups"]
        for site in ("attn", "ffn"):
            streams(f"{p}hc_{site}", 2 * n + n * n, 3)
            norm(f"{p}{site}_norm", d)
        a = f"{p}attn."
        normal(f"{a}attn_sink", heads, std=1.0)
        matrix(f"{a}wq_a", rank, d)
        norm(f"{a}q_norm", rank)
        matrix(f"{a}wq_b", heads * head, rank)
        matrix(f"{a}wkv", head, d)
        norm(f"{a}kv_norm", head)
        matrix(f"{a}wo_a", groups * c["o_lora_rank"], heads * head // groups)
        matrix(f"{a}wo_b", d, groups * c["o_lora_rank"])
        if ratio:
            compressor(f"{a}compressor", ratio, head)
        if ratio == 4:
            matrix(f"{a}indexer.wq_b", c["index_n_heads"] * c["index_head_dim"], rank)
            matrix(f"{a}indexer.weights_proj", c["index_n_heads"], d)
            compressor(f"{a}indexer.compressor", 4, c["index_head_dim"])
        matrix(f"{p}ffn.gate", e, d)
        if hashed:
            orders = rng.permuted(np.tile(np.arange(e), (v, 1)), axis=1)
            out[f"{p}ffn.gate.tid2eid"] = orders[:, : c["num_experts_per_tok"]]
        else:
            normal(f"{p}ffn.gate.bias", e, std=0.3)
        for expert in (*(f"experts.{j}" for j in range(e)), "shared_experts"):
            for part, rows, columns in (("w1", inner, d), ("w2", d, inner), ("w3", inner, d)):
                matrix(f"{p}ffn.{expert}.{part}", rows, columns)

    def last(p: str) -> None:
        norm(f"{p}norm", d)
        streams(f"{p}hc_head", n, 1)

    normal("embed.weight", v, d, std=1.0)
    normal("head.weight", v, d, std=d**-0.5)
    last("")
    for layer in range(c["num_hidden_layers"]):
        block(f"layers.{layer}.", c["compress_ratios"][layer], layer < c["num_hash_layers"])
    block("mtp.0.", 0, False)
    for part in ("e_proj", "h_proj"):
        matrix(f"mtp.0.{part}", d, d)
    for part in ("enorm", "hnorm"):
        norm(f"mtp.0.{part}", d)
    last("mtp.0.")
    return out
