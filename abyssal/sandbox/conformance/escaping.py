"""Attempts to get out, or at what is not the sandbox's own (sandbox.md 8). Each must fail, and the box go on."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from pathlib import Path

from abyssal.sandbox.api import STRENGTH, Command
from abyssal.sandbox.conformance.attempts import ATTEMPTS, attempt
from abyssal.sandbox.conformance.bench import Bench, Checks, answers, expect, python, run
from abyssal.sandbox.errors import AgentLost
from abyssal.sandbox.wire import Kind, encode, fields

check = Checks()
KERNEL_FILES = (
    *("/proc/kcore", "/proc/kpagecgroup", "/proc/kpageflags", "/proc/kpagecount", "/proc/keys", "/proc/kmsg"),
    *("/proc/kallsyms", "/proc/iomem", "/dev/mem", "/dev/kmem", "/dev/kmsg", "/dev/port", "/dev/sda", "/dev/vda"),
    *("/sys/kernel/debug", "/sys/kernel/tracing", "/sys/firmware/efi/efivars", "/sys/kernel/security", "/dev/loop0"),
    *("/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/memory/cgroup.procs", "/dev/kvm", "/dev/fuse", "/dev/net/tun"),
)
WRITTEN = (
    *("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/kernel/hostname", "/proc/sys/vm/drop_caches"),
    *("/proc/sys/kernel/modprobe", "/proc/sys/kernel/ns_last_pid", "/proc/1/mem", "/proc/1/oom_score_adj"),
    *("/proc/self/uid_map", "/sys/fs/cgroup/memory/release_agent", "/sys/devices/system/cpu/online", "/run/agent"),
)


@check()
async def system_calls(bench: Bench) -> None:
    if os.uname().machine != "x86_64":
        return
    for user in ("user", "root"):
        if user == "root" and await strongest_user(bench) != "root":
            continue
        allowed = {"setuid root"} if user == "root" else set()
        async with bench.box(user=user) as box:
            shown = STRENGTH[box.placed.boundary] > STRENGTH["shared-kernel"]
            for name in ATTEMPTS:
                outcome = await run(box, attempt(name))
                if shown and outcome.stdout.strip() == "0":
                    continue  # its kernel is not the host's
                expect(name in allowed or outcome.stdout.strip() not in ("0", ""), f"{user}: {name}", outcome)
            await answers(box)


@check()
async def kernel_files(bench: Bench) -> None:
    async with bench.box(user=await strongest_user(bench)) as box:
        for path in KERNEL_FILES:
            text = f"head -c 16 {path} 2>/dev/null | od -An -c; find {path}/ -mindepth 1 -maxdepth 1 2>/dev/null"
            outcome = await run(box, text)
            expect(outcome.stdout.strip() == "", f"{path} tells something", outcome.stdout)
        core = Path("/proc/sys/kernel/core_pattern").read_text()
        for path in WRITTEN:
            outcome = await run(box, f"echo abyssal > {path}")
            expect(outcome.code != 0, f"{path} was written", outcome)
        expect(Path("/proc/sys/kernel/core_pattern").read_text() == core, "the host's core_pattern has changed")
        await answers(box)


async def strongest_user(bench: Bench) -> str:
    """Root where boxes have one."""
    placed = (await bench.engine.probe()).placed
    return "user" if placed is not None and "one user only" in placed.degraded else "root"


@check()
async def control_groups(bench: Bench) -> None:
    async with bench.box(user=await strongest_user(bench)) as box:
        text = (
            "find / -name cgroup.procs -o -name release_agent -o -name memory.limit_in_bytes 2>/dev/null | head;"
            "mkdir -p /tmp/c; mount -t cgroup2 none /tmp/c; mount -t cgroup -o memory none /tmp/c"
        )
        if STRENGTH[box.placed.boundary] > STRENGTH["shared-kernel"]:
            return  # its groups are its own
        outcome = await run(box, text)
        expect(outcome.stdout == "" and outcome.code != 0, "control groups can be reached", outcome)
        await answers(box)


@check()
async def programs_of_other_users(bench: Bench) -> None:
    async with bench.box() as box:
        found = await run(box, "for f in /usr/bin/passwd /usr/bin/su /usr/bin/newgrp; do test -u $f && echo $f; done")
        become = await run(box, python("import os; os.setuid(0)"))
        expect(become.code != 0, "the user became root", become)
        for program in found.stdout.split():
            outcome = await run(box, f"{program} --help >/dev/null 2>&1; cat /proc/self/status | grep CapEff")
            expect("0000000000000000" in outcome.stdout, "a setuid program gave rights", program, outcome)


@check()
async def descriptors_that_leaked(bench: Bench) -> None:
    async with bench.box() as box:
        links = (await run(box, "readlink /proc/self/fd/*")).stdout.splitlines()
        expect(len(links) == 3 and not any("socket" in link for link in links), "descriptors", links)
        expect((await run(box, "cd -P /proc/self/cwd/.. && pwd")).stdout == "/\n", "the folder is inside")


@check()
async def the_runtime_and_the_agent(bench: Bench) -> None:
    async with bench.box(user=await strongest_user(bench)) as box:
        for text in (
            "cat /run/agent > /tmp/a; echo x > /run/agent",
            "rm -f /run/agent",
            "echo x > /proc/1/exe",
            "cat /proc/1/environ /proc/1/mem",
            "cat < /proc/1/fd/3",
            "cat < /proc/1/fd/4",
        ):
            outcome = await run(box, text)
            expect(outcome.code != 0, text, outcome)
        await run(box, "for f in 0 1 2 3 4 5 6 7; do timeout 2 head -c 100000 /dev/zero > /proc/1/fd/$f; done")
        for path in bench.folder.rglob("*.log"):
            expect(path.stat().st_size < 100_000, "a file of the host was written", path)
        await answers(box)
    for user in ("user", await strongest_user(bench)):
        async with bench.box(user=user) as box:
            try:
                await run(box, "kill -9 1; kill -TERM 1; kill -STOP 1")
                await answers(box)
                await run(box, "kill -STOP $PPID; kill -9 $PPID; sleep 0.1", timeout=3)
                await answers(box)
            except AgentLost as error:  # a kernel of its own may let its root end the first process, and all with it
                expect(user == "root" and box.placed.boundary != "shared-kernel", f"{user} ended the agent", error)


@check("files")
async def a_replaced_shell_is_not_used(bench: Bench) -> None:
    async with bench.box(user=await strongest_user(bench)) as box:
        await run(
            box, "for f in /bin/sh /bin/ls /etc/ld.so.preload; do rm -f $f; echo evil > $f; done; mkdir x; touch x/f"
        )
        expect(len(await box.files.list("x")) == 1, "files work without programs of the box")
        await box.files.remove("x")


@check()
async def a_forged_frame_in_output_is_output(bench: Bench) -> None:
    forged = encode(Kind.EXITED, 1, fields([("code", 0), ("signal", 0), ("timed_out", 0), ("oom", 0), ("ms", 0)]))
    async with bench.box() as box:
        source = "import sys; sys.stdout.buffer.write(bytes.fromhex(sys.argv[1]) * 9); sys.stdout.flush(); sys.exit(7)"
        outcome = await run(box, python(source, forged.hex()))
        expect(outcome.code == 7, "the real end counts", outcome.exit)


@check("tty")
async def typing_into_the_terminal(bench: Bench) -> None:
    async with bench.box() as box:
        source = (
            "import fcntl, sys\n"
            "try:\n for c in 'id\\n': fcntl.ioctl(0, 0x5412, c.encode())\n print('typed')\n"
            "except OSError as e: print('refused')"
        )
        outcome = await run(box, python(source), tty=(24, 80))
        expect("refused" in outcome.stdout, "TIOCSTI", outcome)


@check()
async def the_hosts_files(bench: Bench) -> None:
    async with bench.box(user=await strongest_user(bench)) as box:
        secret = Path(f"/tmp/abyssal-secret-{uuid.uuid4().hex}")
        secret.write_text("secret")
        try:
            seen = await run(box, f"cat {secret} /proc/1/root{secret} /etc/shadow; find /root /home/user /work /tmp")
            expect("secret" not in seen.stdout, "a file of the host", seen.stdout)
            found = await run(box, "find /home /var/log /srv /mnt /opt -mindepth 1")
            expect(found.stdout.split() == ["/home/user"], "homes, logs, data", found.stdout)
        finally:
            secret.unlink()


@check()
async def other_boxes(bench: Bench) -> None:
    async with bench.box() as one, bench.box() as two:
        server = "import socket,time; s=socket.socket(1); s.bind(b'\\0neighbour'); s.listen(); time.sleep(20)"
        process = await one.start(Command(python(server), timeout=30))
        await run(one, "echo mine > /tmp/mine; echo mine > /dev/shm/mine; echo mine > mine; sleep 0.3")
        seen = await run(two, "cat /tmp/mine /dev/shm/mine /work/mine; ps ax 2>/dev/null | grep -c neighbou[r]")
        expect(seen.stdout.strip() in ("", "0"), "a neighbour's files or processes", seen.stdout)
        reach = await run(two, python("import socket; socket.socket(1).connect(b'\\0neighbour')"))
        expect(reach.code != 0, "a neighbour's socket")
        await process.signal(9)


@check()
async def no_network(bench: Bench) -> None:
    async with bench.box() as box:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            source = f"""
import socket
for family, where in ((2, ("127.0.0.1", {port})), (2, ("169.254.169.254", 80)), (2, ("10.0.0.1", 80)),
                      (2, ("1.1.1.1", 53)), (10, ("::1", {port})), (10, ("fd00::1", 80))):
    try:
        with socket.socket(family) as s:
            s.settimeout(2)
            s.connect(where)
        print("reached", where)
    except OSError:
        pass
print(sorted(name for _, name in socket.if_nameindex()))
"""
            outcome = await run(box, python(source))
            expect("reached" not in outcome.stdout and "'lo'" in outcome.stdout, "network", outcome)
            expect("eth" not in outcome.stdout and "ens" not in outcome.stdout, "interfaces", outcome.stdout)


@check()
async def loopback_works_inside(bench: Bench) -> None:
    async with bench.box() as box:
        source = (
            "import socket; s=socket.create_server(('127.0.0.1',0)); c=socket.create_connection(s.getsockname());"
            "p,_=s.accept(); c.sendall(b'hi'); print(p.recv(2))"
        )
        expect((await run(box, python(source))).stdout == "b'hi'\n", "loopback")


@check()
async def an_agent_that_runs_out_of_memory(bench: Bench) -> None:
    """Many descriptors of output and memory at once: the agent goes on, or its end is told as such."""
    async with bench.box() as box:
        bomb = "import os\nk=[]\nwhile True:\n k.append(bytearray(1<<20))\n os.fork() if len(k)%8==0 else 0"
        process = await box.start(Command(python(bomb), timeout=5))
        try:
            async with asyncio.timeout(40):
                ends = [event async for event in process.events()]
            expect(bool(ends), "it ended", ends)
            await answers(box)
        except AgentLost as error:
            expect(error.cause == "oom" and box.placed.boundary != "shared-kernel", "the cause", error.cause)


@check()
async def links_to_processes(bench: Bench) -> None:
    async with bench.box() as box:
        outcome = await run(box, "ls /proc/1/root/; cat /proc/1/root/etc/shadow; ls /proc/1/cwd/")
        expect("root:" not in outcome.stdout, "through the first process", outcome.stdout)
