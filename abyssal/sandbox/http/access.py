"""Who may call: tokens of projects, and of single sandboxes (sandbox.md 5)."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from abyssal.sandbox.errors import SandboxError

LOCAL = "local"


class Unauthorised(SandboxError):  # noqa: N818
    """No token, or a wrong one."""


@dataclass(frozen=True)
class Project:
    """Who a token belongs to.

    Attributes:
        name: as the log has it.
        token: what it shows; kept as a digest.
        sandboxes: that it may have at once; None for no quota.
    """

    name: str
    token: str
    sandboxes: int | None = None


@dataclass(frozen=True)
class Caller:
    """Who calls: a project, and the one sandbox that its token is good for, or None for all of the project's."""

    actor: str
    sandbox: str | None = None
    sandboxes: int | None = None


class Access:
    """Checks tokens.

    Args:
        projects: who may call; none where only this machine's user can reach us.
        key: for tokens of sandboxes, which are not kept but computed.
    """

    def __init__(self, projects: Sequence[Project], key: bytes):
        self._projects = [(_digest(project.token), project) for project in projects]
        self._key = key

    @property
    def open(self) -> bool:
        """Whether anybody may call."""
        return not self._projects

    def sandbox_token(self, sandbox: str, actor: str) -> str:
        """A token that is good for one sandbox."""
        mac = hmac.new(self._key, f"{sandbox}\0{actor}".encode(), hashlib.sha256).hexdigest()
        return f"sb.{sandbox}.{actor}.{mac}"

    def caller(self, token: str | None) -> Caller:
        """Who shows this token.

        Raises:
            Unauthorised: nobody.
        """
        if token is not None and token.startswith("sb."):
            _, sandbox, actor, _ = (*token.split(".", 3), "", "", "")[:4]
            if hmac.compare_digest(self.sandbox_token(sandbox, actor).encode(), token.encode()):
                return Caller(actor, sandbox)
        elif token is not None:
            shown = _digest(token)
            found = None
            for digest, project in self._projects:  # all of them: how long it takes tells nothing
                if hmac.compare_digest(digest, shown):
                    found = project
            if found is not None:
                return Caller(found.name, None, found.sandboxes)
        if self.open:
            return Caller(LOCAL)
        raise Unauthorised("a token is needed: send it as `Authorization: Bearer TOKEN`")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
