"""`abyssal make-release`: a random checkpoint in release layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from abyssal.cli.models import config_of


def make_release(
    config: Annotated[str, typer.Argument(help="A preset, a config.json or a release folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    seed: Annotated[int, typer.Option(help="Equal seeds give equal bytes.")] = 0,
    layout: Annotated[str, typer.Option(help="flash, base, 0731, bf16 or fp32.")] = "flash",
) -> None:
    """Write a release with random weights, to test loaders and engines."""
    from abyssal.arch.tensors import Layout
    from abyssal.checkpoint.save import make_release as write

    write(config_of(config), seed, cast("Layout", layout), out)
