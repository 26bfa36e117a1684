"""Everything that `abyssal inspect` says about a model, without allocating one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from abyssal.arch.config import ModelConfig
from abyssal.arch.tensors import TensorSpec, active_parameters, inventory, parameters, totals
from abyssal.base.machine import Machine
from abyssal.efficiency.baselines import gqa8_kv_per_token, v32_flops, v32_kv_per_token
from abyssal.efficiency.flops import decode_flops
from abyssal.efficiency.kv import kv_cost

GIB = 2**30
# beside a layer's weights: their expanded bands, activations, the interpreter and torch itself
RUNTIME_BYTES = GIB


@dataclass(frozen=True)
class Fit:
    """One way to run a model on this machine, whether it is possible, and why."""

    what: str
    fits: bool
    why: str


@dataclass(frozen=True)
class Inspection:
    """The numbers of the command contract (design.md 7), and the tables that the text form prints.

    `kv_vs_v32`, `kv_vs_gqa8` and `flops_vs_v32` are ratios; GQA-8 is taken at the model's own depth.
    """

    tensors: int
    bytes: int
    parameters: int
    active_parameters: int
    context: int
    kv_bytes_per_token: float
    kv_bytes: float
    kv_fixed_bytes: int
    flops_per_token: float
    kv_vs_v32: float
    kv_vs_gqa8: float
    flops_vs_v32: float
    layers: list[str]
    dtypes: dict[str, dict[str, int]]
    fits: list[Fit]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def inspect(config: ModelConfig, context: int, machine: Machine) -> Inspection:
    """Compute the report of a model at a context, for a machine.

    Args:
        config: the model's numbers.
        context: tokens.
        machine: what it should fit into.
    """
    specs = list(inventory(config))
    total = totals(specs)
    kv = kv_cost(config)
    flops = decode_flops(config, context).total
    return Inspection(
        tensors=total.tensors,
        bytes=total.nbytes,
        parameters=parameters(specs),
        active_parameters=active_parameters(config, specs),
        context=context,
        kv_bytes_per_token=kv.per_token,
        kv_bytes=kv.at(context),
        kv_fixed_bytes=kv.fixed,
        flops_per_token=flops,
        kv_vs_v32=kv.per_token / v32_kv_per_token(),
        kv_vs_gqa8=kv.per_token / gqa8_kv_per_token(config.num_hidden_layers),
        flops_vs_v32=flops / v32_flops(context).total,
        layers=[kind.name for kind in config.kinds],
        dtypes=_by_dtype(specs),
        fits=_fits(config, specs, context, machine),
    )


def _by_dtype(specs: Iterable[TensorSpec]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for spec in specs:
        name = "FP4 (I8)" if spec.format == "fp4" else spec.dtype
        row = table.setdefault(name, {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += spec.nbytes
    return table


def streaming_bytes(config: ModelConfig, specs: Iterable[TensorSpec], context: int) -> int:
    """Least memory for running layer by layer: a block without its experts, streams and cache of one layer."""
    blocks: dict[str, int] = {}
    for spec in specs:
        if ".experts." not in spec.name and spec.name.startswith("layers."):
            key = spec.name.split(".")[1]
            blocks[key] = blocks.get(key, 0) + spec.nbytes
    streams = context * config.hc_mult * config.hidden_size * 4
    return max(blocks.values()) + 2 * streams + RUNTIME_BYTES


def _fits(config: ModelConfig, specs: list[TensorSpec], context: int, machine: Machine) -> list[Fit]:
    weights = totals(specs).nbytes
    kv = kv_cost(config)
    memory = machine.memory_available
    room = memory - weights - kv.fixed - RUNTIME_BYTES
    longest = max(min(int(room / kv.per_token), config.max_position_embeddings), 0) if room > 0 else 0
    at_once = weights + kv.at(context) + kv.fixed + RUNTIME_BYTES
    stream = streaming_bytes(config, specs, 4096)
    return [
        Fit("files on disk", weights <= machine.disk_free, _need(weights, machine.disk_free, "disk")),
        Fit(f"in memory at {context:,} tokens", at_once <= memory, _need(at_once, memory, "memory")),
        Fit("in memory at its longest context", longest > 0, f"room for {longest:,} tokens beside the weights"),
        Fit("layer by layer at 4,096 tokens", stream <= memory, _need(stream, memory, "memory")),
    ]


def _need(need: float, have: float, what: str) -> str:
    return f"needs {need / GIB:,.2f} GiB of {what}, {have / GIB:,.2f} GiB free"
