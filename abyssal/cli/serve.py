"""`abyssal serve`: the APIs, over a model in this process."""

from __future__ import annotations

import ipaddress
import socket
import sys
from typing import Annotated

import typer

from abyssal.base.errors import InputError
from abyssal.cli.models import BUNDLED, open_model, parse_bytes

GRACE_S = 30  # what runs may take so long to end


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    model: Annotated[str, typer.Option(help="A release folder, or nano for the bundled model.")] = BUNDLED,
    host: Annotated[str, typer.Option(help="Address; anything but loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[list[str] | None, typer.Option(help="A key that may call; may be repeated.")] = None,
    snapshot: Annotated[str, typer.Option(help="Whose encoding the model knows: april or 0731.")] = "april",
    cache_memory: Annotated[str | None, typer.Option(help="Memory of the cache, such as 2GiB.")] = None,
    disk_cache: Annotated[bool, typer.Option(help="Keep prompts on disk, to reuse them later.")] = True,
    legacy_names: Annotated[bool, typer.Option(help="Answer to deepseek-chat and deepseek-reasoner.")] = True,
) -> None:
    """Serve OpenAI Chat Completions over HTTP."""
    if not _loopback(host) and not api_key:
        raise InputError(f"{host} can be reached from elsewhere: give --api-key, or serve on 127.0.0.1")
    import uvicorn

    from abyssal.chat.local import LocalCompleter
    from abyssal.encoding.snapshots import SNAPSHOTS
    from abyssal.server.app import Server, Settings, keys

    known = next((s for s in SNAPSHOTS if s == snapshot), None)
    if known is None:
        raise InputError(f"unknown snapshot {snapshot!r}: choose from {', '.join(SNAPSHOTS)}")
    budget = parse_bytes(cache_memory) if cache_memory else None
    try:
        listening = socket.create_server((host, port), reuse_port=False)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port} ({error.strerror}): choose another port") from None
    tokenizer, engine = open_model(model, cache_bytes=budget, disk=disk_cache)
    completer = LocalCompleter(engine, tokenizer, model.rstrip("/").rsplit("/", 1)[-1], known)
    application = Server(completer, Settings(keys(api_key or ()), legacy_names=legacy_names)).app()
    config = uvicorn.Config(application, log_level="warning", lifespan="off", timeout_graceful_shutdown=GRACE_S)
    print(f"listening on http://{host}:{listening.getsockname()[1]}", flush=True)
    print(f"{model}: POST /v1/chat/completions; Ctrl-C ends", file=sys.stderr)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        completer.close()
