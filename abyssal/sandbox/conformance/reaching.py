"""Networks: what a policy lets through, and attempts to get past it (sandbox.md 7 and 8).

Each attempt stands beside its control: the same attempt with its target named in the policy arrives, so that it fails
for the guard and for nothing else. Targets are servers of this host; no other is asked.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from abyssal.sandbox.api import Allowed, Box, Command, Denied, Network, Networked
from abyssal.sandbox.conformance.bench import Bench, Checks, answers, collect, expect, python, run
from abyssal.sandbox.conformance.escaping import strongest_user
from abyssal.sandbox.errors import NotFound

check = Checks()
PATIENCE = 120.0  # of a Python on an emulated processor
# through the proxy to each target: the status of the answer, and what the target says or the reason
ATTEMPT = """
import json, os, socket, sys
port = int(os.environ["HTTP_PROXY"].rpartition(":")[2])
found = {}
for target in sys.argv[1:]:
    with socket.create_connection(("127.0.0.1", port), 60) as s:
        s.settimeout(60)
        s.sendall(f"CONNECT {target} HTTP/1.1\\r\\nHost: {target}\\r\\n\\r\\n".encode())
        data = b""
        while not data.endswith(b"\\n") or data.endswith(b"\\r\\n"):
            more = s.recv(999)
            data += more
            if not more:
                break
        found[target] = data.split()[1].decode() + " " + data.split(b"\\r\\n\\r\\n", 1)[1].decode().strip()
print(json.dumps(found))
"""
REACHED = "200 reached"
# what is never public, in many spellings; {port} is one on which this host answers
NEAR = (
    *("127.0.0.1:{port}", "127.0.0.2:{port}", "0.0.0.0:{port}", "localhost:{port}", "localhost.:{port}"),
    *("2130706433:{port}", "0x7f000001:{port}", "127.1:{port}", "0177.0.0.1:{port}"),
)
METADATA = ("169.254.169.254:80", "[fd00:ec2::254]:80", "168.63.129.16:80", "100.100.100.200:80", "192.0.0.192:80")
PRIVATE = (
    *("10.0.0.1:80", "172.16.0.1:80", "192.168.0.1:80", "100.64.0.1:80", "198.18.0.1:80", "224.0.0.1:80"),
    *("240.0.0.1:80", "255.255.255.255:80"),
)
SIX = (
    *("[::1]:{port}", "[::]:{port}", "[fd00::1]:80", "[fe80::1]:80", "[ff02::1]:80", "[fec0::1]:80"),
    *("[::ffff:127.0.0.1]:{port}", "[::ffff:10.0.0.1]:80", "[64:ff9b::7f00:1]:{port}", "[2002:7f00:1::]:{port}"),
)


@dataclass
class Target:
    """A server of this host that greets, echoes, and counts."""

    port: int
    count: int = 0
    heads: list[bytes] = field(default_factory=list)


@asynccontextmanager
async def target(host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Target]:
    """One that greets whoever connects."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.count += 1
        writer.write(b"reached\n")
        try:
            while data := await reader.read(4096):
                seen.heads.append(data)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, host, port)
    seen = Target(server.sockets[0].getsockname()[1])
    try:
        yield seen
    finally:
        server.close()


async def reach(box: Box, *targets: str) -> dict[str, str]:
    """What the proxy answers for each `host:port`."""
    outcome = await run(box, python(ATTEMPT, *targets), timeout=PATIENCE)
    expect(outcome.code == 0, "the attempt itself failed", outcome)
    return dict(json.loads(outcome.stdout))


def allowing(*entries: tuple[str, int]) -> Network:
    """A list of hosts and ports."""
    return Network("allow", tuple(Allowed(host, port) for host, port in entries))


async def refused(box: Box, targets: Sequence[str]) -> None:
    """Insist that each is answered with 403 and a reason."""
    for name, said in (await reach(box, *targets)).items():
        expect(said.startswith("403 ") and "denied by the network policy" in said, f"{name} was not refused", said)


def networked(box: Box) -> Networked:
    """The box as one with a network."""
    if not isinstance(box, Networked):
        raise AssertionError(f"{box!r} says that it has a network, and has no way to it")
    return box


class Names:
    """A resolver that changes its mind: of each name, one answer after another, the last one for ever."""

    def __init__(self, **names: Sequence[str]):
        self._names = {name.replace("_", "."): list(found) for name, found in names.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self._names:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        found = self._names[host]
        return [found.pop(0) if len(found) > 1 else found[0]]


@check("network")
async def near_addresses(bench: Bench) -> None:
    """The host's loopback, in many spellings, under an open network."""
    async with target() as seen, bench.box(network=Network("open")) as box:
        names = [name.format(port=seen.port) for name in NEAR]
        await refused(box, names)
        expect(seen.count == 0, "the host's loopback was reached", seen)
        await box.set_network(allowing(("127.0.0.1", seen.port)))  # the control
        expect((await reach(box, names[0])) == {names[0]: REACHED}, "a named address is reached", seen)
        expect(seen.count == 1, "by one connection", seen)


@check("network")
async def metadata_and_private_addresses(bench: Bench) -> None:
    """By number, and by names that lead there; and the address that this host has in its own network."""
    own = _own_address()
    names = Names(metadata_example=["169.254.169.254"], inside_example=["10.0.0.1"], mine_example=[own])
    async with target(own) as seen, bench.box(network=Network("open")) as box:
        networked(box).resolve_with(names)
        led = ["metadata.example:80", "inside.example:80", f"mine.example:{seen.port}", f"{own}:{seen.port}"]
        await refused(box, [*METADATA, *PRIVATE, *led])
        expect(seen.count == 0, "the host was reached", seen)
        listed = [("mine.example", seen.port), ("metadata.example", 80)]
        await box.set_network(allowing(*listed))  # a name on the list makes nothing public
        await refused(box, [led[0], led[2]])
        await box.set_network(allowing(*listed, (f"{own}/32", seen.port)))  # the control
        expect(await reach(box, led[2]) == {led[2]: REACHED}, "a named network is reached", seen)


def _own_address() -> str:
    """An address of this host that others of its network reach it by; loopback where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
        try:
            trial.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return "127.0.0.1"
        return str(trial.getsockname()[0])


@check("network")
async def the_newer_protocol(bench: Bench) -> None:
    """IPv6, and IPv4 within it."""
    if not socket.has_ipv6:
        return
    try:
        async with target("::1") as seen, bench.box(network=Network("open")) as box:
            names = [name.format(port=seen.port) for name in SIX]
            await refused(box, names)
            expect(seen.count == 0, "loopback was reached", seen)
            await box.set_network(allowing(("::1", seen.port)))  # the control
            expect(await reach(box, names[0]) == {names[0]: REACHED}, "a named address is reached", seen)
    except OSError as error:
        expect("address" in str(error).lower(), "IPv6 on this host", error)


@check("network")
async def around_the_proxy(bench: Bench) -> None:
    """There is no way but the proxy: no interface, no raw socket that leads anywhere, no datagram."""
    own = _own_address()
    source = """
import socket, sys
host, port = sys.argv[1], int(sys.argv[2])
print("interfaces", sorted(name for _, name in socket.if_nameindex() if name not in ("lo", "sit0", "tunl0")))
for name, family, kind, number in (
    ("plain", 2, 1, 0), ("datagram", 2, 2, 0), ("raw", 2, 3, 1), ("packet", 17, 3, 0x300), ("vsock", 40, 1, 0),
):
    try:
        with socket.socket(family, kind, number) as s:
            s.settimeout(3)
            if family == 2:
                s.connect((host, port))
                s.send(b"x" * 64)
            elif family == 17:
                s.bind(("eth0", 0))
            else:
                s.connect((2, port))
        print("went", name)
    except OSError:
        pass
"""
    user = await strongest_user(bench)
    async with target(own) as seen, bench.box(user=user, network=allowing((own, seen.port))) as box:
        if own == "127.0.0.1":  # then it is the box's own loopback that would answer
            return
        outcome = await run(box, python(source, own, str(seen.port)), timeout=PATIENCE)
        expect(outcome.stdout == "interfaces []\n", "a way around", outcome)
        expect(seen.count == 0, "the target was reached", seen)
        name = f"{own}:{seen.port}"
        expect(await reach(box, name) == {name: REACHED}, "through the proxy it is", seen)  # the control
        await answers(box)


@check("network")
async def names_that_change_their_mind(bench: Bench) -> None:
    """What was judged is what is connected to; what the name means the next time is judged the next time."""
    async with target("127.0.0.2") as harmless, target("127.0.0.3", harmless.port) as secret:
        port = harmless.port
        names = Names(rebind_example=["127.0.0.2", "127.0.0.3"])
        async with bench.box(network=allowing(("rebind.example", port), ("127.0.0.2", port))) as box:
            networked(box).resolve_with(names)
            name = f"rebind.example:{port}"
            expect(await reach(box, name) == {name: REACHED}, "the first answer is reached")
            expect(names.asked == ["rebind.example"] and harmless.count == 1, "asked once", names.asked)
            await refused(box, [name])
            expect(secret.count == 0, "a name led to what is not on the list", secret)
            named = allowing(("rebind.example", port), ("127.0.0.3", port))  # the control
            await box.set_network(named)
            expect(await reach(box, name) == {name: REACHED} and secret.count == 1, "where it is named", secret)


@check("network")
async def names_that_carry_words_out(bench: Bench) -> None:
    """A name that is not on the list is asked of nobody."""
    names = Names(a_listed_example=["127.0.0.1"], listed_example=["127.0.0.1"])
    async with target() as seen, bench.box() as box:
        networked(box).resolve_with(names)
        await box.set_network(allowing(("*.listed.example", seen.port), ("127.0.0.1", seen.port)))
        others = ["secret.evil.example", "listed.example", "notlisted.example", "listed.example.evil.example"]
        await refused(box, [f"{name}:{seen.port}" for name in others])
        expect(names.asked == [] and seen.count == 0, "names were asked for", names.asked)
        name = f"a.LISTED.example.:{seen.port}"
        expect(await reach(box, name) == {name: REACHED}, "one on the list is", names.asked)  # the control


@check("network")
async def another_port(bench: Bench) -> None:
    async with target() as seen, target() as other:
        names = (f"127.0.0.1:{seen.port}", f"127.0.0.1:{other.port}")
        async with bench.box(network=allowing(("127.0.0.1", seen.port))) as box:
            await refused(box, [names[1], "127.0.0.1:22"])
            expect(other.count == 0, "another port was reached", other)
            expect(await reach(box, names[0]) == {names[0]: REACHED}, "the one on the list is", seen)
            await box.set_network(allowing(("127.0.0.1", 0)))  # the control
            expect(await reach(box, names[1]) == {names[1]: REACHED}, "any port, where any is named", other)


@check("network")
async def a_connection_of_an_earlier_phase(bench: Bench) -> None:
    source = """
import os, socket, sys
s = socket.create_connection(("127.0.0.1", int(os.environ["HTTP_PROXY"].rpartition(":")[2])))
s.sendall(f"CONNECT {sys.argv[1]} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode())
f = s.makefile("rb")
while f.readline() != b"reached\\n":
    pass
for line in sys.stdin:
    try:
        s.sendall(line.encode())
        print("back" if f.readline() else "ended", flush=True)
    except OSError:
        print("ended", flush=True)
"""
    async with target() as seen, bench.box(network=allowing(("127.0.0.1", seen.port))) as box:
        name = f"127.0.0.1:{seen.port}"
        process = await box.start(Command(python(source, name), stdin=True, timeout=PATIENCE))
        done = asyncio.create_task(collect(process))
        async with asyncio.timeout(60):
            while not seen.count:
                await asyncio.sleep(0.05)
        await process.write(b"one\n")  # the control: the connection works
        async with asyncio.timeout(30):
            while b"one\n" not in seen.heads:
                await asyncio.sleep(0.05)
        await box.set_network(Network("open"))  # wider, and all the same what was open ends
        await process.write(b"two\n")
        await process.close_stdin()
        outcome = await done
        expect(outcome.stdout == "back\nended\n" and b"two\n" not in seen.heads, "it went on", outcome, seen.heads)
        await box.set_network(Network())
        again = await run(box, python(ATTEMPT, name), env={"HTTP_PROXY": "http://127.0.0.1:3128"}, timeout=PATIENCE)
        expect("403" in again.stdout and seen.count == 1, "a network that was taken away", again)


@check("network")
async def one_request_for_each_connection(bench: Bench) -> None:
    """Plain HTTP: the server is told the host that was judged, and nothing follows behind the request."""
    source = """
import os, socket, sys
s = socket.create_connection(("127.0.0.1", int(os.environ["HTTP_PROXY"].rpartition(":")[2])))
s.sendall(f"POST http://{sys.argv[1]}/path?q HTTP/1.1\\r\\nHost: evil.example\\r\\nContent-Length: 3\\r\\n"
          f"Proxy-Authorization: x\\r\\n\\r\\nabcGET / HTTP/1.1\\r\\nHost: evil.example\\r\\n\\r\\n".encode())
s.settimeout(2)
try:
    while s.recv(999):
        pass
except OSError:
    pass
"""
    async with target() as seen, bench.box(network=allowing(("127.0.0.1", seen.port))) as box:
        await run(box, python(source, f"127.0.0.1:{seen.port}"), timeout=PATIENCE)
        told = b"".join(seen.heads)
        expect(told.startswith(b"POST /path?q HTTP/1.1\r\n") and told.endswith(b"\r\n\r\nabc"), "as it was", told)
        expect(b"evil" not in told and b"roxy-" not in told, "another host was named", told)
        expect(f"Host: 127.0.0.1:{seen.port}\r\n".encode() in told, "its own host", told)


@check("network")
async def denials_are_told(bench: Bench) -> None:
    told: list[Denied] = []
    async with bench.box(network=allowing(("listed.example", 443))) as box:
        networked(box).tell_denied(told.append)
        networked(box).resolve_with(Names(listed_example=["10.1.2.3"]))
        await refused(box, ["other.example:443", "listed.example:443"])
    expect([(each.host, each.port, each.address) for each in told]
           == [("other.example", 443, ""), ("listed.example", 443, "10.1.2.3")], "the denials", told)  # fmt: skip


@check("network")
async def commands_know_the_proxy(bench: Bench) -> None:
    text = 'echo "$HTTP_PROXY,$https_proxy,$ALL_PROXY,$NO_PROXY"'
    async with bench.box(env={"https_proxy": "mine"}) as box:
        expect((await run(box, text)).stdout == ",mine,,\n", "nothing without a network")
        await box.set_network(Network("open"))
        said = (await run(box, text, env={"ALL_PROXY": ""})).stdout.split(",")
        expect(said[0].startswith("http://127.0.0.1:") and said[1:3] == ["mine", ""], "what was said stays", said)
        expect(said[3].startswith("127.0.0.1"), "near addresses go past it", said)


@check("network", "fork")
async def a_fork_has_the_policy_of_now(bench: Bench) -> None:
    async with target() as seen, bench.box(network=Network("open")) as box:
        await box.set_network(allowing(("127.0.0.1", seen.port)))
        (kid,) = await box.fork([f"{box.id}-a"])
        try:
            name = f"127.0.0.1:{seen.port}"
            expect(await reach(kid, name) == {name: REACHED}, "as its parent", seen)
            await refused(kid, [f"127.0.0.2:{seen.port}", "example.org:443"])
        finally:
            await kid.stop()


@check("ports")
async def ports_lead_inside(bench: Bench) -> None:
    """Bytes both ways, more than any window, and an end of one side alone."""
    source = """
import socket
server = socket.create_server(("127.0.0.1", 8000))
print("listening", flush=True)
while True:
    c, _ = server.accept()
    data = b""
    while piece := c.recv(65536):
        data += piece
    c.sendall(data[::-1])
    c.close()
"""
    async with bench.box() as box:
        process = await box.start(Command(python(source), timeout=PATIENCE))
        await anext(process.events())
        data = bytes(range(256)) * 2048
        dialled = await networked(box).dial(8000)
        async with asyncio.timeout(PATIENCE):
            await dialled.write(data)
            await dialled.finish()
            came = b""
            while piece := await dialled.read():
                came += piece
        await dialled.close()
        expect(came == data[::-1], "what came back", len(came))
        try:
            await networked(box).dial(8001)
            expect(False, "a port where nobody listens")
        except NotFound:
            pass
        await process.signal(9)
        await answers(box)
