"""`abyssal generate`: continue a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from abyssal.base.errors import InputError
from abyssal.cli.models import BUNDLED, open_model, parse_ids, read_text


def generate(
    model: Annotated[str, typer.Option(help="A release folder, or nano for the bundled model.")] = BUNDLED,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with the text to continue.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids to continue, separated by commas.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal text.")] = None,
    json_out: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Continue a text with a model."""
    if sum(x is not None for x in (prompt, file, ids)) != 1:
        raise InputError("give exactly one of --prompt, --file and --ids")
    from abyssal.encoding.literals import BOS, EOS
    from abyssal.encoding.tokenizer import Piece
    from abyssal.engine.sampler import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    tokenizer, engine = open_model(model)
    if ids is not None:
        tokens = parse_ids(ids)
    else:
        text = read_text(file) if file is not None else prompt or ""
        tokens = tokenizer.encode_pieces([Piece(BOS, special=True), Piece(text)])
    stop = [tokenizer.special(EOS)]
    record, stream = engine.start(tokens, max_tokens=max_tokens, sampling=sampling, stop=stop)
    pieces = []
    decoder = tokenizer.stream()
    for token in stream:
        pieces.append(decoder.add(token))
        if not json_out:
            print(pieces[-1], end="", flush=True)
    pieces.append(decoder.finish())
    if not json_out:
        print(pieces[-1])
        return
    result = {
        "text": "".join(pieces),
        "tokens": record.tokens,
        "logprobs": record.logprobs,
        "finish_reason": record.finish_reason,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": 0,  # prefix reuse is not built yet
        "prefill_tokens_per_s": record.prefill_tokens_per_s,
        "decode_tokens_per_s": record.decode_tokens_per_s,
    }
    print(json.dumps(result, ensure_ascii=False))
