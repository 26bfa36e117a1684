"""`abyssal sandbox`: run a command in a sandbox, serve sandboxes, read and replay their logs."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abyssal.base.errors import InputError
from abyssal.cli.sandbox_host import Engines, Home, Json, Unsafe, doctor, install

if TYPE_CHECKING:
    from abyssal.sandbox.hub import Sandboxes
    from abyssal.sandbox.sandbox import Sandbox

sandbox = typer.Typer(help="Sandboxes: run, serve, logs, replay.", no_args_is_help=True)
sandbox.command()(doctor)
sandbox.command()(install)
TOKEN = "ABYSSAL_SANDBOX_TOKEN"

Url = Annotated[str | None, typer.Option(help="A server instead of this host, as http://host:port.")]
Token = Annotated[str | None, typer.Option(help="Its token.", envvar=TOKEN)]


@sandbox.command()
def run(
    command: Annotated[list[str], typer.Argument(help="Program and arguments, behind --.")],
    substrate: Annotated[str, typer.Option(help="function, container, microvm or vm.")] = "container",
    image: Annotated[str, typer.Option(help="Image; host is this host's own root, read-only.")] = "host",
    engine: Annotated[str | None, typer.Option(help="Insist on this engine.")] = None,
    boundary: Annotated[str | None, typer.Option(help="Insist on a boundary at least as strong.")] = None,
    memory: Annotated[str, typer.Option(help="Memory, such as 512M.")] = "512M",
    cpu: Annotated[float, typer.Option(help="Cores.")] = 1.0,
    timeout: Annotated[float | None, typer.Option(help="Seconds for the command.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; may be repeated.")] = None,
    inside: Annotated[str | None, typer.Option("--in", help="Run in this sandbox, and leave it.")] = None,
    keep: Annotated[bool, typer.Option(help="Leave the sandbox; its id goes to stderr.")] = False,
    home: Home = None,
    url: Url = None,
    token: Token = None,
    allow_unsafe: Unsafe = False,
    json_out: Json = False,
) -> None:
    """Run a command in a new sandbox, with its output and exit code."""
    from abyssal.sandbox.api import STRENGTH, SUBSTRATES, Require

    if substrate not in SUBSTRATES:
        raise InputError(f"unknown substrate {substrate!r}: choose from {', '.join(SUBSTRATES)}")
    if boundary is not None and boundary not in STRENGTH:
        raise InputError(f"unknown boundary {boundary!r}: choose from {', '.join(STRENGTH)}")
    variables = dict(_pair(text) for text in env or [])
    require = Require(boundary=boundary)  # type: ignore[arg-type]
    options: dict[str, Any] = {
        "image": image, "engine": engine, "limits": {"memory": memory, "cpu": cpu}, "env": variables,
        "require": require,
    }  # fmt: skip

    async def work() -> int:
        async with await _hub(home, url, token, allow_unsafe) as hub:
            begin = time.perf_counter()
            box: Sandbox
            if inside is None:
                box = await hub.create(substrate, **options)
            else:
                box = await hub.attach(inside)
            ready = time.perf_counter()
            result = await box.run(command, timeout=timeout)
            end = time.perf_counter()
            if keep and inside is None:
                print(box.detach(), file=sys.stderr)
        if result.boundary == "process":
            print("abyssal: this was no sandbox: nothing was isolated", file=sys.stderr)
        if json_out:
            print(json.dumps({
                "substrate": substrate, "exit_code": result.exit_code,
                "stdout": result.stdout.decode(errors="replace"), "stderr": result.stderr.decode(errors="replace"),
                "start_ms": round((ready - begin) * 1000, 1), "wall_ms": round((end - ready) * 1000, 1),
                "timed_out": result.timed_out, "truncated": result.truncated,
                "engine": None if box.placed is None else box.placed.engine, "boundary": result.boundary,
                "degraded": [] if box.placed is None else list(box.placed.degraded),
            }))  # fmt: skip
            return result.exit_code
        sys.stdout.buffer.write(result.stdout)
        sys.stdout.flush()
        sys.stderr.buffer.write(result.stderr)
        sys.stderr.flush()
        if result.timed_out:
            print(f"abyssal: ended after {timeout:g} seconds", file=sys.stderr)
        return result.exit_code

    raise typer.Exit(asyncio.run(work()))


@sandbox.command()
def serve(
    host: Annotated[str, typer.Option(help="Address; anything but loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8100,
    socket_path: Annotated[Path | None, typer.Option("--socket", help="A unix socket instead.")] = None,
    project: Annotated[
        list[str] | None, typer.Option(help="NAME=TOKEN, or NAME=TOKEN=SANDBOXES with a quota; may be repeated.")
    ] = None,
    projects_file: Annotated[Path | None, typer.Option(help="A file with such lines; # begins a comment.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory for all sandboxes; default 3/4 of this machine's.")] = None,
    sandboxes: Annotated[int, typer.Option(help="Most sandboxes at once.", min=1)] = 512,
    per_job: Annotated[int | None, typer.Option(help="Most sandboxes of one job.", min=1)] = None,
    warm: Annotated[
        list[str] | None, typer.Option(help="SUBSTRATE:IMAGE:COUNT to have ready; may be repeated.")
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(
            help="Seconds for which sandboxes outlive a server that was killed; default 60, 0 for none.", min=0
        ),
    ] = None,
    open_network: Annotated[bool, typer.Option(help="Let sandboxes ask for the network mode open.")] = False,
    engine: Engines = None,
    home: Home = None,
    allow_unsafe: Unsafe = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve this host's sandboxes over HTTP."""
    import socket

    from abyssal.base import log
    from abyssal.base.machine import this_machine
    from abyssal.sandbox.admission import Capacity
    from abyssal.sandbox.edge import Edge
    from abyssal.sandbox.engines.registry import installed
    from abyssal.sandbox.http.daemon import GRACE_S, edge_home
    from abyssal.sandbox.http.run import serve as serve_edge
    from abyssal.sandbox.http.run import unix_socket
    from abyssal.sandbox.shapes import size

    projects = _projects(project or [], projects_file)
    if not _loopback(host) and not projects and socket_path is None:
        raise InputError(f"{host} can be reached from elsewhere: give --project NAME=TOKEN, or serve on 127.0.0.1")
    total = size(memory) if memory else this_machine().memory_total * 3 // 4
    kinds = [_warm(text) for text in warm or []]
    log.configure(log_level)
    waiting = (GRACE_S if grace is None else grace) or None

    async def work() -> None:
        room = Capacity(memory=total, sandboxes=sandboxes, per_job=per_job)
        folder = edge_home(home)
        engines = installed(folder / "engines", allow_unsafe=allow_unsafe, names=engine or ())
        edge = await Edge.open(folder, engines, capacity=room, warm=kinds, open_network=open_network, grace=waiting)
        try:
            if socket_path is not None:
                listening, where = unix_socket(socket_path), str(socket_path)
            else:
                listening = socket.create_server((host, port), reuse_port=False)
                where = f"http://{host}:{listening.getsockname()[1]}"
        except OSError as error:
            await edge.close()
            raise InputError(f"cannot listen on {socket_path or f'{host}:{port}'} ({error.strerror})") from None
        await serve_edge(edge, listening, projects=projects, ready=lambda: print(f"listening on {where}", flush=True))

    asyncio.run(work())


@sandbox.command()
def log(
    target: Annotated[str, typer.Argument(help="A sandbox's id, its log's folder, or the file.")],
    html: Annotated[Path | None, typer.Option(help="Write a static page instead.")] = None,
    records: Annotated[bool, typer.Option(help="All records, not one entry for each operation.")] = False,
    head: Annotated[str | None, typer.Option(help="Hash of the last record, as somebody else kept it.")] = None,
    home: Home = None,
    json_out: Json = False,
) -> None:
    """Show a log, with no service running; exit 1 if it is damaged or was changed."""
    from dataclasses import asdict

    from abyssal.base.files import write_bytes
    from abyssal.sandbox.http.daemon import edge_home
    from abyssal.sandbox.log.display import harmless
    from abyssal.sandbox.log.page import page, title
    from abyssal.sandbox.log.reader import operations, read_log

    path = Path(target)
    found = read_log(path if path.exists() else edge_home(home) / "boxes" / path.name / "log")
    if html is not None:
        write_bytes(html, page(found).encode())
    elif json_out:
        for entry in [asdict(record) for record in found.records] if records else operations(found.records):
            print(json.dumps(entry))
    elif records:
        for record in found.records:
            print(f"{record.seq:5d} {record.t} {record.kind:12s} {record.op_id or '':24s} {record.hash[:12]}")
    else:
        for entry in operations(found.records):
            res = entry["res"]
            ended = f"exit {res['exit_code']}" if "exit_code" in res else ""
            print(f"{entry['seq']:5d} {res['state']:9s} {ended:9s} {harmless(title(entry['req']))}")
            for name in ("stdout", "stderr"):
                if name in res and res[name]["bytes"]:
                    for line in harmless(found.blobs.fetch(res[name]).data).splitlines()[:20]:
                        print(f"      {'|' if name == 'stdout' else '!'} {line}")
    if found.fault is not None and found.fault.kind == "torn":
        print(f"abyssal: {found.fault.size} bytes at the end were never acknowledged ({found.fault.why})",
              file=sys.stderr)  # fmt: skip
    found.check(head)


@sandbox.command()
def replay(
    target: Annotated[str, typer.Argument(help="A sandbox's id.")],
    normalise: Annotated[list[str] | None, typer.Option(help="clocks or addresses; may be repeated.")] = None,
    branch: Annotated[
        int | None, typer.Option(help="Make a sandbox as it was before this record; prints its id.")
    ] = None,
    home: Home = None,
    url: Url = None,
    token: Token = None,
    allow_unsafe: Unsafe = False,
    json_out: Json = False,
) -> None:
    """Run a sandbox's operations again in a new one, and compare; exit 1 if one came out different."""
    from abyssal.sandbox import replay as replaying

    async def work() -> int:
        async with await _hub(home, url, token, allow_unsafe) as hub:
            if branch is not None:
                child = await replaying.branch(hub.service, target, branch)
                print(json.dumps({"sandbox": child}) if json_out else child)
                return 0
            found = await replaying.rerun(hub.service, target, normalisers=normalise or [])
            await hub.service.destroy(found.sandbox)
        if json_out:
            print(json.dumps(found.json()))
        else:
            for row in found.rows:
                print(f"{row.seq:5d} {row.verdict:15s} {row.op:16s} {row.why}")
        return 1 if found.count("different") else 0

    raise typer.Exit(asyncio.run(work()))


@sandbox.command()
def ls(
    label: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; may be repeated.")] = None,
    home: Home = None,
    url: Url = None,
    token: Token = None,
    json_out: Json = False,
) -> None:
    """List sandboxes."""
    labels = dict(_pair(text) for text in label or [])

    async def work() -> None:
        async with await _hub(home, url, token, False) as hub:
            found = await hub.list(**labels)
        if json_out:
            print(json.dumps({"sandboxes": list(found)}))
            return
        for info in found:
            words = " ".join(f"{name}={value}" for name, value in info["spec"]["labels"].items())
            print(f"{info['id']} {info['status']:8s} {info['spec']['substrate']:9s} {info['engine']:8s}"
                  f" until {info['deadline']} {words}")  # fmt: skip

    asyncio.run(work())


@sandbox.command()
def stop(
    targets: Annotated[list[str] | None, typer.Argument(help="Ids of sandboxes.")] = None,
    label: Annotated[str | None, typer.Option(help="NAME=VALUE: all that have it.")] = None,
    edge: Annotated[bool, typer.Option(help="This host's edge itself; sandboxes live on if they can.")] = False,
    home: Home = None,
    url: Url = None,
    token: Token = None,
) -> None:
    """End sandboxes; their logs stay."""
    if not targets and label is None and not edge:
        raise InputError("say what to stop: ids, --label NAME=VALUE, or --edge")

    async def work() -> None:
        if targets or label is not None:
            async with await _hub(home, url, token, False) as hub:
                for name in targets or []:
                    await (await hub.attach(name)).stop()
                if label is not None:
                    for name in await hub.stop(*_pair(label)):
                        print(name)
        if edge:
            from abyssal.sandbox.http.daemon import end

            if not await end(home):
                print("no edge runs on this host", file=sys.stderr)

    asyncio.run(work())


async def _hub(home: Path | None, url: str | None, token: str | None, unsafe: bool) -> Sandboxes:
    from abyssal.sandbox.http.client import HttpService
    from abyssal.sandbox.http.daemon import local
    from abyssal.sandbox.hub import Sandboxes

    if url is not None:
        return Sandboxes.connect(url, token=token)

    async def opener() -> HttpService:
        return await local(home, unsafe=unsafe)

    return Sandboxes(None, opener=opener)


def _pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise InputError(f"{text!r} is not NAME=VALUE")
    return name, value


def _projects(given: list[str], file: Path | None) -> list[Any]:
    from abyssal.cli.models import read_text
    from abyssal.sandbox.http.access import Project

    lines = read_text(file).splitlines() if file is not None else []
    found = []
    for line in [*given, *lines]:
        if not line.strip() or line.startswith("#"):
            continue
        parts = line.strip().split("=")
        if (
            len(parts) not in (2, 3)
            or not all(parts)
            or not parts[0].isidentifier()
            or (parts[2:] and not parts[2].isdigit())
        ):
            raise InputError("a project is NAME=TOKEN or NAME=TOKEN=SANDBOXES, its name letters, digits and _")
        found.append(Project(parts[0], parts[1], int(parts[2]) if parts[2:] else None))
    return found


def _warm(text: str) -> tuple[Any, int]:
    from abyssal.sandbox.api import SUBSTRATES, Spec

    parts = text.split(":")
    if len(parts) != 3 or parts[0] not in SUBSTRATES or not parts[2].isdigit():
        raise InputError(f"{text!r} is not SUBSTRATE:IMAGE:COUNT, as container:host:4")
    return Spec(parts[0], image=parts[1]), int(parts[2])


def _loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
