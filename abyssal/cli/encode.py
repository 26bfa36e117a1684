"""`abyssal encode` and `abyssal parse`: the prompt of a conversation, and the message of a completion."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from abyssal.base.errors import InputError
from abyssal.cli.models import read_text, snapshot_of


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}): mend it") from None


def encode(
    messages: Annotated[Path, typer.Argument(help="A JSON file: a list of messages, or {messages, tools}.")],
    tools: Annotated[Path | None, typer.Option(help="A JSON file with a list of tools.")] = None,
    snapshot: Annotated[str, typer.Option(help="april or 0731 (also for 0813).")] = "april",
    thinking: Annotated[bool, typer.Option("--thinking", help="Thinking mode.")] = False,
    effort: Annotated[str | None, typer.Option(help="low, high or max.")] = None,
    task: Annotated[str | None, typer.Option(help="A quick task for the last user message.")] = None,
) -> None:
    """Print the prompt of a conversation, byte for byte as the official encoder."""
    from abyssal.encoding.messages import Conversation
    from abyssal.encoding.render import prompt_text, render
    from abyssal.encoding.snapshots import EFFORTS

    known = snapshot_of(snapshot)
    level = next((e for e in EFFORTS if e == effort), None)
    if effort is not None and level is None:
        raise InputError(f"unknown effort {effort!r}: choose from {', '.join(EFFORTS)}")
    given: Any = _json(messages)
    beside: Any = _json(tools) if tools is not None else None
    if isinstance(given, dict):
        given, beside = given.get("messages"), beside or given.get("tools")
    if task is not None:
        last = given[-1] if isinstance(given, list) and given else None
        if not isinstance(last, dict) or last.get("role") != "user":
            raise InputError("--task needs a user message at the end")
        last["task"] = task
    conversation = Conversation.from_json(given, beside)
    text = prompt_text(render(conversation.messages, thinking=thinking, snapshot=known, effort=level))
    sys.stdout.buffer.write(text.encode())


def parse(
    completion: Annotated[Path, typer.Argument(help="A file with what a model wrote, special tokens spelled out.")],
    tools: Annotated[Path | None, typer.Option(help="A JSON file with the declared tools.")] = None,
    snapshot: Annotated[str, typer.Option(help="april or 0731; both are parsed alike.")] = "april",
    thinking: Annotated[bool, typer.Option("--thinking", help="The completion begins with reasoning.")] = False,
) -> None:
    """Print the assistant message of a completion as JSON; repairs go to stderr, a line each."""
    from abyssal.encoding.messages import function_of
    from abyssal.encoding.parse import parse as parse_completion

    snapshot_of(snapshot)
    declared = _json(tools) if tools is not None else None
    if declared is not None and not isinstance(declared, list):
        raise InputError(f"{tools} holds no list: give a list of tools")
    functions = [function_of(tool) for tool in declared] if declared is not None else None
    parsed = parse_completion(read_text(completion), thinking=thinking, tools=functions)
    print(json.dumps(parsed.message(), ensure_ascii=False))
    for repair in parsed.repairs:
        print(f"{repair.name}: {repair.detail}", file=sys.stderr)
