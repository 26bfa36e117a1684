"""What can go wrong with a sandbox (sandbox.md 4).

    SandboxError
    ├── Unsupported      this engine, or this host, cannot do it; nothing was weakened instead
    ├── Rejected         no room now; the same request may succeed later
    ├── QuotaExceeded    the job has used up what it may have
    ├── NotFound         no such sandbox, file, process or operation
    ├── Expired          its time to live has passed
    ├── ImageError       an image or layer that is missing, damaged or cannot be built
    ├── PathError        a path that cannot be read or written as asked
    ├── Timeout          the platform did not answer in time; a command's own timeout is a result
    ├── LimitHit         a limit of the sandbox ended the operation; says which
    ├── AgentLost        nobody answers inside any more; says why
    ├── OutcomeUnknown   the operation was begun, and how it ended was never learnt; it is not run again
    ├── Divergence       a client that came back asks for another operation than the log has at this place
    ├── BadRequest       a request whose fields are wrong
    ├── SandboxLost      it ended with its host or its edge and cannot be brought back by itself
    ├── LogError         the trajectory log cannot be written, is damaged, or was changed
    └── PolicyDenied     the network policy, or the user's rights, forbid it

`LimitHit` and `AgentLost` are facts about the sandbox: a trainer masks such a sample. They are never exit code 1.
"""

from __future__ import annotations

import copyreg
from typing import Any, Literal

from abyssal.base.errors import RunError

Cause = Literal["oom", "killed", "guest-panic", "unknown"]
Limit = Literal["memory", "pids", "cpu", "disk", "output"]


class SandboxError(RunError):
    """Base of all errors of sandboxes; they go from process to process whole."""

    def __reduce__(self) -> tuple[Any, ...]:
        # by default the class would be called with its message alone
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class Unsupported(SandboxError):  # noqa: N818
    """This engine, or this host, cannot do it."""


class Rejected(SandboxError):  # noqa: N818
    """No room now."""


class QuotaExceeded(SandboxError):  # noqa: N818
    """The job has used up what it may have."""


class NotFound(SandboxError):  # noqa: N818
    """No such sandbox, file, process or operation."""


class Expired(SandboxError):  # noqa: N818
    """The sandbox's time to live has passed."""


class ImageError(SandboxError):
    """An image or layer that is missing, damaged or cannot be built."""


class PathError(SandboxError):
    """A path that cannot be read or written as asked."""


class Timeout(SandboxError):  # noqa: N818
    """The platform did not answer in time."""


class LimitHit(SandboxError):  # noqa: N818
    """A limit of the sandbox ended the operation.

    Attributes:
        which: the limit.
    """

    def __init__(self, which: Limit, message: str):
        super().__init__(message)
        self.which: Limit = which


class AgentLost(SandboxError):  # noqa: N818
    """Nobody answers inside the sandbox any more.

    Attributes:
        cause: what is known of the reason.
    """

    def __init__(self, cause: Cause, message: str):
        super().__init__(message)
        self.cause: Cause = cause


class OutcomeUnknown(SandboxError):  # noqa: N818
    """An operation was begun, and how it ended was never learnt.

    Attributes:
        op_id: the operation.
    """

    def __init__(self, op_id: str, message: str):
        super().__init__(message)
        self.op_id = op_id


class Divergence(SandboxError):  # noqa: N818
    """A client that came back asks for another operation than the log has at this place.

    Attributes:
        seq: of the log's record.
        expected, got: digests of the two requests.
    """

    def __init__(self, seq: int, expected: str, got: str, message: str):
        super().__init__(message)
        self.seq, self.expected, self.got = seq, expected, got


class BadRequest(SandboxError):  # noqa: N818
    """A request whose fields are wrong."""


class SandboxLost(SandboxError):  # noqa: N818
    """The sandbox ended with its host or its edge and cannot be brought back by itself."""


class LogError(SandboxError):
    """The trajectory log cannot be written, is damaged, or was changed."""


class PolicyDenied(SandboxError):  # noqa: N818
    """The network policy, or the user's rights, forbid it."""
