"""A slow, plain float64 forward of DeepSeek-V4 in NumPy, written from architecture.md 2 alone.

It shares no code with the package. `forward(..., broken=NAME)` makes exactly one deliberate mistake, one of
the traps of architecture.md 6, so that a test can show that it would be noticed.

Letters: S tokens, D hidden, N streams, H heads, C head_dim, R rope dims, T blocks, I index heads, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BROKEN = (
    "half_split_rope",  # trap 1
    "one_rope",  # 2
    "yarn_on_swa",  # 3
    "yarn_amplitude",  # 4
    "theta_40000",  # 5
    "no_compressed_rope",  # 6
    "block_index_rope",  # 6
    "no_derotation",  # 7
    "inverse_frequencies",  # 8
    "future_blocks",  # 10, 11
    "union_of_picks",  # 10
    "masked_picks_kept",  # 11
    "bf16_ape",  # 12
    "bf16_sink",  # 12
    "naive_softplus",  # 14
    "shared_unclamped",  # 15
    "fp8_clamps_only",  # 16
    "experts_unclamped",  # 17
    "bf16_router",  # 18
    "hadamard_one_side",  # 19
    "no_relu",  # 21
    "post_without_2",  # 23
    "comb_steps_swapped",  # 23
    "comb_transposed",  # 24
    "sinkhorn_5_steps",  # 25
    "mtp_collapsed",  # 29
    "last_block_as_window",  # 36
    "yarn_dropped",  # 37
    "stale_state",  # 2.9
    "swapped_series",  # 2.6, naming hazard
    "ape_twice",  # 2.6
    "no_sink",  # 2.4
    "bias_in_weights",  # 2.10
    "window_too_wide",  # 2.4
)

_FIELDS = [(e, m) for e in range(16) for m in range(8) if (e, m) != (15, 7)]  # the last one is NaN
E4M3 = np.array(sorted({(m / 8 + (e > 0)) * 2.0 ** (max(e, 1) - 7) for e, m in _FIELDS}))
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def e4m3(codes: NDArray[Any]) -> Array:
    """Values of FP8 E4M3 bytes: sign, 4 exponent bits (bias 7), 3 mantissa bits; 127 and 255 are NaN."""
    magnitude = np.append(E4M3, np.nan)[codes.view(np.uint8) & 127]
    return np.where(codes.view(np.uint8) & 128, -magnitude, magnitude)


def e2m1(codes: NDArray[Any]) -> Array:
    """Values of FP4 E2M1 codes 0..15; bit 3 is the sign."""
    return np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7])


def e8m0(codes: NDArray[Any]) -> Array:
    """Values of E8M0 bytes: 2^(byte - 127); 255 is NaN."""
    byte = codes.view(np.uint8).astype(int)
    return np.where(byte == 255, np.nan, 2.0 ** (byte - 127.0))


def _scales(scales: NDArray[Any]) -> Array:
    # Base checkpoints hold F32 scales, the others E8M0 bytes
    return scales.astype(np.float64) if scales.dtype.kind == "f" else e8m0(scales)


def unpack_fp4(packed: NDArray[Any], scales: NDArray[Any]) -> Array:
    """3.3: bytes [O, I / 2], low nibble first, and one scale per 32 inputs [O, I / 32], to values [O, I]."""
    byte = packed.view(np.uint8)
    out = np.zeros((len(byte), 2 * byte.shape[1]))
    out[:, 0::2], out[:, 1::2] = e2m1(byte & 15), e2m1(byte >> 4)
    return out * np.repeat(_scales(scales), 32, axis=1)


def unpack_fp8(codes: NDArray[Any], scales: NDArray[Any], tile: int = 128) -> Array:
    """3.3: E4M3 bytes [O, I] and one scale per tile, the last tiles cut off, to values [O, I]."""
    wide = np.repeat(np.repeat(_scales(scales), tile, axis=0), tile, axis=1)
    return e4m3(codes) * wide[: codes.shape[0], : codes.shape[1]]


def _nearest(magnitude: Array, table: Array) -> Array:
    """Nearest value of a table of magnitudes; halfway cases go to the even place in it."""
    high = np.clip(np.searchsorted(table, magnitude), 1, len(table) - 1)
    low = high - 1
    below, above = magnitude - table[low], table[high] - magnitude
    take_high = (above < below) | ((above == below) & (high % 2 == 0))
    return table[np.where(take_high, high, low)]


def round_e4m3(x: Array) -> Array:
    """Nearest FP8 E4M3 value, clamped to +-448."""
    return np.copysign(_nearest(np.minimum(np.abs(x), 448.0), E4M3), x)


def round_e2m1(x: Array) -> Array:
    """Nearest FP4 E2M1 value, clamped to +-6."""
    return np.copysign(_nearest(np.minimum(np.abs(x), 6.0), E2M1), x)


def round_bf16(x: Array) -> Array:
    """Nearest bfloat16, ties to even (normal numbers)."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


def _blocks(x: Array, block: int) -> tuple[Array, int]:
    spare = -x.shape[-1] % block
    padded = np.concatenate([x, np.zeros((*x.shape[:-1], spare))], axis=-1)
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // block, block), x.shape[-1]


def _joined(cut: Array, width: int) -> Array:
    return cut.reshape(*cut.shape[:-2], cut.shape[-2] * cut.shape[-1])[..., :width]


def fake_fp8(x: Array, block: int, rounding: bool = True) -> Array:
    """3.6: scale 2^ceil(log2(max(amax, 1e-4) / 448)), round, scale back."""
    cut, width = _blocks(x, block)
    scale = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(cut).max(-1, keepdims=True), 1e-4) / 448))
    inside = round_e4m3(cut / scale) if rounding else np.clip(cut / scale, -448, 448)
    return _joined(inside * scale, width)


def fake_fp4(x: Array, block: int = 32) -> Array:
    """3.6, with 6 for 448 and 6 * 2^-126 for 1e-4."""
    cut, width = _blocks(x, block)
    scale = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(cut).max(-1, keepdims=True), 6 * 2.0**-126) / 6))
    return _joined(round_e2m1(cut / scale) * scale, width)


def hadamard_matrix(size: int) -> Array:
    """Sylvester order, orthonormal."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)


def yarn_frequencies(base: float, rope: int, s: Mapping[str, float]) -> Array:
    """2.5, pair by pair."""
    plain = base ** (-2 * np.arange(rope // 2) / rope)

    def dim(turns: float) -> float:
        return rope * math.log(s["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(dim(s["beta_fast"])), 0), min(math.ceil(dim(s["beta_slow"])), rope - 1)
    ramp = np.clip((np.arange(rope // 2) - low) / max(high - low, 1e-3), 0, 1)
    return plain / s["factor"] * ramp + plain * (1 - ramp)


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def forward(
    config: Mapping[str, Any],
    weights: Mapping[str, Array],
    ids: list[int],
    mode: str = "exact",
    mtp: bool = False,
    broken: str | None = None,
) -> Array:
    """Logits [S, V] of a whole sequence, or the MTP block's [S - 1, V]."""
    assert broken is None or broken in BROKEN, broken
    return _Plain(config, weights, mode == "fake", broken).run(ids, mtp)


class _Plain:
    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Array], fake: bool, broken: str | None):
        self.c, self.w, self.fake, self.broken = config, weights, fake, broken
        self.N, self.C, self.R = config["hc_mult"], config["head_dim"], config["qk_rope_head_dim"]

    def run(self, ids: list[int], mtp: bool) -> Array:
        streams = np.repeat(self.w["embed.weight"][ids][:, None, :], self.N, axis=1)
        for layer in range(self.c["num_hidden_layers"]):
            hashed = layer < self.c["num_hash_layers"]
            ratio = self.c["compress_ratios"][layer]
            if self.broken == "last_block_as_window" and layer == self.c["num_hidden_layers"] - 1:
                ratio = 0
            streams = self.block(f"layers.{layer}.", ratio, streams, ids, hashed)
        p = ""
        if mtp:
            p, following = "mtp.0.", ids[1:]
            streams = streams[:-1]
            if self.broken == "mtp_collapsed":
                streams = np.repeat(self.collapse("", streams)[:, None, :], self.N, axis=1)
            e = self.norm(self.w["embed.weight"][following], p + "enorm.weight")
            h = self.norm(streams, p + "hnorm.weight")
            streams = self.linear(e, p + "e_proj")[:, None, :] + self.linear(h, p + "h_proj")
            streams = self.block(p, 0, streams, following, False)
        return self.norm(self.collapse(p, streams), p + "norm.weight") @ self.w["head.weight"].T

    # 2.2, 2.3
    def norm(self, x: Array, name: str | None = None) -> Array:
        out = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.c["rms_norm_eps"])
        return out if name is None else out * self.w[name]

    def project(self, streams: Array, fn: Array) -> Array:
        flat = streams.reshape(len(streams), -1)
        return (flat @ fn.T) / np.sqrt((flat**2).mean(-1, keepdims=True) + self.c["rms_norm_eps"])

    def collapse(self, p: str, streams: Array) -> Array:
        g = self.project(streams, self.w[p + "hc_head_fn"])
        pre = sigmoid(g * self.w[p + "hc_head_scale"] + self.w[p + "hc_head_base"]) + self.c["hc_eps"]
        return (pre[:, :, None] * streams).sum(1)

    def site(self, p: str, streams: Array, sublayer: Any) -> Array:
        N, eps = self.N, self.c["hc_eps"]
        g, scale, base = self.project(streams, self.w[p + "_fn"]), self.w[p + "_scale"], self.w[p + "_base"]
        pre = sigmoid(g[:, :N] * scale[0] + base[:N]) + eps
        post = sigmoid(g[:, N : 2 * N] * scale[1] + base[N : 2 * N])
        post = post if self.broken == "post_without_2" else 2 * post
        m = (g[:, 2 * N :] * scale[2] + base[2 * N :]).reshape(-1, N, N)
        inner, outer = (1, 2) if self.broken == "comb_steps_swapped" else (2, 1)
        comb = np.exp(m - m.max(inner, keepdims=True))
        comb = comb / comb.sum(inner, keepdims=True) + eps
        comb = comb / (comb.sum(outer, keepdims=True) + eps)
        steps = 5 if self.broken == "sinkhorn_5_steps" else self.c["hc_sinkhorn_iters"]
        for _ in range(steps - 1):
            comb = comb / (comb.sum(inner, keepdims=True) + eps)
            comb = comb / (comb.sum(outer, keepdims=True) + eps)
        y = sublayer((pre[:, :, None] * streams).sum(1))
        mixed = np.zeros_like(streams)
        for k in range(N):
            for j in range(N):
                share = comb[:, k, j] if self.broken == "comb_transposed" else comb[:, j, k]
                mixed[:, k] += share[:, None] * streams[:, j]
            mixed[:, k] += post[:, k, None] * y
        return mixed

    def block(self, p: str, ratio: int, streams: Array, ids: list[int], hashed: bool) -> Array:
        streams = self.site(
            p + "hc_attn", streams, lambda x: self.attention(p + "attn.", ratio, self.norm(x, p + "attn_norm.weight"))
        )
        return self.site(
            p + "hc_ffn", streams, lambda x: self.moe(p + "ffn.", self.norm(x, p + "ffn_norm.weight"), ids, hashed)
        )

    def linear(self, x: Array, name: str, quantised: bool = True) -> Array:
        if self.fake and quantised:
            x = fake_fp8(x, 128)
        return x @ self.w[name + ".weight"].T

    # 2.5
    def rotate(self, x: Array, positions: NDArray[Any], ratio: int, inverse: bool = False) -> Array:
        c, R = self.c, self.R
        base = c["compress_rope_theta"] if ratio and self.broken != "one_rope" else c["rope_theta"]
        if ratio and self.broken == "theta_40000":
            base = 40000
        yarn = bool(c.get("rope_scaling")) and (ratio or self.broken == "yarn_on_swa") and self.broken != "yarn_dropped"
        f = yarn_frequencies(base, R, c["rope_scaling"]) if yarn else base ** (-2 * np.arange(R // 2) / R)
        if self.broken == "inverse_frequencies":
            f = 1 / f
        angle = positions[:, None] * f * (-1 if inverse else 1)
        while angle.ndim < x.ndim:
            angle = angle[:, None]
        cos, sin = np.cos(angle), np.sin(angle)
        if yarn and self.broken == "yarn_amplitude":
            cos, sin = 1.277 * cos, 1.277 * sin
        out, tail = x.copy(), x[..., -R:]
        if self.broken == "half_split_rope":
            a, b = tail[..., : R // 2], tail[..., R // 2 :]
            out[..., -R:] = np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
            return out
        out[..., -R::2] = tail[..., 0::2] * cos - tail[..., 1::2] * sin
        out[..., out.shape[-1] - R + 1 :: 2] = tail[..., 0::2] * sin + tail[..., 1::2] * cos
        return out

    def stored(self, entry: Array) -> Array:
        if not self.fake:
            return entry
        n = self.C - self.R
        plain = fake_fp8(entry[:, :n], 64, rounding=self.broken != "fp8_clamps_only")
        return np.concatenate([plain, round_bf16(entry[:, n:])], axis=1)

    # 2.6
    def compress(self, p: str, ratio: int, channels: int, x: Array) -> Array:
        K, Z = x @ self.w[p + "wkv.weight"].T, x @ self.w[p + "wgate.weight"].T
        ape = self.w[p + "ape"]
        if self.broken == "bf16_ape":
            ape = round_bf16(ape)
        Z = Z + ape[np.arange(len(x)) % ratio] * (2 if self.broken == "ape_twice" else 1)
        before, current = slice(0, channels), slice(channels, 2 * channels)
        if self.broken == "swapped_series":
            before, current = current, before
        entries, whole = [], len(x) // ratio * ratio
        for i in range(len(x) // ratio):
            own = range(i * ratio, (i + 1) * ratio)
            if ratio == 4:
                k, z = [K[t, current] for t in own], [Z[t, current] for t in own]
                if i or self.broken == "stale_state":  # stale: the last block of an earlier run of these ids
                    k += [K[(t - ratio) % whole, before] for t in own]
                    z += [Z[(t - ratio) % whole, before] for t in own]
            else:
                k, z = [K[t] for t in own], [Z[t] for t in own]
            share = np.exp(np.array(z) - np.max(z, axis=0))
            entries.append((share * np.array(k)).sum(0) / share.sum(0))
        if not entries:
            return np.zeros((0, channels))
        e = self.norm(np.array(entries), p + "norm.weight")
        place = np.arange(len(e)) * (1 if self.broken == "block_index_rope" else ratio)
        return e if self.broken == "no_compressed_rope" else self.rotate(e, place, ratio)

    # 2.7
    def chosen(self, p: str, latent: Array, x: Array) -> list[set[int]]:
        c = self.c
        I, J = c["index_n_heads"], c["index_head_dim"]
        H = hadamard_matrix(J)
        q = self.rotate(self.linear(latent, p + "wq_b").reshape(-1, I, J), np.arange(len(x)), 4) @ H
        k = self.compress(p + "compressor.", 4, J, x)
        k = k if self.broken == "hadamard_one_side" else k @ H
        if self.fake:
            q, k = fake_fp4(q), fake_fp4(k)
        w = self.linear(x, p + "weights_proj", quantised=False) * (J**-0.5 * I**-0.5)
        picks: list[set[int]] = []
        for t in range(len(x)):
            dots = q[t] @ k[: self.visible(t, 4, len(k))].T
            scores = w[t] @ (dots if self.broken == "no_relu" else np.maximum(dots, 0))
            picks.append(set(np.argsort(-scores, kind="stable")[: c["index_topk"]].tolist()))
            if self.broken == "masked_picks_kept":  # the rest of the top-k are blocks of the future
                picks[t] |= set(range(len(scores), min(c["index_topk"], len(k))))
        if self.broken == "union_of_picks":
            picks = [set().union(*picks)] * len(x)
        return picks

    def visible(self, t: int, ratio: int, blocks: int) -> int:
        return min((t + 1) // ratio + (self.broken == "future_blocks"), blocks)

    # 2.4
    def attention(self, p: str, ratio: int, x: Array) -> Array:
        c, S = self.c, len(x)
        H, C, G = c["num_attention_heads"], self.C, c["o_groups"]
        place = np.arange(S)
        latent = self.norm(self.linear(x, p + "wq_a"), p + "q_norm.weight")
        q = self.rotate(self.norm(self.linear(latent, p + "wq_b").reshape(S, H, C)), place, ratio)
        window = self.stored(self.rotate(self.norm(self.linear(x, p + "wkv"), p + "kv_norm.weight"), place, ratio))
        entries = self.stored(self.compress(p + "compressor.", ratio, C, x)) if ratio else np.zeros((0, C))
        picks = self.chosen(p + "indexer.", latent, x) if ratio == 4 else None
        sink = self.w[p + "attn_sink"]
        if self.broken == "bf16_sink":
            sink = round_bf16(sink)
        W = c["sliding_window"] + (self.broken == "window_too_wide")
        out = np.zeros((S, H, C))
        for t in range(S):
            keys = [window[j] for j in range(max(0, t - W + 1), t + 1)]
            if ratio:
                seen = range(self.visible(t, ratio, len(entries))) if picks is None else sorted(picks[t])
                keys += [entries[s] for s in seen]
            E = np.array(keys)
            logits = q[t] @ E.T * C**-0.5
            top = logits.max(1, keepdims=True)
            share = np.exp(logits - top)
            total = share.sum(1, keepdims=True)
            if self.broken != "no_sink":
                total = total + np.exp(sink[:, None] - top)
            out[t] = share / total @ E
        if self.broken != "no_derotation":
            out = self.rotate(out, place, ratio, inverse=True)
        grouped = out.reshape(S, G, -1)
        wo_a = self.w[p + "wo_a.weight"].reshape(G, -1, grouped.shape[-1])
        u = np.stack([grouped[:, g] @ wo_a[g].T for g in range(G)], axis=1).reshape(S, -1)
        return self.linear(u, p + "wo_b")

    # 2.10
    def expert(self, p: str, x: Array, weight: float, clamped: bool) -> Array:
        gate, up = self.linear(x, p + "w1"), self.linear(x, p + "w3")
        limit = self.c["swiglu_limit"]
        if clamped:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return self.linear(silu(gate) * up * weight, p + "w2")

    def moe(self, p: str, x: Array, ids: list[int], hashed: bool) -> Array:
        c = self.c
        gate = self.w[p + "gate.weight"]
        logits = x @ gate.T
        if self.broken == "bf16_router":
            logits = round_bf16(round_bf16(x) @ round_bf16(gate).T)
        if self.broken == "naive_softplus":
            single = logits.astype(np.float32)
            scores = np.sqrt(np.log(np.float32(1) + np.exp(single))).astype(np.float64)
        else:
            scores = np.sqrt(np.logaddexp(0, logits))
        out = np.zeros_like(x)
        for t in range(len(x)):
            if hashed:
                picks = self.w[p + "gate.tid2eid"][ids[t]].astype(int)
            else:
                ranked = scores[t] + self.w[p + "gate.bias"]
                picks = np.argsort(-ranked, kind="stable")[: c["num_experts_per_tok"]]
            share = scores[t][picks]
            if self.broken == "bias_in_weights" and not hashed:
                share = ranked[picks]
            share = share / share.sum() * c["routed_scaling_factor"]
            row = x[t : t + 1]
            for e, weight in zip(picks, share, strict=True):
                clamped = self.broken != "experts_unclamped"
                out[t] += self.expert(f"{p}experts.{e}.", row, weight, clamped)[0]
            out[t] += self.expert(p + "shared_experts.", row, 1.0, self.broken != "shared_unclamped")[0]
        return out
