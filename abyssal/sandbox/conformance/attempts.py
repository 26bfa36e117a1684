"""System calls that a program tries, to get out or at what is not its own (sandbox.md 8).

`tests/sandbox` runs the same programs outside as a control, so that a call that this kernel refuses to everybody is not
taken for a success of the engine.
"""

from __future__ import annotations

import json

from abyssal.sandbox.conformance.bench import python

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


def attempt(name: str) -> tuple[str, ...]:
    """The argv that makes one attempt and prints 0 or minus the error's number."""
    return python(PROGRAM, json.dumps(ATTEMPTS[name]))
