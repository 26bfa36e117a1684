"""`abyssal serve`: the APIs and the web chat, over a model in this process or an engine elsewhere."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abyssal.base.errors import InputError
from abyssal.cli.completers import open_local, open_remote
from abyssal.cli.models import BUNDLED, parse_bytes, read_text, snapshot_of

if TYPE_CHECKING:
    from abyssal.chat.local import LocalCompleter
    from abyssal.chat.remote import RemoteCompleter

KEYS = "ABYSSAL_API_KEYS"  # separated by commas: an argument can be seen by other users
UPSTREAM_KEY = "ABYSSAL_UPSTREAM_KEY"


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _keys(given: list[str], file: Path | None) -> list[str]:
    """All keys that may call: from arguments, a file with one a line, and the environment."""
    lines = read_text(file).splitlines() if file is not None else []
    found = [*given, *lines, *os.environ.get(KEYS, "").split(",")]
    return [key.strip() for key in found if key.strip() and not key.startswith("#")]


def _example(url: str, model: str) -> str:
    """A request to copy."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50}
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def serve(
    model: Annotated[str, typer.Option(help="A release folder, or nano for the bundled model.")] = BUNDLED,
    host: Annotated[str, typer.Option(help="Address; anything but loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[list[str] | None, typer.Option(help="A key that may call; may be repeated.")] = None,
    api_keys_file: Annotated[Path | None, typer.Option(help="A file with a key a line; # begins a comment.")] = None,
    upstream: Annotated[str | None, typer.Option(help="An engine with /v1/completions that runs the model.")] = None,
    upstream_model: Annotated[str | None, typer.Option(help="The model's name there.")] = None,
    upstream_key: Annotated[str | None, typer.Option(help="Its API key.", envvar=UPSTREAM_KEY)] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A folder with the upstream model's tokenizer.json.")] = None,
    context: Annotated[int | None, typer.Option(help="The upstream's context, if it does not say.", min=1)] = None,
    snapshot: Annotated[str, typer.Option(help="Whose encoding the model knows: april or 0731.")] = "april",
    cache_memory: Annotated[str | None, typer.Option(help="Memory of the cache, such as 2GiB.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Memory of the process; experts stay on disk.")] = None,
    disk_cache: Annotated[bool, typer.Option(help="Keep prompts on disk, to reuse them later.")] = True,
    legacy_names: Annotated[bool, typer.Option(help="Answer to deepseek-chat and deepseek-reasoner.")] = True,
    strict: Annotated[bool, typer.Option(help="Refuse missing reasoning as the vendor does; do not repair.")] = False,
    vendor_sampling: Annotated[bool, typer.Option(help="Ignore temperature and penalties while thinking.")] = False,
    answer_reserve: Annotated[int, typer.Option(help="Tokens of max_tokens that thinking leaves over.")] = 0,
    max_body: Annotated[str, typer.Option(help="Largest body.")] = "64MiB",
    max_requests: Annotated[int, typer.Option(help="Most requests at once, running and waiting.")] = 256,
    max_requests_per_key: Annotated[int | None, typer.Option(help="The same for one key.")] = None,
    max_tokens_per_key: Annotated[int | None, typer.Option(help="Tokens a key may use until the end.")] = None,
    traces: Annotated[int, typer.Option(help="Requests kept in memory for the trace page; 0 for none.")] = 32,
    cors: Annotated[list[str] | None, typer.Option(help="An origin that may call from a browser.")] = None,
    log_prompts: Annotated[bool, typer.Option(help="Write prompts and answers to the log.")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    grace: Annotated[float, typer.Option(help="Seconds that running requests get at the end.")] = 30.0,
) -> None:
    """Serve the OpenAI and Anthropic APIs and a web chat over HTTP."""
    known = snapshot_of(snapshot)
    if upstream is None and (upstream_model or tokenizer or context):
        raise InputError("--upstream-model, --tokenizer and --context are about an upstream: give --upstream URL")
    if upstream is not None and max_memory:
        raise InputError("--max-memory is about a model in this process: leave out --upstream")
    allowed = _keys(api_key or [], api_keys_file)
    if not _loopback(host) and not allowed:
        raise InputError(f"{host} can be reached from elsewhere: give --api-key, or serve on 127.0.0.1")
    if log_level not in ("debug", "info", "warning", "error"):
        raise InputError(f"unknown log level {log_level!r}: choose from debug, info, warning, error")
    for name, value in (("--max-requests", max_requests), ("--max-requests-per-key", max_requests_per_key),
                        ("--max-tokens-per-key", max_tokens_per_key)):  # fmt: skip
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: give 1 or more")
    for name, number in (("--traces", traces), ("--answer-reserve", answer_reserve), ("--grace", grace)):
        if number < 0:
            raise InputError(f"{name} is {number}: give 0 or more")
    from abyssal.base import log
    from abyssal.server.app import Server
    from abyssal.server.run import run
    from abyssal.server.settings import Settings, keys

    settings = Settings(
        api_keys=keys(allowed), legacy_names=legacy_names, strict=strict, vendor_sampling=vendor_sampling,
        answer_reserve=answer_reserve, body_bytes=parse_bytes(max_body), requests=max_requests,
        requests_per_key=max_requests_per_key, tokens_per_key=max_tokens_per_key, traces=traces,
        cors=tuple(cors or ()), log_prompts=log_prompts, grace_s=grace,
    )  # fmt: skip
    try:
        listening = socket.create_server((host, port), reuse_port=False)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port} ({error.strerror}): choose another port") from None
    log.configure(log_level)
    completer: LocalCompleter | RemoteCompleter
    if upstream is not None:
        completer = open_remote(
            upstream, known, model=upstream_model, key=upstream_key, tokenizer=tokenizer, context=context
        )
        model = f"{completer.model} at {upstream}"
    else:
        completer = open_local(
            model, known, cache_memory=cache_memory, max_memory=max_memory, disk_cache=disk_cache
        )
    url = f"http://{host}:{listening.getsockname()[1]}"
    print(f"listening on {url}", flush=True)
    print(f"{model}: web chat at {url}/, routes at {url}/docs; Ctrl-C ends. Try:\n  {_example(url, completer.model)}",
          file=sys.stderr)  # fmt: skip
    try:
        run(Server(completer, settings), [listening])
    finally:
        completer.close()
