#!/usr/bin/env python3
# ruff: noqa
"""Analytic cost model for DeepSeek-V4: KV-cache bytes and single-token FLOPs.

Standard library only.  Sizes come from the published config values.  The price
of an operation in "FP8-equivalent" FLOPs is an assumption (the report gives no
list), so three price lists are printed.  The script recomputes the ratios that
the report gives for a one-million-token context and shows how far off each is.

    python3 bench/efficiency_check.py            # report
    python3 bench/efficiency_check.py --json     # same numbers as JSON
    python3 bench/efficiency_check.py --check    # exit 1 if a tolerance is missed
    python3 bench/efficiency_check.py --ckpt     # rebuild the checkpoint inventory
"""

import argparse
import json
import sys
from dataclasses import dataclass

M1 = 1024 * 1024  # "1M" on the x axis of the report's figure is 1024 K


# --------------------------------------------------------------------------
# configs
# --------------------------------------------------------------------------
@dataclass(frozen=True)
class V4:
    name: str
    d: int
    layers: int
    ratios: tuple          # one entry per backbone layer
    heads: int
    q_lora: int
    o_groups: int
    n_routed: int
    moe_inter: int
    topk: int
    head_dim: int = 512
    rope_dim: int = 64
    o_lora: int = 1024
    idx_heads: int = 64
    idx_dim: int = 128
    window: int = 128
    active: int = 6
    shared: int = 1
    vocab: int = 129280
    hc: int = 4
    n_hash: int = 3


def _flash_ratios():
    r = [0, 0] + [4 if i % 2 == 0 else 128 for i in range(2, 43)]
    return tuple(r)


def _pro_ratios():
    r = [128, 128] + [4 if i % 2 == 0 else 128 for i in range(2, 61)]
    return tuple(r)


FLASH = V4("V4-Flash", 4096, 43, _flash_ratios(), 64, 1024, 8, 256, 2048, 512)
PRO = V4("V4-Pro", 7168, 61, _pro_ratios(), 128, 1536, 16, 384, 3072, 1024)


class V32:
    name = "V3.2"
    d, layers, heads = 7168, 61, 128
    q_lora, kv_lora, nope, rope, v = 1536, 512, 128, 64, 128
    dense_layers, dense_inter = 3, 18432
    n_routed, active, shared, moe_inter = 256, 8, 1, 2048
    idx_heads, idx_dim, topk = 64, 128, 2048
    vocab = 129280


# --------------------------------------------------------------------------
# bytes per cached entry
# --------------------------------------------------------------------------
def entry_bytes(kind):
    """Bytes of one KV entry (one vector serves as both key and value)."""
    return {
        # 448 fp8 + 64 bf16 + 7 one-byte scales (1 per 64 values) + 1 pad
        "v4_mixed": 448 + 2 * 64 + 8,
        "v4_bf16": 2 * 512,
        # indexer keys, 128 wide
        "idx_fp4": 64 + 4,     # two values per byte + one e8m0 byte per 32
        "idx_fp8": 128 + 4,    # one fp32 scale
        "idx_bf16": 256,
        # V3.2: 512 fp8 latent + 4 fp32 scales + 64 bf16 rope
        "v32_mla": 512 + 16 + 128,
        "v32_mla_bf16": 2 * 576,
    }[kind]


def v4_kv(c, main="v4_mixed", idx="idx_fp4"):
    """(bytes per token that grow with context, constant bytes per sequence)."""
    e, i = entry_bytes(main), entry_bytes(idx)
    csa = sum(r == 4 for r in c.ratios)
    hca = sum(r == 128 for r in c.ratios)
    grow = csa * (e + i) / 4 + hca * e / 128
    window = c.layers * c.window * e
    f32 = 4
    # kv and score buffers; ratio 4 keeps two windows of doubled width
    tail = csa * 2 * 8 * 2 * c.head_dim * f32
    tail += csa * 2 * 8 * 2 * c.idx_dim * f32
    tail += hca * 2 * 128 * c.head_dim * f32
    return grow, window, tail


def v32_kv(main="v32_mla", idx="idx_fp8"):
    return V32.layers * (entry_bytes(main) + entry_bytes(idx))


def gqa8_kv(layers, kv_heads=8, hd=128, byte=2):
    return layers * 2 * kv_heads * hd * byte


# --------------------------------------------------------------------------
# checkpoint inventory: every tensor of the official safetensors layout
# --------------------------------------------------------------------------
ITEM = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I64": 8}


def inventory(c, tail="mtp", base=False, markov=256):
    """Yield (name, safetensors dtype, shape) for a whole checkpoint.

    tail: "mtp" (April checkpoints) or "dspark" (0731 / 0813).
    base: FP8 experts and fp32 scales, plus the two extra MTP tensors.
    """
    d, scale_t = c.d, "F32" if base else "F8_E8M0"

    def fp8(n, o, i):
        yield n + ".weight", "F8_E4M3", (o, i)
        yield n + ".scale", scale_t, (-(-o // 128), -(-i // 128))

    def routed(n, o, i):
        if base:
            yield from fp8(n, o, i)
        else:
            yield n + ".weight", "I8", (o, i // 2)
            yield n + ".scale", "F8_E8M0", (o, i // 32)

    def ffn(p):
        return ((p + ".w1", c.moe_inter, d), (p + ".w2", d, c.moe_inter),
                (p + ".w3", c.moe_inter, d))

    def compressor(p, r, hd):
        w = hd * (2 if r == 4 else 1)
        yield p + "ape", "F32", (r, w)
        yield p + "norm.weight", "BF16", (hd,)
        yield p + "wkv.weight", "BF16", (w, d)
        yield p + "wgate.weight", "BF16", (w, d)

    def collapse(p):
        yield p + "hc_head_fn", "F32", (c.hc, c.hc * d)
        yield p + "hc_head_base", "F32", (c.hc,)
        yield p + "hc_head_scale", "F32", (1,)
        yield p + "norm.weight", "BF16", (d,)

    def block(p, r, hashed):
        a, width = p + "attn.", c.heads * c.head_dim
        yield a + "attn_sink", "F32", (c.heads,)
        yield a + "q_norm.weight", "BF16", (c.q_lora,)
        yield a + "kv_norm.weight", "BF16", (c.head_dim,)
        yield from fp8(a + "wq_a", c.q_lora, d)
        yield from fp8(a + "wq_b", width, c.q_lora)
        yield from fp8(a + "wkv", c.head_dim, d)
        yield from fp8(a + "wo_a", c.o_groups * c.o_lora, width // c.o_groups)
        yield from fp8(a + "wo_b", d, c.o_groups * c.o_lora)
        if r:
            yield from compressor(a + "compressor.", r, c.head_dim)
        if r == 4:
            yield from compressor(a + "indexer.compressor.", r, c.idx_dim)
            yield a + "indexer.weights_proj.weight", "BF16", (c.idx_heads, d)
            yield from fp8(a + "indexer.wq_b", c.idx_heads * c.idx_dim, c.q_lora)
        mix = (2 + c.hc) * c.hc
        for s in ("attn", "ffn"):
            yield p + s + "_norm.weight", "BF16", (d,)
            yield p + f"hc_{s}_fn", "F32", (mix, c.hc * d)
            yield p + f"hc_{s}_base", "F32", (mix,)
            yield p + f"hc_{s}_scale", "F32", (3,)
        yield p + "ffn.gate.weight", "BF16", (c.n_routed, d)
        if hashed:
            yield p + "ffn.gate.tid2eid", "I64", (c.vocab, c.active)
        else:
            yield p + "ffn.gate.bias", "F32", (c.n_routed,)
        for e in range(c.n_routed):
            for n, o, i in ffn(p + f"ffn.experts.{e}"):
                yield from routed(n, o, i)
        for n, o, i in ffn(p + "ffn.shared_experts"):
            yield from fp8(n, o, i)

    yield "embed.weight", "BF16", (c.vocab, d)
    yield "head.weight", "BF16", (c.vocab, d)
    yield from collapse("")
    for layer, r in enumerate(c.ratios):
        yield from block(f"layers.{layer}.", r, layer < c.n_hash)
    if tail == "mtp":
        p = "mtp.0."
        yield from block(p, 0, False)
        yield from fp8(p + "e_proj", d, d)
        yield from fp8(p + "h_proj", d, d)
        yield p + "enorm.weight", "BF16", (d,)
        yield p + "hnorm.weight", "BF16", (d,)
        yield from collapse(p)
        if base:  # names not seen; only their count and total size are known
            yield p + "(embedding copy)", "BF16", (c.vocab, d)
            yield p + "(head copy)", "BF16", (c.vocab, d)
    else:
        for s in range(3):
            yield from block(f"mtp.{s}.", 0, False)
        yield from fp8("mtp.0.main_proj", d, 3 * d)
        yield "mtp.0.main_norm.weight", "BF16", (d,)
        yield from collapse("mtp.2.")
        for n in ("markov_w1", "markov_w2"):
            yield f"mtp.2.markov_head.{n}.weight", "BF16", (c.vocab, markov)
        yield "mtp.2.confidence_head.proj.weight", "BF16", (1, d + markov)


def tally(items, prefix=""):
    n = size = elements = 0
    for name, dt, shape in items:
        if name.startswith(prefix):
            k = 1
            for x in shape:
                k *= x
            n, size, elements = n + 1, size + k * ITEM[dt], elements + k
    return n, size, elements


# published totals: (tensors, payload bytes, stored elements); None = not seen
PUBLISHED = [
    ("Flash", FLASH, {}, "", (69187, 159609485896, 158069433298)),
    ("Flash, mtp.*", FLASH, {}, "mtp.", (1575, 3593787756, None)),
    ("Pro", PRO, {}, "", (145116, None, 861608274846)),
    ("Flash-Base", FLASH, {"base": True}, "", (69189, 294673469000, None)),
    ("Flash-0731", FLASH, {"tail": "dspark"}, "", (72317, None, None)),
    ("Flash-0731, mtp.*", FLASH, {"tail": "dspark"}, "mtp.", (4705, 10862838300, None)),
    ("Pro-0813", PRO, {"tail": "dspark", "markov": 512}, "", (149782, 892727580904, None)),
]


def ckpt_report():
    bad = 0
    print("checkpoint       tensors          bytes       stored elements")
    for label, c, kw, prefix, want in PUBLISHED:
        got = tally(inventory(c, **kw), prefix)
        cells = []
        for g, t in zip(got, want):
            ok = t is None or g == t
            bad += not ok
            cells.append(f"{g}{'' if t is None else ' =' if ok else f' != {t}'}")
        print(f"  {label:18s}", "  ".join(cells))
    print("'=' marks a published total reproduced exactly; no mark: total not seen")
    return bad


# --------------------------------------------------------------------------
# parameters touched by one decoded token, split by GEMM precision
# --------------------------------------------------------------------------
def v4_params(c):
    fp8 = fp4 = hi = 0
    csa = sum(r == 4 for r in c.ratios)
    hca = sum(r == 128 for r in c.ratios)
    per = c.d * c.q_lora + c.q_lora * c.heads * c.head_dim + c.d * c.head_dim
    per += (c.heads * c.head_dim) * c.o_lora           # block-diagonal wo_a
    per += c.o_groups * c.o_lora * c.d                 # wo_b
    fp8 += per * c.layers
    fp8 += csa * c.q_lora * c.idx_heads * c.idx_dim    # indexer wq_b
    fp8 += c.layers * c.shared * 3 * c.d * c.moe_inter
    fp4 += c.layers * c.active * 3 * c.d * c.moe_inter
    hi += csa * 2 * c.d * 2 * c.head_dim + hca * 2 * c.d * c.head_dim
    hi += csa * 2 * c.d * 2 * c.idx_dim + csa * c.d * c.idx_heads
    hi += c.layers * c.d * c.n_routed                  # router
    hi += c.layers * 2 * (2 + c.hc) * c.hc * c.hc * c.d
    hi += c.hc * c.hc * c.d                            # final stream collapse
    hi += c.vocab * c.d                                # lm head
    return {"fp8": fp8, "fp4": fp4, "hi": hi}


def v4_total_params(c):
    p = v4_params(c)
    routed_all = c.layers * c.n_routed * 3 * c.d * c.moe_inter
    return p["fp8"] + p["hi"] + routed_all + c.vocab * c.d


def v32_params():
    c = V32
    attn = c.d * c.q_lora + c.q_lora * c.heads * (c.nope + c.rope)
    attn += c.d * (c.kv_lora + c.rope) + c.kv_lora * c.heads * (c.nope + c.v)
    attn += c.heads * c.v * c.d
    idx8 = c.q_lora * c.idx_heads * c.idx_dim + c.d * c.idx_dim
    fp8 = c.layers * (attn + idx8)
    fp8 += c.dense_layers * 3 * c.d * c.dense_inter
    moe_l = c.layers - c.dense_layers
    fp8 += moe_l * (c.active + c.shared) * 3 * c.d * c.moe_inter
    hi = moe_l * c.d * c.n_routed + c.layers * c.d * c.idx_heads
    hi += c.vocab * c.d
    return {"fp8": fp8, "fp4": 0, "hi": hi}


# --------------------------------------------------------------------------
# FLOPs of decoding the token at context length n
# --------------------------------------------------------------------------
def v4_flops(c, n, w):
    p = v4_params(c)
    gemm = 2 * (w["fp8"] * p["fp8"] + w["w4a8"] * p["fp4"] + w["hi"] * p["hi"])
    core = idx = 0.0
    for r in c.ratios:
        keys = min(n, c.window)
        if r == 4:
            keys += min(c.topk, n // 4)
            idx += 2 * c.idx_heads * c.idx_dim * (n // 4)
        elif r == 128:
            keys += n // 128
        core += 4 * c.heads * c.head_dim * keys        # q.k and p.v
    return {"gemm": gemm, "core": w["attn"] * core, "index": w["idx4"] * idx}


def v32_flops(n, w):
    c = V32
    p = v32_params()
    gemm = 2 * (w["fp8"] * p["fp8"] + w["hi"] * p["hi"])
    keys = min(n, c.topk)
    core = 2 * c.heads * keys * ((c.kv_lora + c.rope) + c.kv_lora) * c.layers
    idx = 2 * c.idx_heads * c.idx_dim * n * c.layers
    return {"gemm": gemm, "core": w["attn"] * core, "index": w["idx8"] * idx}


# Price of one operation relative to an FP8 tensor-core operation.
WEIGHTINGS = {
    # bf16 runs at half the fp8 rate, fp4xfp4 at twice it, fp4-weight x
    # fp8-activation at the fp8 rate (the report says so for current hardware)
    "fp8-equivalent": dict(fp8=1, w4a8=1, hi=2, attn=2, idx8=1, idx4=0.5),
    # as above but without credit for the fp4 indexer
    "no fp4 credit": dict(fp8=1, w4a8=1, hi=2, attn=2, idx8=1, idx4=1),
    # plain operation count
    "raw count": dict(fp8=1, w4a8=1, hi=1, attn=1, idx8=1, idx4=1),
}

TARGET = {
    # the report's text (percent of V3.2) and the labels inside its figure 1
    ("kv", "V4-Pro"): (10, 9.5), ("kv", "V4-Flash"): (7, 13.7),
    ("flops", "V4-Pro"): (27, 3.7), ("flops", "V4-Flash"): (10, 9.8),
}


def compute(n=M1):
    out = {"n": n, "kv": {}, "flops": {}, "params": {}}
    base = v32_kv()
    out["kv"]["V3.2"] = {"B_per_token": base, "GB": base * n / 1e9}
    for c in (PRO, FLASH):
        grow, win, tail = v4_kv(c)
        b16 = v4_kv(c, "v4_bf16", "idx_bf16")[0]
        i8 = v4_kv(c, "v4_mixed", "idx_fp8")[0]
        gqa = gqa8_kv(c.layers)
        main_only = v4_kv(c)[0] - sum(r == 4 for r in c.ratios) * entry_bytes("idx_fp4") / 4
        out["kv"][c.name] = {
            "B_per_token": grow, "GB": grow * n / 1e9,
            "window_MB": win / 1e6, "tail_state_MB": tail / 1e6,
            "times_smaller_than_V3.2": base / grow,
            "percent_of_V3.2": 100 * grow / base,
            "percent_incl_window_and_tail": 100 * (grow * n + win + tail) / (base * n),
            "percent_of_GQA8_same_depth": 100 * grow / gqa,
            "percent_of_GQA8_61_layers": 100 * grow / gqa8_kv(61),
            "B_per_token_all_bf16": b16,
            "B_per_token_fp8_indexer": i8,
            "full_SWA_over_compressed_main": c.layers * entry_bytes("v4_mixed") / main_only,
        }
        p = v4_params(c)
        out["params"][c.name] = {
            "touched_B": sum(p.values()) / 1e9,
            "touched_plus_embedding_B": (sum(p.values()) + c.vocab * c.d) / 1e9,
            "backbone_total_B": v4_total_params(c) / 1e9,
        }
    out["params"]["V3.2"] = {"touched_B": sum(v32_params().values()) / 1e9}
    for label, w in WEIGHTINGS.items():
        ref = v32_flops(n, w)
        tot = sum(ref.values())
        row = {"V3.2": {"T": tot / 1e12, **{k: v / 1e12 for k, v in ref.items()}}}
        for c in (PRO, FLASH):
            f = v4_flops(c, n, w)
            t = sum(f.values())
            row[c.name] = {
                "T": t / 1e12, **{k: v / 1e12 for k, v in f.items()},
                "percent_of_V3.2": 100 * t / tot, "times_lower": tot / t,
            }
        out["flops"][label] = row
    return out


def report(o):
    n = o["n"]
    print(f"context n = {n} tokens\n")
    print("parameters used per decoded token (billions)")
    for k, v in o["params"].items():
        print("  %-9s" % k, "  ".join(f"{a}={b:.2f}" for a, b in v.items()))
    print("\nKV cache that grows with context")
    b = o["kv"]["V3.2"]
    print(f"  V3.2      {b['B_per_token']:9.1f} B/token  {b['GB']:7.3f} GB")
    for name in ("V4-Pro", "V4-Flash"):
        v = o["kv"][name]
        print(f"  {name:9s} {v['B_per_token']:9.1f} B/token  {v['GB']:7.3f} GB"
              f"  {v['percent_of_V3.2']:5.2f}% of V3.2 = {v['times_smaller_than_V3.2']:.2f}x smaller"
              f"  (report {TARGET['kv', name][0]}%, {TARGET['kv', name][1]}x)")
        print(f"            + fixed per sequence: window {v['window_MB']:.2f} MB,"
              f" fp32 tail states {v['tail_state_MB']:.2f} MB"
              f" -> {v['percent_incl_window_and_tail']:.2f}% in all")
        print(f"            {v['percent_of_GQA8_same_depth']:.2f}% of GQA-8 bf16 at equal depth,"
              f" {v['percent_of_GQA8_61_layers']:.2f}% at 61 layers (report ~2%)")
        print(f"            all-bf16 cache {v['B_per_token_all_bf16']:.1f} B/token;"
              f" fp8 indexer keys {v['B_per_token_fp8_indexer']:.1f} B/token;"
              f" uncompressed SWA of every token is"
              f" {v['full_SWA_over_compressed_main']:.2f}x the compressed entries (report ~8x)")
    print("\nsingle-token FLOPs (T), by price list")
    for label, row in o["flops"].items():
        print(f"  [{label}]")
        for name, v in row.items():
            line = (f"    {name:9s} total {v['T']:.4f}  gemm {v['gemm']:.4f}"
                    f"  attention {v['core']:.4f}  indexer {v['index']:.4f}")
            if "times_lower" in v:
                t = TARGET["flops", name]
                line += (f"  -> {v['percent_of_V3.2']:.2f}% = {v['times_lower']:.2f}x lower"
                         f" (report {t[0]}%, {t[1]}x)")
            print(line)


def check(o):
    bad = []
    for name in ("V4-Pro", "V4-Flash"):
        got = o["kv"][name]["times_smaller_than_V3.2"]
        want = TARGET["kv", name][1]
        if abs(got / want - 1) > 0.01:
            bad.append(f"kv {name}: {got:.3f} vs {want}")
        got = o["flops"]["fp8-equivalent"][name]["times_lower"]
        want = TARGET["flops", name][1]
        if abs(got / want - 1) > 0.03:
            bad.append(f"flops {name}: {got:.3f} vs {want}")
    return bad


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--n", type=int, default=M1)
    ap.add_argument("--json", action="store_true")
    ap.add_argument("--check", action="store_true")
    ap.add_argument("--ckpt", action="store_true")
    a = ap.parse_args()
    assert FLASH.ratios.count(4) == 21 and FLASH.ratios.count(128) == 20
    assert PRO.ratios.count(4) == 30 and PRO.ratios.count(128) == 31
    if a.ckpt:
        return 1 if ckpt_report() else 0
    o = compute(a.n)
    if a.json:
        json.dump(o, sys.stdout, indent=1)
        print()
    else:
        report(o)
    if a.check:
        bad = check(o)
        print("\nCHECK:", "ok" if not bad else "; ".join(bad))
        return 1 if bad else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
