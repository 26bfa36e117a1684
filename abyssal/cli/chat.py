"""`abyssal chat`: a conversation in the terminal, thinking shown apart."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from abyssal.base.errors import InputError
from abyssal.cli.completers import open_local
from abyssal.cli.models import BUNDLED, snapshot_of

if TYPE_CHECKING:
    from abyssal.chat.api import ChatRequest, Completer
    from abyssal.encoding.messages import Message

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
EFFORTS = ("none", "low", "high", "max")


async def _say(completer: Completer, request: ChatRequest, colour: bool) -> Message:
    """Print an answer as it comes; returns what of it came, so that an interrupted one is kept too."""
    from abyssal.chat.api import Finished, ReasoningDelta, TextDelta
    from abyssal.chat.turn import answer
    from abyssal.encoding.messages import Message

    content: list[str] = []
    reasoning: list[str] = []
    try:
        async with aclosing(answer(completer, request)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, ReasoningDelta):
                    if not reasoning:
                        print(DIM if colour else "<think>", end="")
                    reasoning.append(event.text)
                    print(event.text, end="", flush=True)
                elif isinstance(event, TextDelta):
                    if reasoning and not content:
                        print(PLAIN if colour else "</think>")
                    content.append(event.text)
                    print(event.text, end="", flush=True)
                elif isinstance(event, Finished) and event.reason != "stop":
                    print(f"\n[{event.error or event.reason}]", end="", file=sys.stderr)
    except asyncio.CancelledError:  # Ctrl-C stops the answer, not the conversation
        pass
    print(PLAIN if colour else "", flush=True)
    return Message("assistant", "".join(content), reasoning="".join(reasoning))


def chat(
    model: Annotated[str, typer.Option(help="A release folder, or nano for the bundled model.")] = BUNDLED,
    snapshot: Annotated[str, typer.Option(help="Whose encoding the model knows: april or 0731.")] = "april",
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    effort: Annotated[str, typer.Option(help="How much to think: none, low, high or max.")] = "high",
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 1.0,
) -> None:
    """Talk to a model in the terminal.

    An empty line or Ctrl-D ends, Ctrl-C stops an answer, /new forgets what was said. The bundled model knows
    small talk and little else.
    """
    if effort not in EFFORTS:
        raise InputError(f"unknown effort {effort!r}: choose from {', '.join(EFFORTS)}")
    from abyssal.chat.api import ChatRequest, Sampling
    from abyssal.chat.turn import settled
    from abyssal.encoding.messages import Message

    completer = open_local(model, snapshot_of(snapshot))
    first = [Message("system", system)] if system else []
    request = ChatRequest(
        messages=(Message("user"),),
        thinking=effort != "none",
        effort=effort if effort != "none" else None,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        sampling=Sampling(temperature=temperature, top_p=top_p),
    )
    settled(request, completer)
    print(f"{model}: say something. Empty line or Ctrl-D ends, Ctrl-C stops an answer, /new begins anew.",
          file=sys.stderr)  # fmt: skip
    messages = list(first)
    try:
        while True:
            try:
                text = input("> ")
            except EOFError:
                print(file=sys.stderr)
                return
            if not text.strip():
                return
            if text.strip() == "/new":
                messages = list(first)
                continue
            messages.append(Message("user", text))
            said = asyncio.run(_run(completer, replace(request, messages=tuple(messages))))
            messages.append(said)
    finally:
        completer.close()


async def _run(completer: Completer, request: ChatRequest) -> Message:
    """An answer that Ctrl-C cuts short."""
    import signal

    task = asyncio.ensure_future(_say(completer, request, sys.stdout.isatty()))
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    return await task
