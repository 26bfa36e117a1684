"""What a container's next edge has to know to speak to its agent; a file in the container's own folder on the host."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from abyssal.base.files import write_json
from abyssal.sandbox.agent import Agent, Hello
from abyssal.sandbox.errors import AgentLost
from abyssal.sandbox.wire import TOKEN_HEAD, TOKEN_SIZE

FILE = "agent.json"
AGENT = "agent"  # the handle
NUMBERS, MOST = 1 << 24, 127  # operations of one edge, and edges until the first one's numbers come again


def new_token() -> bytes:
    """By which an agent knows the next host."""
    return TOKEN_HEAD + secrets.token_bytes(TOKEN_SIZE - len(TOKEN_HEAD))


@dataclass(frozen=True)
class Joining:
    """The file.

    Attributes:
        token: of the agent.
        env: as the agent was told.
        more: what the engine wants to know again.
        joins: how many edges have taken it over.
    """

    token: str
    env: Mapping[str, str]
    more: Mapping[str, Any] = field(default_factory=dict)
    joins: int = 0

    def write(self, folder: Path) -> None:
        """Keep it where the edge alone reads."""
        write_json(folder / FILE, asdict(self))
        (folder / FILE).chmod(0o600)

    @classmethod
    def read(cls, box_id: str, folder: Path) -> Joining:
        """What an earlier edge wrote.

        Raises:
            AgentLost: there is nothing of the kind.
        """
        try:
            return cls(**json.loads((folder / FILE).read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise AgentLost("unknown", f"sandbox {box_id} cannot be taken over: {error}") from None

    async def again(self, folder: Path, handles: Mapping[str, int], hello: Hello) -> Agent:
        """Speak to the agent; it answers as soon as it can.

        Raises:
            AgentLost: nobody held what leads to it.
        """
        if AGENT not in handles:
            raise AgentLost("killed", "its edge died, and nobody held it for the next one")
        replace(self, joins=self.joins + 1).write(folder)
        first = (self.joins + 1) % MOST * NUMBERS + 1
        return await Agent.rejoin(socket.socket(fileno=os.dup(handles[AGENT])), hello, first)
