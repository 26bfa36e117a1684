"""What V4 is compared with: DeepSeek-V3.2, and grouped-query attention with 8 heads in bfloat16."""

from __future__ import annotations

from abyssal.efficiency.flops import FP8_EQUIVALENT, Flops, Prices

_D, _LAYERS, _HEADS = 7168, 61, 128
_Q_LORA, _KV_LORA, _NOPE, _ROPE, _V = 1536, 512, 128, 64, 128
_DENSE_LAYERS, _DENSE_WIDTH = 3, 18432
_EXPERTS, _ACTIVE, _SHARED, _WIDTH = 256, 8, 1, 2048
_INDEX_HEADS, _INDEX_DIM, _TOPK, _VOCABULARY = 64, 128, 2048, 129280
_LATENT_BYTES = 512 + 16 + 128  # FP8 latent, four float scales, bfloat16 rotary part
_INDEX_KEY_BYTES = 128 + 4


def v32_kv_per_token() -> int:
    """Cache bytes that V3.2 adds for each token, 48,068."""
    return _LAYERS * (_LATENT_BYTES + _INDEX_KEY_BYTES)


def gqa8_kv_per_token(layers: int) -> int:
    """Cache bytes of 8 key-value heads of 128 in bfloat16, for each token."""
    return layers * 2 * 8 * 128 * 2


def v32_flops(context: int, prices: Prices = FP8_EQUIVALENT) -> Flops:
    """Operations of one token that V3.2 decodes."""
    attention = _D * _Q_LORA + _Q_LORA * _HEADS * (_NOPE + _ROPE) + _D * (_KV_LORA + _ROPE)
    attention += _KV_LORA * _HEADS * (_NOPE + _V) + _HEADS * _V * _D
    index = _Q_LORA * _INDEX_HEADS * _INDEX_DIM + _D * _INDEX_DIM
    moe_layers = _LAYERS - _DENSE_LAYERS
    fp8 = _LAYERS * (attention + index) + _DENSE_LAYERS * 3 * _D * _DENSE_WIDTH
    fp8 += moe_layers * (_ACTIVE + _SHARED) * 3 * _D * _WIDTH
    high = moe_layers * _D * _EXPERTS + _LAYERS * _D * _INDEX_HEADS + _VOCABULARY * _D
    core = 2 * _HEADS * min(context, _TOPK) * (2 * _KV_LORA + _ROPE) * _LAYERS
    scores = 2 * _INDEX_HEADS * _INDEX_DIM * context * _LAYERS
    return Flops(
        2 * (prices.fp8 * fp8 + prices.high * high), prices.attention * core, prices.index_fp8 * scores
    )
