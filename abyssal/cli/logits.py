"""`abyssal logits`: the exact numbers of a pass, from a release of any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from abyssal.base.errors import InputError
from abyssal.cli.models import dtype_and_numerics, folder_of, parse_bytes, parse_ids, read_text


def logits(
    folder: Annotated[str, typer.Argument(help="A release folder, or nano.")],
    out: Annotated[Path, typer.Option(help="The .npy file to write, [tokens, vocabulary].")],
    ids: Annotated[str | None, typer.Option(help="Token ids, separated by commas.")] = None,
    ids_file: Annotated[Path | None, typer.Option(help="A file with token ids.")] = None,
    dtype: Annotated[str, typer.Option(help="float64, float32 or bfloat16.")] = "float32",
    mode: Annotated[str, typer.Option(help="exact, fake or packed.")] = "exact",
    chunks: Annotated[str | None, typer.Option(help="Lengths in which the tokens pass, such as 5,1,1.")] = None,
    mtp: Annotated[bool, typer.Option("--mtp", help="Write the MTP head's logits instead.")] = False,
    max_memory: Annotated[str | None, typer.Option(help="Memory for the process, such as 4GiB.")] = None,
    json_out: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write the logits of token ids, layer by layer from disk."""
    if (ids is None) == (ids_file is None):
        raise InputError("give exactly one of --ids and --ids-file")
    limit = parse_bytes(max_memory) if max_memory else None
    from abyssal.checkpoint.stream import stream_logits

    number_type, numerics = dtype_and_numerics(dtype, mode)
    tokens = parse_ids(read_text(ids_file) if ids_file is not None else ids or "")
    plan = stream_logits(
        folder_of(folder),
        tokens,
        out,
        dtype=number_type,
        numerics=numerics,
        chunks=parse_ids(chunks) if chunks else None,
        mtp=mtp,
        max_memory=limit,
    )
    if json_out:
        print(json.dumps({"out": str(out), "tokens": len(tokens), "chunk": plan.chunk, "planned_bytes": plan.need}))
