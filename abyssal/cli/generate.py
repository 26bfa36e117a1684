"""`abyssal generate`: continue a prompt, perhaps behind a long text."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from abyssal.base.errors import InputError, RunError
from abyssal.base.progress import Progress
from abyssal.cli.models import BUNDLED, open_model, parse_bytes, parse_ids, read_text


def generate(
    model: Annotated[str, typer.Option(help="A release folder, or nano for the bundled model.")] = BUNDLED,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with the text to continue.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids to continue, separated by commas.")] = None,
    context: Annotated[Path | None, typer.Option(help="A file to read before the prompt, up to 1M tokens.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep so many of the likeliest tokens; 0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the largest probability.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be repeated.")] = None,
    schema: Annotated[Path | None, typer.Option(help="A JSON schema that the answer must match.")] = None,
    grammar: Annotated[Path | None, typer.Option(help="A Lark grammar that the answer must match.")] = None,
    drafts: Annotated[int, typer.Option(help="Tokens that the MTP block drafts; the answer stays the same.")] = 0,
    mode: Annotated[str, typer.Option(help="exact, fake or packed.")] = "exact",
    cache_memory: Annotated[str | None, typer.Option(help="Memory of the cache, such as 2GiB.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Memory of the process; experts stay on disk.")] = None,
    disk_cache: Annotated[bool, typer.Option(help="Keep prompts on disk, to reuse them later.")] = True,
    policy: Annotated[str, typer.Option(help="Where window entries are kept: full, periodic or zero.")] = "periodic",
    json_out: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Continue a text with a model."""
    if sum(x is not None for x in (prompt, file, ids)) != 1:
        raise InputError("give exactly one of --prompt, --file and --ids")
    if schema is not None and grammar is not None:
        raise InputError("--schema and --grammar contradict each other: give one")
    from abyssal.encoding.literals import BOS, EOS
    from abyssal.encoding.tokenizer import Piece
    from abyssal.engine.grammar import Grammar
    from abyssal.engine.request import Request
    from abyssal.engine.sampler import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    rule = Grammar("json_schema", read_text(schema)) if schema is not None else None
    rule = Grammar("lark", read_text(grammar)) if grammar is not None else rule
    before = read_text(context) if context is not None else None
    text = read_text(file) if file is not None else prompt or ""
    budget = parse_bytes(cache_memory) if cache_memory else None
    limit = parse_bytes(max_memory) if max_memory else None
    tokenizer, engine = open_model(
        model, cache_bytes=budget, max_memory=limit, disk=disk_cache, policy=policy, mode=mode
    )
    pieces = [Piece(BOS, special=True)] if ids is None or before is not None else []
    if before is not None:
        pieces.append(Piece(before))
    tokens = tokenizer.encode_pieces([*pieces, Piece(text)] if ids is None else pieces)
    if ids is not None:
        tokens += parse_ids(ids)
    request = Request(
        prompt=tuple(tokens),
        max_tokens=max_tokens,
        sampling=sampling,
        stop=(tokenizer.special(EOS),),
        stop_strings=tuple(stop or ()),
        grammar=rule,
        drafts=drafts,
    )
    with Progress(len(tokens), "tokens", "reading the prompt") as progress:
        number, events = engine.stream(request, lambda read: progress.advance(read - progress.done))
        shown = tokenizer.stream()
        out = []
        for event in events:
            if event.token is None:
                raise RunError(event.error or "the request was cancelled")
            out.append(shown.add(event.token))
            if not json_out and not stop:
                print(out[-1], end="", flush=True)
    record = engine.records[number]
    answer = record.answers[0]
    text = "".join(out) + shown.finish()
    if answer.settled is not None:
        raw = b"".join(tokenizer.token_bytes(t) for t in answer.tokens if t not in request.stop)
        text = raw[: answer.settled].decode(errors="replace")
    if not json_out:
        print(text if stop else "")
        return
    result = {
        "text": text,
        "tokens": answer.tokens,
        "logprobs": answer.logprobs,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.prefix.hit,
        "recomputed_tokens": record.prefix.recomputed,
        "cache_reason": record.prefix.reason,
        "first_token_s": record.queued_s + record.prefill_s,
        "prefill_tokens_per_s": record.prefill_tokens_per_s,
        "decode_tokens_per_s": record.decode_tokens_per_s,
        "drafted_tokens": record.drafted,
        "accepted_tokens": record.accepted,
    }
    if engine.expert_use is not None:
        result |= {f"expert_{name}": value for name, value in asdict(engine.expert_use).items()}
    print(json.dumps(result, ensure_ascii=False))
