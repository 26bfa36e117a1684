"""`abyssal chat`: type the beginning of a text, read how the model goes on."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from abyssal.cli.models import BUNDLED, open_model


def chat(
    model: Annotated[str, typer.Option(help="A release folder, or nano for the bundled model.")] = BUNDLED,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 120,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 0.9,
) -> None:
    """Talk to a model in the terminal.

    The bundled model is a base model: it continues what you type and follows no instructions.
    """
    from abyssal.encoding.literals import BOS, EOS
    from abyssal.encoding.tokenizer import Piece
    from abyssal.engine.request import Request
    from abyssal.engine.sampler import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p)
    tokenizer, engine = open_model(model)
    end = tokenizer.special(EOS)
    print(f"{model}: begin a text, the model continues it. Empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            text = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        if not text.strip():
            return
        prompt = tokenizer.encode_pieces([Piece(BOS, special=True), Piece(text)])
        request = Request(prompt=tuple(prompt), max_tokens=max_tokens, sampling=sampling, stop=(end,))
        _, events = engine.stream(request)
        decoder = tokenizer.stream()
        print(text, end="", flush=True)
        try:
            for event in events:
                if event.token is not None:
                    print(decoder.add(event.token), end="", flush=True)
            print(decoder.finish(), end="")
        except KeyboardInterrupt:  # stops the answer, not the conversation
            pass
        print("\n")
