"""`abyssal convert`: a release in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from abyssal.cli.models import folder_of


def convert(
    source: Annotated[str, typer.Argument(help="A release folder, or nano.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    layout: Annotated[str, typer.Option(help="flash, base, bf16 or fp32.")],
) -> None:
    """Write a release in another layout, tensor by tensor: FP4 to FP8 without loss, or to bf16 and fp32."""
    from abyssal.arch.tensors import Layout
    from abyssal.checkpoint.save import convert as write

    write(folder_of(source), out, cast("Layout", layout))
