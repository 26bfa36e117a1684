"""Commands of the substrate `function`: Python source, or a function by its name."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from abyssal.sandbox.api import Command, Spec
from abyssal.sandbox.errors import NotFound, Unsupported


def as_call(command: Command, spec: Spec) -> dict[str, Any]:
    """A command as what a worker reads.

    Raises:
        Unsupported: it is no call.
        NotFound: a module's name without a function.
    """
    argv = command.argv
    call: dict[str, Any] = {"env": dict(command.env), "cwd": command.cwd or spec.cwd}
    if command.tty or command.user not in (None, spec.user):
        raise Unsupported("functions have no terminal and no other users: choose substrate container")
    if len(argv) >= 3 and argv[0] in ("python", "python3", "/usr/bin/python3") and argv[1] == "-c":
        return {**call, "kind": "source", "source": argv[2], "arguments": argv[3:]}
    if len(argv) in (2, 3) and argv[0] == "call":
        module, sign, function = argv[1].partition(":")
        if not sign:
            raise NotFound(f"{argv[1]!r} names no function: write MODULE:FUNCTION")
        arguments = json.loads(argv[2]) if len(argv) == 3 else []
        return {**call, "kind": "function", "module": module, "function": function, "arguments": arguments}
    raise Unsupported(f"functions run Python, not {argv[0]!r}: use 'python3 -c SOURCE', or substrate container")


class NoFiles:
    """Every call of `Files` is refused: nothing would outlive a call."""

    def __getattr__(self, name: str) -> NoReturn:
        raise Unsupported("functions keep no files: choose substrate container")
