"""Attempts to get out, or at what is not the sandbox's own (sandbox.md 8). Each must fail, and the box go on.

`ATTEMPTS` are system calls that a program tries; `tests/sandbox` runs the same program outside as a control, so that a
call that this kernel refuses to everybody is not taken for a success of the engine.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import uuid
from pathlib import Path

from abyssal.sandbox.api import STRENGTH, Command
from abyssal.sandbox.conformance.bench import Bench, Checks, answers, expect, python, run
from abyssal.sandbox.wire import Kind, encode, fields

check = Checks()
# name -> (number on x86-64, arguments as Python); what needs a file or buffer makes it first
ATTEMPTS = {
    "unshare user": (272, "0x10000000"),
    "unshare mount": (272, "0x20000"),
    "setns": (308, "os.open('/proc/self/ns/net', 0), 0"),
    "mount": (165, "b'none', b'/tmp', b'tmpfs', 0, 0"),
    "pivot_root": (155, "b'/tmp', b'/tmp'"),
    "chroot": (161, "b'/tmp'"),
    "open_tree": (428, "-100, b'/', 1"),
    "fsopen": (430, "b'tmpfs', 0"),
    "mknod device": (133, "b'/tmp/node', 0o20666, 0x0101"),
    "bpf": (
        321,
        "0, ctypes.byref(ctypes.create_string_buffer(bytes([2,0,0,0,4,0,0,0,4,0,0,0,1,0,0,0])+bytes(56))), 72",
    ),
    "keyctl": (250, "0, -3, 0"),
    "add_key": (248, "b'user', b'abyssal', b'x', 1, -2"),
    "userfaultfd": (323, "1"),
    "perf_event_open": (
        298,
        "ctypes.byref(ctypes.create_string_buffer(bytes([1,0,0,0,112,0,0,0])+bytes(112))), 0, -1, -1, 0",
    ),
    "open_by_handle_at": (
        304,
        "os.open('/', 0), ctypes.byref(ctypes.create_string_buffer(bytes([8,0,0,0,1,0,0,0])+bytes(8))), 0",
    ),
    "io_uring_setup": (425, "4, ctypes.byref(ctypes.create_string_buffer(120))"),
    "kexec_load": (246, "0, 0, 0, 0"),
    "init_module": (175, "0, 0, b''"),
    "finit_module": (313, "os.open('/usr/bin/env', 0), b'', 0"),
    "syslog": (103, "10, 0, 0"),
    "setuid root": (105, "0"),
    "sethostname": (170, "b'other', 5"),
    "ptrace the agent": (101, "16, 1, 0, 0"),
    "raise a limit": (
        302,
        "0, 7, ctypes.byref(ctypes.create_string_buffer(b'\\xff'*7+b'\\x00'+b'\\xff'*7+b'\\x00')), 0",
    ),
    "packet socket": (41, "17, 3, 0x300"),
    "raw socket": (41, "2, 3, 1"),
    "vsock": (41, "40, 1, 0"),
    "algorithm socket": (41, "38, 5, 0"),
    "set clock": (227, "0, ctypes.byref(ctypes.create_string_buffer(16))"),
    "file attributes ioctl": (16, "os.open('/work', 0), 0x40086602, ctypes.byref(ctypes.create_string_buffer(8))"),
    "XFS_IOC_SWAPEXT": (16, "os.open('/work', 0), 0xc0c0586d, ctypes.byref(ctypes.create_string_buffer(200))"),
    "FITRIM": (16, "os.open('/work', 0), 0xc0185879, ctypes.byref(ctypes.create_string_buffer(24))"),
}
# what root can do outside, and harms nothing there: the controls
CONTROLS = (
    *("unshare user", "unshare mount", "setns", "chroot", "open_tree", "fsopen", "mknod device", "bpf", "keyctl"),
    *("add_key", "userfaultfd", "perf_event_open", "io_uring_setup", "syslog", "setuid root", "packet socket"),
    *("raw socket", "vsock"),
)
PROGRAM = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
number, arguments = json.loads(sys.argv[1])
try:
    values = eval(f"({arguments},)")
except OSError as error:
    print(-error.errno)
    sys.exit()
done = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(v) if isinstance(v, int) else v for v in values])
print(-ctypes.get_errno() if done < 0 else 0)
"""
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


def attempt(name: str) -> tuple[str, ...]:
    """The argv that makes one attempt and prints 0 or minus the error's number."""
    return python(PROGRAM, json.dumps(ATTEMPTS[name]))


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
            outcome = await run(box, f"head -c 16 {path} 2>/dev/null | od -An -c; ls -A {path}/ 2>/dev/null")
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
        outcome = await run(box, text)
        if STRENGTH[box.placed.boundary] > STRENGTH["shared-kernel"]:
            return
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
        outcome = await run(box, ("ls", "-l", "/proc/self/fd"))
        links = [line.split(" -> ")[1] for line in outcome.stdout.splitlines() if " -> " in line]
        expect(len(links) <= 4 and not any("socket" in link for link in links), "descriptors", links)
        expect((await run(box, "ls /proc/self/cwd/..")).code == 0, "the folder is inside")


@check()
async def the_runtime_and_the_agent(bench: Bench) -> None:
    async with bench.box(user=await strongest_user(bench)) as box:
        for text in (
            "cat /run/agent > /tmp/a; echo x > /run/agent",
            "rm -f /run/agent",
            "echo x > /proc/1/exe",
            "cat /proc/1/environ /proc/1/mem",
            "ls -l /proc/1/fd/ && cat < /proc/1/fd/3",
        ):
            outcome = await run(box, text)
            expect(outcome.code != 0, text, outcome)
        await run(box, "kill -9 1; kill -TERM 1; kill -STOP 1")
        await answers(box)
        await run(box, "kill -STOP $PPID; kill -9 $PPID; sleep 0.1", timeout=3)
        await answers(box)


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
            seen = await run(box, f"cat {secret} /proc/1/root{secret} /etc/shadow; ls -A /root /home/user /work /tmp")
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
        if "network" in box.features:
            return
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
        async with asyncio.timeout(40):
            ends = [event async for event in process.events()]
        expect(bool(ends), "it ended", ends)
        await answers(box)


@check()
async def links_to_processes(bench: Bench) -> None:
    async with bench.box() as box:
        outcome = await run(box, "ls /proc/1/root/; cat /proc/1/root/etc/shadow; ls /proc/1/cwd/")
        expect("root:" not in outcome.stdout, "through the first process", outcome.stdout)
