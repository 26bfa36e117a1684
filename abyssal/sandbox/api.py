"""The contract between callers and sandboxes: plain data, and what an engine has to do (sandbox.md 2 to 4).

A caller asks for a substrate; an engine runs it. `Engine.create` gives a `Box`, a live sandbox on this host, and a
`Box` starts commands, moves files and, where its engine can, pauses, snapshots and forks. Everything above (`hub`,
HTTP, the log, pools) speaks to this contract alone, and `conformance` holds every engine to it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

Substrate = Literal["function", "container", "microvm", "vm"]
SUBSTRATES: tuple[Substrate, ...] = ("function", "container", "microvm", "vm")
Boundary = Literal["process", "shared-kernel", "wasm", "user-kernel", "vm-emulated", "vm-hardware"]
# weakest first; the two pairs of equals are as strong as each other
STRENGTH: Mapping[Boundary, int] = {
    "process": 0,
    "shared-kernel": 1,
    "wasm": 2,
    "user-kernel": 2,
    "vm-emulated": 3,
    "vm-hardware": 3,
}
Accel = Literal["none", "kvm", "tcg"]
Feature = Literal[
    "files", "stdin", "tty", "background", "pause", "snapshot", "memory-snapshot", "fork", "network", "ports"
]
MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a sandbox may use.

    Attributes:
        cpu: cores; the number that programs inside see is this one, rounded up.
        memory: bytes, of all its processes and what they keep in memory file systems.
        pids: processes and threads.
        disk: bytes that it may write.
        output: bytes of each stream of an operation that are kept; the rest is counted.
        outputs: the same of all operations of the sandbox together.
    """

    cpu: float = 1.0
    memory: int = 512 * MIB
    pids: int = 128
    disk: int = 2048 * MIB
    output: int = MIB
    outputs: int = 64 * MIB


@dataclass(frozen=True)
class Allowed:
    """Somewhere that a sandbox may connect to: a domain, "*." and a domain, an address or a network; port 0 is any."""

    host: str
    port: int = 443
    protocol: Literal["tcp", "udp"] = "tcp"


@dataclass(frozen=True)
class Network:
    """Whom a sandbox may reach: nobody, those on a list, or anybody (the host has to permit that)."""

    mode: Literal["none", "allow", "open"] = "none"
    allow: tuple[Allowed, ...] = ()


@dataclass(frozen=True)
class Require:
    """What a caller insists on; what cannot be met is refused and never weakened.

    Attributes:
        boundary: at least as strong as this one.
        accel: this acceleration; None for any.
        hard: whether limits must be enforced by the kernel and not by a watchdog.
    """

    boundary: Boundary | None = None
    accel: Accel | None = None
    hard: bool = False


@dataclass(frozen=True)
class Spec:
    """A sandbox that is asked for.

    Attributes:
        substrate: what kind.
        image: name of an image on this host; "host" is the host's own root, read-only.
        limits, network, require: see there.
        env: environment of every command.
        cwd: folder in which commands begin.
        user: "root" or "user", as seen inside; root inside is nobody outside.
        labels: of the caller, such as job and episode.
        ttl: seconds after which it is destroyed.
        idle_ttl: the same, without a running operation; None for never.
    """

    substrate: Substrate
    image: str = "host"
    limits: Limits = field(default_factory=Limits)
    network: Network = field(default_factory=Network)
    require: Require = field(default_factory=Require)
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/work"
    user: str = "user"
    labels: Mapping[str, str] = field(default_factory=dict)
    ttl: float = 900.0
    idle_ttl: float | None = None


@dataclass(frozen=True)
class Placed:
    """What a caller really got.

    Attributes:
        engine: that runs it.
        boundary, accel: of this engine on this host.
        degraded: guarantees that are missing, in words; empty where all hold.
    """

    engine: str
    boundary: Boundary
    accel: Accel = "none"
    degraded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A program to run inside.

    Attributes:
        argv: program and arguments; it is found along PATH inside.
        cwd, user: as in `Spec`, None for the sandbox's.
        env: on top of the sandbox's.
        stdin: whether `Process.write` will be used; without it, the program reads nothing.
        timeout: seconds after which all its processes are killed, also those that left its session.
        tty: rows and columns of a terminal; everything then arrives as stdout.
        keep: what it leaves running goes on after its end; otherwise that is killed.
        name: by which a later edge finds it, where sandboxes outlive edges; empty where nobody will look for it.
    """

    argv: tuple[str, ...]
    cwd: str | None = None
    user: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: bool = False
    timeout: float | None = None
    tty: tuple[int, int] | None = None
    keep: bool = False
    name: str = ""


def shell(text: str) -> tuple[str, ...]:
    """The argv that gives a text to the shell inside."""
    return ("/bin/sh", "-c", text)


@dataclass(frozen=True)
class Stdout:
    """Bytes that a program wrote, and how many came before them."""

    data: bytes
    offset: int


@dataclass(frozen=True)
class Stderr:
    """The same of its errors."""

    data: bytes
    offset: int


@dataclass(frozen=True)
class Usage:
    """What an operation used: milliseconds of processor, bytes of memory at its peak; None where nobody counts."""

    cpu_ms: int | None = None
    peak_memory: int | None = None


@dataclass(frozen=True)
class Exit:
    """How a program ended; the last event.

    Attributes:
        code: its exit code; 128 and the signal's number where a signal ended it.
        signal: that ended it, or None.
        timed_out: whether that was the command's timeout.
        limit: the limit that ended it, or None: "memory" where the kernel killed it for want of memory.
        duration_ms: from start to end, inside.
        usage: see there.
    """

    code: int
    signal: int | None = None
    timed_out: bool = False
    limit: str | None = None
    duration_ms: int = 0
    usage: Usage = field(default_factory=Usage)


ProcessEvent = Stdout | Stderr | Exit


class Process(Protocol):
    """A program that runs inside. Its output waits until it is read: a slow reader slows the program down."""

    pid: int

    def events(self) -> AsyncIterator[ProcessEvent]:
        """Output as it comes, `Exit` last.

        Raises:
            AgentLost: the sandbox ended first.
        """

    async def write(self, data: bytes) -> None:
        """Feed its standard input, or type into its terminal."""

    async def close_stdin(self) -> None:
        """Nothing more comes."""

    async def signal(self, number: int) -> None:
        """Send a signal to its process group; 9 to all that it started."""

    async def resize(self, rows: int, columns: int) -> None:
        """Another size of its terminal."""


@dataclass(frozen=True)
class Stat:
    """A file inside: its path, kind, bytes, permission bits, time of change in seconds, and target if it is a link."""

    path: str
    kind: Literal["file", "folder", "link", "other"]
    size: int
    mode: int
    mtime: float
    target: str = ""


class Files(Protocol):
    """Files inside. Paths are absolute there, or relative to the sandbox's folder; links are followed inside only.

    Every method raises `NotFound` for what is not there, `PathError` for what is of another kind, too long or not
    permitted, `LimitHit("disk")` when the disk is full, and `AgentLost`.
    """

    async def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes: ...

    async def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """The whole file, aside and then renamed; missing folders are made."""

    async def stat(self, path: str) -> Stat:
        """Of the path itself, not of what a link leads to."""

    async def list(self, path: str) -> Sequence[Stat]:
        """What a folder holds, sorted by name."""

    async def make_folder(self, path: str) -> None: ...

    async def move(self, path: str, to: str) -> None: ...

    async def remove(self, path: str) -> None:
        """A file, or a folder and all in it."""

    async def upload(self, path: str, tar: AsyncIterator[bytes]) -> None:
        """Unpack a tar stream into a folder; members that would leave it are refused with `PathError`."""

    def download(self, path: str) -> AsyncIterator[bytes]:
        """A folder as a tar stream, names sorted."""


class Duplex(Protocol):
    """Bytes both ways."""

    async def read(self) -> bytes:
        """Some bytes; nothing at the end of what the other side sends.

        Raises:
            ConnectionError: the connection broke.
        """

    async def write(self, data: bytes) -> None:
        """Send; waits while the other side is behind.

        Raises:
            ConnectionError: the connection broke.
        """

    async def finish(self) -> None:
        """Nothing more will be sent; the other side still may."""

    async def close(self) -> None:
        """End it, whatever is under way; a second time does nothing."""


Resolver = Callable[[str, int], Awaitable[Sequence[str]]]  # addresses of a name


@dataclass(frozen=True)
class Denied:
    """A connection that was refused: where to, and why. `address` is empty where no name was resolved."""

    host: str
    port: int
    address: str
    reason: str


class Box(Protocol):
    """A live sandbox on this host.

    Attributes:
        id: given by the caller of `Engine.create`.
        placed: what it is.
        features: what it can do besides running commands.
        files: its files.
    """

    id: str
    placed: Placed
    features: frozenset[Feature]
    files: Files

    async def start(self, command: Command) -> Process:
        """Run a program.

        Raises:
            NotFound: no such program, or no such folder to run it in.
            LimitHit: no process can be started any more.
            AgentLost: the sandbox is gone.
        """

    async def pause(self) -> None:
        """Stop all processes where they are.

        Raises:
            Unsupported: the engine cannot.
        """

    async def resume(self) -> None:
        """Let them go on."""

    async def snapshot(self, folder: Path, *, memory: bool = False) -> Mapping[str, str]:
        """Keep its disk, and its memory if asked for, as files in a folder.

        Returns:
            digests by name: "layer" is an image layer with what was changed (`image`), "memory" the engine's own.
        Raises:
            Unsupported: the engine cannot.
        """

    async def fork(self, ids: Sequence[str]) -> Sequence[Box]:
        """Copies of it that go on from here; random numbers, host name and machine id differ.

        Each child's own folder is the one next to this sandbox's that is named by its id.

        Raises:
            Unsupported: the engine cannot.
        """

    async def set_network(self, network: Network) -> None:
        """Another policy; connections that it forbids end.

        Raises:
            Unsupported: the engine cannot.
        """

    async def usage(self) -> Usage:
        """What it has used so far."""

    async def stop(self) -> None:
        """End it and remove all that it had on this host; a second time does nothing."""


@runtime_checkable
class Networked(Protocol):
    """A box that programs can reach others from, and be reached in; its features are "network" and "ports"."""

    async def dial(self, port: int) -> Duplex:
        """A connection to a port inside, on its loopback.

        Raises:
            NotFound: nobody listens there.
            Timeout: it does not answer.
            AgentLost: the sandbox is gone.
        """

    def resolve_with(self, resolve: Resolver) -> None:
        """Have names resolved in another way than this host's."""

    def tell_denied(self, told: Callable[[Denied], None]) -> None:
        """Have somebody told of each connection that the policy refuses."""


@dataclass(frozen=True)
class Probe:
    """What a trial start of an engine found.

    Attributes:
        ok: whether a guest or process answered.
        placed: what sandboxes of this engine would be; None unless `ok`.
        detail: how long it took, or why it does not work.
        remedy: what to install or change, as a command where there is one.
    """

    ok: bool
    placed: Placed | None
    detail: str
    remedy: str = ""


class Engine(Protocol):
    """One way to run sandboxes.

    Attributes:
        name: as callers see it.
        substrates: that it serves.
        features: of its boxes.
    """

    name: str
    substrates: tuple[Substrate, ...]
    features: frozenset[Feature]

    async def probe(self) -> Probe:
        """Start something real and wait for its answer; never raises."""

    async def create(self, box_id: str, spec: Spec, folder: Path) -> Box:
        """Start a sandbox.

        Args:
            box_id: unique on this host; names groups, mounts and sockets, so that a sweep finds leftovers.
            spec: what is asked for; the substrate is one of this engine's.
            folder: an empty one that is the sandbox's own on the host, out of its reach; its name is `box_id`.
        Raises:
            Unsupported: something in `spec` cannot be met.
            ImageError: the image is missing or damaged.
            Timeout: nobody answered inside.
        """

    async def sweep(self, alive: frozenset[str]) -> Sequence[str]:
        """Remove what sandboxes that are not alive left behind after a crash; returns their ids."""


@runtime_checkable
class Restores(Protocol):
    """An engine that starts sandboxes from what `Box.snapshot` kept."""

    async def restore(self, box_id: str, spec: Spec, folder: Path, snapshot: Path) -> Box:
        """Start a sandbox from what `Box.snapshot` kept in a folder; random numbers, host name and machine id differ.

        Raises:
            Unsupported: the snapshot is another engine's.
            ImageError: the snapshot is missing or damaged.
        """
