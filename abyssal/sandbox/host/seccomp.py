"""System calls that programs in containers may not make (sandbox.md 8), in the two forms that runtimes read.

Everything else is allowed: what is refused here is of no use to builds, tests and shells, or opens parts of the kernel
that have let programs out before.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from abyssal.sandbox.errors import Unsupported

# name space and mount work, devices, kernel code, keys, and ways around these rules
DENIED = (
    *("mount", "umount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "mount_setattr"),
    *("fsopen", "fsconfig", "fsmount", "fspick", "statmount", "listmount"),
    *("unshare", "setns", "bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key"),
    *("io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("open_by_handle_at", "name_to_handle_at", "kexec_load", "kexec_file_load"),
    *("init_module", "finit_module", "delete_module", "create_module"),
    *("reboot", "swapon", "swapoff", "acct", "quotactl", "quotactl_fd", "syslog", "lookup_dcookie", "nfsservctl"),
    *("settimeofday", "stime", "clock_settime", "clock_adjtime", "adjtimex", "iopl", "ioperm", "vhangup"),
    *("fanotify_init", "kcmp", "move_pages", "mbind", "migrate_pages", "set_mempolicy", "vm86", "vm86old"),
    *("process_vm_readv", "process_vm_writev", "pidfd_getfd", "uselib", "ustat", "sysfs", "_sysctl"),
)
NEW_USER_NAMESPACES = 0x7E020000  # all CLONE_NEW* flags of clone
DEVICE_KINDS = (0o020000, 0o060000)  # character and block devices
KIND_MASK = 0o170000
# AF_AX25 .. exotic families have had many holes; packets, keys, virtual machines and XDP leave the network's policy
FAMILIES = (3, 4, 5, 6, 9, 11, 12, 15, 17, 19, 21, 23, 24, 26, 29, 30, 31, 33, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44)
# TIOCSTI, TIOCLINUX; XFS_IOC_SWAPEXT and EXCHANGE_RANGE, FS_IOC_* (flags, xattrs, encryption, verity, map, freeze)
IOCTLS = (
    *(0x5412, 0x541C, 0xC0C0586D, 0x40285881, 0x40086602, 0x401C5820, 0xC020660B, 0xC0045877, 0xC0045878),
    *(0x800C6613, 0x40806685, 0xC0506617, 0xC0506618, 0xC0506619, 0xC0066614),
)


@dataclass(frozen=True)
class Rule:
    """Refuse a call if an argument, masked, has a value; a mask of 0 looks at no argument."""

    call: str
    argument: int = 0
    value: int = 0
    mask: int = 0
    number: int = errno.EPERM


def rules() -> list[Rule]:
    """All rules; any one that fits refuses."""
    found = [Rule(name) for name in DENIED]
    bits = [1 << bit for bit in range(32) if NEW_USER_NAMESPACES >> bit & 1]
    found += [Rule("clone", 0, bit, bit) for bit in bits]
    found.append(Rule("clone3", number=errno.ENOSYS))  # its flags lie in memory; libraries then use clone
    found += [Rule("mknod", 1, kind, KIND_MASK) for kind in DEVICE_KINDS]
    found += [Rule("mknodat", 2, kind, KIND_MASK) for kind in DEVICE_KINDS]
    found += [Rule("socket", 0, family, 0xFFFFFFFF) for family in FAMILIES]
    found += [Rule("ioctl", 1, request, 0xFFFFFFFF) for request in IOCTLS]
    return found


@cache
def as_oci() -> Mapping[str, Any]:
    """The filter as a runtime's configuration."""
    arch = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}.get(platform.machine())
    calls = []
    for rule in rules():
        entry: dict[str, Any] = {"names": [rule.call], "action": "SCMP_ACT_ERRNO", "errnoRet": rule.number}
        if rule.mask:
            compare = {"index": rule.argument, "value": rule.mask, "valueTwo": rule.value, "op": "SCMP_CMP_MASKED_EQ"}
            entry["args"] = [compare]
        calls.append(entry)
    return {"defaultAction": "SCMP_ACT_ALLOW", "architectures": [arch] if arch else [], "syscalls": calls}


class _Compare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def as_program() -> bytes:
    """The filter as the kernel's own program, by libseccomp.

    Raises:
        Unsupported: the library is missing or refused a rule.
    """
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise Unsupported("system call filters need libseccomp: apt-get install libseccomp2") from error
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(0x7FFF0000))  # allow
    try:
        for rule in rules():
            number = library.seccomp_syscall_resolve_name(rule.call.encode())
            if number < 0:  # not on this architecture, or newer than the library
                continue
            compare = _Compare(rule.argument, 7, rule.mask, rule.value)
            count = 1 if rule.mask else 0
            action = ctypes.c_uint32(0x00050000 | rule.number)
            done = library.seccomp_rule_add_array(context, action, number, count, ctypes.byref(compare))
            if done:
                raise Unsupported(f"libseccomp refused the rule for {rule.call}: {os.strerror(-done)}")
        fd = os.memfd_create("filter")
        try:
            library.seccomp_export_bpf(context, fd)
            os.lseek(fd, 0, os.SEEK_SET)
            return os.read(fd, 1 << 20)
        finally:
            os.close(fd)
    finally:
        library.seccomp_release(context)
