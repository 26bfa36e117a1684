"""`abyssal inspect`: what a model holds and costs, without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from abyssal.base.errors import InputError
from abyssal.base.machine import this_machine
from abyssal.cli.models import config_of


def inspect(
    model: Annotated[str, typer.Argument(help="A preset (flash, pro, ...), a release folder or a config.json.")],
    context: Annotated[int, typer.Option(help="Tokens of context.")] = 1_000_000,
    json_out: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw FLOPs and cache against context into this file.")] = None,
) -> None:
    """Count a model's tensors, bytes, cache and FLOPs, and say what fits into this machine."""
    from abyssal.efficiency.report import GIB
    from abyssal.efficiency.report import inspect as count

    config = config_of(model)
    if any(Path(model).glob("*.safetensors")):
        from abyssal.checkpoint.release import Release

        config = Release(model).config  # the headers decide, and every tensor is checked
    if not 1 <= context <= config.max_position_embeddings:
        raise InputError(f"context is {context}: use 1 to {config.max_position_embeddings}")
    if plot is not None:
        from abyssal.efficiency.plot import plot as draw

        if plot.suffix not in (".png", ".svg", ".pdf"):
            raise InputError(f"{plot} is no picture that we draw: use .png, .svg or .pdf")
        draw({Path(model).name: config}, plot)
    report = count(config, context, this_machine())
    if json_out:
        print(json.dumps(report.to_json()))
        return
    kinds = ", ".join(f"{report.layers.count(k)} {k}" for k in ("SWA", "CSA", "HCA") if k in report.layers)
    print(f"{model}: {len(report.layers)} blocks ({kinds}) and {config.draft_stages} draft")
    print(f"  {report.parameters:,} parameters, {report.active_parameters:,} used for a token")
    print(f"  {report.tensors:,} tensors, {report.bytes:,} bytes ({report.bytes / GIB:,.2f} GiB)")
    for dtype, row in report.dtypes.items():
        print(f"    {dtype:9s} {row['tensors']:>7,} tensors  {row['bytes']:>17,} bytes")
    print(f"at {context:,} tokens of context")
    print(
        f"  cache  {report.kv_bytes_per_token:,.1f} bytes a token, {report.kv_bytes / GIB:,.3f} GiB, beside"
        f" {report.kv_fixed_bytes / 2**20:,.1f} MiB fixed: {100 * report.kv_vs_v32:.2f}% of V3.2,"
        f" {100 * report.kv_vs_gqa8:.2f}% of GQA-8 in bfloat16"
    )
    print(
        f"  FLOPs  {report.flops_per_token / 1e9:,.1f} G a decoded token (FP8-equivalent):"
        f" {100 * report.flops_vs_v32:.2f}% of V3.2"
    )
    print("on this machine")
    for fit in report.fits:
        print(f"  {'yes' if fit.fits else 'no':3s} {fit.what}: {fit.why}")
