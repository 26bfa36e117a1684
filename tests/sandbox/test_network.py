"""Networks of sandboxes: the policy as data, connections over the agent's wire, ports through SDK, HTTP and its mirror.

What engines have to hold is in `conformance.reaching`; here is what no engine is needed for, and what stands above.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path

import pytest

from abyssal.sandbox import sync, wire
from abyssal.sandbox.agent import Agent
from abyssal.sandbox.agent_process import start
from abyssal.sandbox.api import Allowed, Command, Denied, Duplex, Network, Placed, Spec
from abyssal.sandbox.conformance.bench import collect, python
from abyssal.sandbox.edge import Edge
from abyssal.sandbox.engines.bwrap import BwrapEngine
from abyssal.sandbox.engines.placing import check
from abyssal.sandbox.engines.process import ProcessEngine
from abyssal.sandbox.errors import BadRequest, NotFound, PolicyDenied, Unsupported
from abyssal.sandbox.guest import build
from abyssal.sandbox.http import daemon
from abyssal.sandbox.http.client import HttpService
from abyssal.sandbox.http.server import SandboxServer
from abyssal.sandbox.hub import Sandboxes
from abyssal.sandbox.network import policy
from abyssal.sandbox.network.egress import Egress
from abyssal.sandbox.network.policy import check_policy, not_public, refused_address, refused_target, tidy
from abyssal.sandbox.network.proxy import Proxy
from abyssal.sandbox.network.sockets import SocketDuplex
from abyssal.sandbox.network.streams import connect
from abyssal.sandbox.wire import Kind
from tests.sandbox.test_agent import guest

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bwrap: apt-get install bubblewrap")
needs_agent = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("cc") is None, reason=f"name spaces of its own: needs root and {build.REMEDY}"
)
SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"inside")
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler)
print("listening", flush=True)
server.serve_forever()
"""


def allowing(*entries: tuple[str, int]) -> Network:
    return Network("allow", tuple(Allowed(host, port) for host, port in entries))


@pytest.mark.parametrize(
    ("host", "port", "allowed"),
    [
        ("example.org", 443, True), ("EXAMPLE.org.", 443, True), ("example.org", 80, False),
        ("www.example.org", 443, False), ("example.org.evil.net", 443, False), ("evilexample.org", 443, False),
        ("a.wild.example", 443, True), ("a.b.wild.example", 443, True), ("wild.example", 443, False),
        ("awild.example", 443, False), ("any.example", 1, True), ("10.1.2.3", 22, True), ("10.2.0.0", 22, False),
        ("[fd00::7]", 22, True), ("::ffff:10.1.2.3", 22, True), ("167838211", 22, False), ("", 443, False),
        ("example.org\0.evil", 443, False), ("exa mple.org", 443, False),
    ],
)  # fmt: skip
def test_who_may_be_asked_for(host: str, port: int, allowed: bool) -> None:
    network = allowing(
        ("Example.ORG", 443), ("*.wild.example", 443), ("any.example", 0), ("10.1.0.0/16", 22), ("fd00::/8", 22)
    )
    assert (refused_target(network, tidy(host), port) == "") is allowed


def test_a_named_address_is_judged_with_its_port() -> None:
    network = allowing(("db.example", 5432), ("10.0.0.5", 5432))
    assert refused_address(network, "10.0.0.5", 5432) == ""
    assert "private" in refused_address(network, "10.0.0.5", 22)
    assert "private" in refused_address(network, "10.0.0.6", 5432)
    assert "private" in refused_address(Network("open"), "10.0.0.5", 5432)
    assert refused_target(Network(), "db.example", 5432)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert not_public(ip_address(address)) == ""


@pytest.mark.parametrize(
    "address",
    ["192.0.0.192", "100.100.100.200", "224.0.0.251", "255.255.255.255", "64:ff9b::a00:1", "64:ff9b:1::1",
     "2002:a00:1::", "2001:0:4136:e378::", "::7f00:1", "fec0::1", "ff0e::1", "168.63.129.16", "fd00:ec2::254"],
)  # fmt: skip
def test_addresses_that_are_not(address: str) -> None:
    assert not_public(ip_address(address))


def test_addresses_of_this_host_are_known_whatever_their_numbers() -> None:
    assert policy._of_this_host(ip_address("127.0.0.1"))
    assert not policy._of_this_host(ip_address("8.8.8.8"))


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        (Allowed("example.org", 53, "udp"), Unsupported), (Allowed("*"), BadRequest), (Allowed("a..b"), BadRequest),
        (Allowed("http://example.org"), BadRequest), (Allowed("example.org", 70000), BadRequest),
        (Allowed("*.10.0.0.1"), BadRequest), (Allowed("10.0.0.0/33"), BadRequest), (Allowed(""), BadRequest),
    ],
)  # fmt: skip
def test_policies_that_cannot_be_enforced(entry: Allowed, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_policy(Network("allow", (entry,)))


def test_an_engine_without_a_network_says_so() -> None:
    with pytest.raises(Unsupported, match="engine pool has no network"):
        check("pool", ("function",), frozenset({"stdin"}), Placed("pool", "shared-kernel"),
              Spec("function", network=Network("open")))  # fmt: skip


# the proxy by itself, over sockets


async def spoken(said: bytes, answer: bytes = b"") -> tuple[bytes, bytes]:
    """What the proxy answers to these bytes, and what a server behind it, at PORT, was sent."""
    sent = bytearray()

    async def behind(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not sent.endswith((b"over", b"0\r\n\r\n")):
            if not (data := await reader.read(4096)):
                break
            sent.extend(data)
        writer.write(answer)
        writer.close()

    async def nobody(host: str, port: int) -> Sequence[str]:
        raise AssertionError("nothing is resolved here")

    async def denied(_: Denied) -> None:
        return None

    server = await asyncio.start_server(behind, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def proxied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        side = SocketDuplex(reader, writer)
        try:
            await Proxy(side, allowing(("127.0.0.1", port)), nobody, denied).run()
        finally:
            writer.close()

    proxy = await asyncio.start_server(proxied, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*proxy.sockets[0].getsockname())
    writer.write(said.replace(b"PORT", str(port).encode()))
    async with server, proxy, asyncio.timeout(20):
        came = await reader.read()
    writer.close()
    return came, bytes(sent)


def test_a_tunnel_with_bytes_that_came_early() -> None:
    for head in (b"CONNECT 127.0.0.1:PORT HTTP/1.1\r\nHost: x\r\n\r\n", b"CONNECT 127.0.0.1:PORT HTTP/1.0\r\n\r\n"):
        came, sent = asyncio.run(spoken(head + b"early, over", b"answer"))
        assert sent == b"early, over"
        assert came.startswith(b"HTTP/1.1 200 ") and came.endswith(b"\r\n\r\nanswer")


def test_bodies_in_both_codings() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    head = b"PUT http://127.0.0.1:PORT/a?b#c HTTP/1.1\r\nHost: evil\r\nProxy-Connection: x\r\nX-Own: 1\r\n"
    came, sent = asyncio.run(spoken(head + b"Content-Length: 5\r\n\r\n1over", answer))
    assert came == answer and sent.startswith(b"PUT /a?b HTTP/1.1\r\n") and sent.endswith(b"\r\n\r\n1over")
    assert b"X-Own: 1" in sent and b"evil" not in sent and b"Proxy" not in sent
    chunks = b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\nover\r\n0\r\n\r\nGET http://x/ HTTP/1.1\r\n\r\n"
    came, sent = asyncio.run(spoken(head + chunks, answer))
    assert b"chunked" in sent and b"abc" in sent and b"GET" not in sent


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"\x16\x03\x01\x00\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET https://127.0.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n", 400), (b"CONNECT 127.0.0.1 HTTP/1.0\r\n\r\n", 400),
        (b"CONNECT :443 HTTP/1.0\r\n\r\n", 400), (b"CONNECT 127.0.0.1:99999 HTTP/1.0\r\n\r\n", 400),
        (b"GET http://user@127.0.0.1:PORT/ HTTP/1.0\r\n\r\n", 400), (b"CONNECT 127.0.0.1:1 HTTP/1.0\r\n\r\n", 403),
        (b"GET http://127.0.0.1:PORT@example.org/ HTTP/1.0\r\n\r\n", 400),
        (b"GET http://example.org:PORT/ HTTP/1.0\r\n\r\n", 403), (b"GET http://[::1/ HTTP/1.0\r\n\r\n", 400),
        (b"GET http://x/ HTTP/1.1\r\n" + b"A: " + b"a" * 400000 + b"\r\n\r\n", 431),
        (b"POST http://127.0.0.1:PORT/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    ],
)  # fmt: skip
def test_what_is_no_request_is_answered(said: bytes, status: int) -> None:
    came, sent = asyncio.run(spoken(said))
    assert came.startswith(b"HTTP/1.1 %d " % status) and sent == b"", came


# over the wire, with the agent alone


def inside(folder: Path, work: Callable[[Agent], Awaitable[None]]) -> None:
    program = build.agent(folder / "programs")

    async def whole() -> None:
        async with guest(program, folder) as (agent, _, _), asyncio.timeout(60):
            await work(agent)

    asyncio.run(whole())


async def serving(agent: Agent, source: str) -> None:
    """A program of the guest that says when it listens on port 8123 of, here, the host's own loopback."""
    process = await start(agent, Command(python(source), keep=True))
    await anext(process.events())


SINK = """
import socket, time
server = socket.create_server(("127.0.0.1", 8123))
print("listening", flush=True)
c, _ = server.accept()
c.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
time.sleep(600)
"""
FLOOD = """
import socket
server = socket.create_server(("127.0.0.1", 8123))
print("listening", flush=True)
while True:
    c, _ = server.accept()
    try:
        while True:
            c.sendall(bytes(65536))
    except OSError:
        pass
"""


@needs_agent
def test_who_does_not_read_slows_the_other_down(tmp_path: Path) -> None:
    async def work(agent: Agent) -> None:
        await serving(agent, SINK)
        stream = await connect(agent, 8123)
        sent = 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                while True:
                    await stream.write(bytes(32768))
                    sent += 32768
        # what the kernel's buffers of one connection take, and one window in the agent
        assert sent < 16 << 20
        await stream.close()

    inside(tmp_path, work)


@needs_agent
def test_the_host_holds_one_window_of_what_it_does_not_read(tmp_path: Path) -> None:
    async def work(agent: Agent) -> None:
        await serving(agent, FLOOD)
        stream = await connect(agent, 8123)
        await asyncio.sleep(1)
        assert len(stream._came) == wire.STREAM_WINDOW
        for _ in range(100):
            assert await stream.read()
        await stream.close()
        with pytest.raises(ConnectionError):
            await stream.read()
        again = await connect(agent, 8123)  # the agent lives, and so does the program
        assert await again.read()
        await again.close()

    inside(tmp_path, work)


@needs_agent
def test_descriptors_of_connections_do_not_run_out(tmp_path: Path) -> None:
    async def work(agent: Agent) -> None:
        await serving(agent, FLOOD)

        async def count() -> str:
            return (await collect(await start(agent, Command(("sh", "-c", "ls /proc/1/fd | wc -l"))))).stdout

        before = await count()
        for _ in range(300):
            stream = await connect(agent, 8123)
            await stream.read()
            await stream.close()
        with pytest.raises(NotFound):
            await connect(agent, 1)
        assert await count() == before

    inside(tmp_path, work)


@needs_agent
def test_a_guest_that_sends_more_than_it_may_is_not_believed(tmp_path: Path) -> None:
    async def work(agent: Agent) -> None:
        await serving(agent, SINK)
        stream = await connect(agent, 8123)
        frames = agent._ops[stream._op]
        frames.put_nowait(wire.Frame(Kind.RECEIVED, stream._op, bytes(wire.STREAM_WINDOW + 1)))
        frames.put_nowait(wire.Frame(Kind.TAKEN, stream._op, b"bytes=x\0"))
        with pytest.raises(ConnectionError, match="more than it was granted"):
            await stream.read()
        await stream.close()

    inside(tmp_path, work)


@needs_agent
def test_another_incarnation_has_none_of_the_connections(tmp_path: Path) -> None:
    async def work(agent: Agent) -> None:
        from dataclasses import replace

        await serving(agent, FLOOD)
        stream = await connect(agent, 8123)
        await agent.hello(agent.greeting, 5)  # as after a pause
        for _ in range(10):
            assert await stream.read()
        await agent.hello(replace(agent.greeting, seed=bytes(32)), 5)  # as after a fork
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                while await stream.read():
                    pass
        await stream.close()

    inside(tmp_path, work)


@needs_agent
def test_random_frames_of_connections_do_not_end_the_agent(tmp_path: Path) -> None:
    async def work(agent: Agent) -> None:
        import random

        draw = random.Random(5)
        kinds = [Kind.LISTEN, Kind.CONNECT, Kind.SEND, Kind.FINISH, Kind.GRANT, Kind.DROP]
        for _ in range(1000):
            data = draw.choice([b"port=8123\0", b"port=0\0", b"bytes=99999999999\0", b"bytes=-5\0", draw.randbytes(90)])
            await agent.send(draw.choice(kinds), draw.choice([1 << 20, 1 << 21, 1 << 31, (1 << 31) + 1]), data)
        assert (await collect(await start(agent, Command(("echo", "here"))))).stdout == "here\n"

    inside(tmp_path, work)


@needs_agent
def test_a_taken_port_is_passed_by(tmp_path: Path) -> None:
    async def work(agent: Agent) -> None:
        server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 3128)
        async with server:
            egress = Egress(agent, {})
            await egress.set(Network("open"))
            assert egress.environment({})["HTTP_PROXY"] != "http://127.0.0.1:3128"
            await egress.close()

    inside(tmp_path, work)


# above engines


@needs_bwrap
def test_policies_and_ports_through_an_edge(tmp_path: Path) -> None:
    async def whole() -> None:
        edge = await Edge.open(tmp_path, [BwrapEngine(tmp_path)])
        try:
            async with Sandboxes(edge) as hub:
                with pytest.raises(PolicyDenied):
                    await hub.create("container", network=Network("open"))
                with pytest.raises(BadRequest):
                    await hub.create("container", network=allowing(("*", 443)))
                sb = await hub.create("container", network=allowing(("listed.example", 443)))
                done = await sb.run(
                    'curl -sS -o /dev/null -w "%{http_connect}" https://other.example || true', timeout=60
                )
                assert done.stdout == b"403", done
                with pytest.raises(PolicyDenied):
                    await sb.set_network(Network("open"))
                kinds = [(record["kind"], record["res"]) async for record in sb.log()]
                (denied,) = [res for kind, res in kinds if kind == "net.denied"]
                assert denied["host"] == "other.example" and "list" in denied["reason"]
                forward = await sb.port(8000)
                assert forward.host == "127.0.0.1"
                await asyncio.to_thread(_fails, f"http://{forward.address}/")  # nobody listens yet
                running = await sb.start(["/usr/bin/python3", "-c", SERVER])
                await anext(running.events())
                assert await asyncio.to_thread(_get, f"http://{forward.address}/") == b"inside"
                await sb.stop()
                await asyncio.to_thread(_fails, f"http://{forward.address}/")
        finally:
            await edge.close()

    asyncio.run(whole())


def _get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with closing(opener.open(url, timeout=20)) as answer:
        return bytes(answer.read())


def _fails(url: str) -> None:
    with pytest.raises(OSError):
        _get(url)


@needs_bwrap
def test_ports_over_http(tmp_path: Path) -> None:
    """As between two machines: an address, a token, one WebSocket for each connection."""
    import uvicorn

    from abyssal.sandbox.http.access import Project

    async def whole() -> None:
        edge = await Edge.open(tmp_path, [BwrapEngine(tmp_path)])
        app = SandboxServer(edge, [Project("one", "secret-one"), Project("two", "secret-two")]).app()
        config = uvicorn.Config(app, port=0, log_config=None, lifespan="off", ws="websockets-sansio")
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        try:
            async with Sandboxes.connect(url, token="secret-one") as hub:
                sb = await hub.create("container")
                running = await sb.start(["/usr/bin/python3", "-c", SERVER])
                await anext(running.events())
                forward = await sb.port(8000)
                pages = [asyncio.to_thread(_get, f"http://{forward.address}/") for _ in range(5)]
                assert await asyncio.gather(*pages) == [b"inside"] * 5
                other = await HttpService.open(url, "secret-two")
                with pytest.raises(NotFound):
                    await other.dial(sb.id, 8000)
                await other.close()
                with pytest.raises(NotFound):
                    await sb.service.dial(sb.id, 8001)
                through: Duplex = await sb.service.dial(sb.id, 8000)
                await through.write(b"GET / HTTP/1.0\r\n\r\n")
                await through.finish()
                parts: list[bytes] = []
                while part := await through.read():
                    parts.append(part)
                assert b"".join(parts).endswith(b"inside")
                await through.close()
        finally:
            server.should_exit = True
            await task
            await edge.close()

    asyncio.run(whole())


@needs_bwrap
def test_ports_of_the_edge_of_this_host(tmp_path: Path) -> None:
    """A process of its own behind a unix socket; with the network that is asked for in the first call."""
    try:
        with sync.connect("local", home=tmp_path) as hub:
            sb = hub.create("container", engine="bwrap", network=allowing(("listed.example", 443)))
            assert b"403" in sb.run("curl -sS https://other.example", timeout=60).stderr
            assert [record["res"]["host"] for record in sb.log() if record["kind"] == "net.denied"] == ["other.example"]
            running = sb.start(["/usr/bin/python3", "-c", SERVER])
            next(running.events())
            assert _get(f"http://{sb.port(8000).address}/") == b"inside"
            with pytest.raises(Unsupported, match="no network"):
                hub.create("function", engine="pool", network=allowing(("listed.example", 443)))
    finally:
        asyncio.run(daemon.end(tmp_path))


@needs_bwrap
def test_ports_without_async(tmp_path: Path) -> None:
    loop = sync.Loop()
    edge = loop.run(Edge.open(tmp_path, [BwrapEngine(tmp_path)]))
    with sync.over(loop, edge) as hub:
        sb = hub.create("container")
        running = sb.start(["/usr/bin/python3", "-c", SERVER])
        next(running.events())
        forward = sb.port(8000)
        assert _get(f"http://{forward.address}/") == b"inside"
        forward.close()
        _fails(f"http://{forward.address}/")
        sb.stop()
        loop.run(edge.close())


def test_an_engine_without_ports_says_so(tmp_path: Path) -> None:
    async def whole() -> None:
        edge = await Edge.open(tmp_path, [ProcessEngine(allow_unsafe=True)])
        async with Sandboxes(edge) as hub:
            sb = await hub.create("container")
            with pytest.raises(Unsupported, match="no ports"):
                await sb.port(8000)
            with pytest.raises(Unsupported, match="no ports"):
                await edge.dial(sb.id, 8000)
            with pytest.raises(BadRequest):
                await edge.dial(sb.id, 0)
        await edge.close()

    asyncio.run(whole())
