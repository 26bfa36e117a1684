"""A container's root on disk, and the OCI configuration that runc and gVisor read.

    folder/disk.img      ext4 of the size of the disk limit; its `upper` takes what changes, its `work` is overlayfs's
    folder/layers/N      layers of the image as they are;  folder/shown/N the same under the container's owners
    RUN/<id>/root        overlayfs over all: what the container sees as /

Owners on disk are those seen inside, whatever numbers the container has outside, so layers of two containers compare.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abyssal.sandbox.api import Spec
from abyssal.sandbox.guest import build
from abyssal.sandbox.host import mounts, seccomp
from abyssal.sandbox.host.mounts import Owners
from abyssal.sandbox.image import Image, Store

RUN = Path("/run/abyssal")  # the way to a root must be open to the container's users
CLAIM = "claim.json"
HOSTNAME = "sandbox"
FIRST_OWNER, OWNERS, RANGES = 1 << 20, 65536, 30000  # nobody's numbers on any host
AGENT = "/run/agent"
# what the agent needs to change user, and to move files for root; commands have none
CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETPCAP", "SETUID")
MASKED = (
    *(
        "acpi",
        "asound",
        "kcore",
        "keys",
        "key-users",
        "kmsg",
        "kpagecgroup",
        "kpagecount",
        "kpageflags",
        "latency_stats",
    ),
    *("sched_debug", "scsi", "timer_list", "timer_stats", "interrupts", "iomem", "ioports", "vmallocinfo", "slabinfo"),
    *(
        "kallsyms",
        "modules",
        "config.gz",
        "pagetypeinfo",
        "mdstat",
        "diskstats",
        "swaps",
        "partitions",
        "dynamic_debug",
    ),
)
READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger", "driver", "tty")
SCRUBBED = (
    *("etc/machine-id", "root/.bash_history", "home/user/.bash_history", "root/.python_history"),
    *("home/user/.python_history", "root/.cache", "home/user/.cache", "var/cache", "var/tmp", "run", "tmp", "dev"),
    *("proc", "sys"),
)


@dataclass
class Root:
    """A mounted root.

    Attributes:
        folder: of the box.
        place: its part of `RUN`.
        owner: number outside of root inside.
    """

    folder: Path
    place: Path
    owner: int

    @property
    def path(self) -> Path:
        """What the container sees as /."""
        return self.place / "root"

    @property
    def upper(self) -> Path:
        """What has changed, under the owners seen inside."""
        return self.folder / "disk" / "upper"

    @classmethod
    def mount(cls, engine: str, box_id: str, folder: Path, spec: Spec, image: Image, store: Store) -> Root:
        """Mount everything.

        Raises:
            ImageError, Unsupported: it cannot be; nothing is left behind.
        """
        claim(engine, box_id, store.folder, folder)
        root = cls(folder, RUN / box_id, FIRST_OWNER + OWNERS * secrets.randbelow(RANGES))
        owners = Owners(root.owner, OWNERS)
        try:
            root._mount(spec, image, store, owners)
        except BaseException:
            root.remove()
            raise
        finally:
            owners.close()
        return root

    def _mount(self, spec: Spec, image: Image, store: Store, owners: Owners) -> None:
        self.path.mkdir(mode=0o711)
        mounts.disk(spec.limits.disk, store.folder / "disks", self.folder / "disk.img")
        self._new("disk")
        mounts.mount_disk(self.folder / "disk.img", self.folder / "disk")
        for name in ("upper", "work"):
            (self.folder / "disk" / name).mkdir()
        owners.show(self.folder / "disk", self._new("shown-disk"))
        lower: list[Path] = []
        for number, digest in enumerate(image.layers):
            layer, shown = self._new(f"layers/{number}"), self._new(f"shown/{number}")
            mounts.mount_layer(store.layer(digest), layer)
            owners.show(layer, shown)
            lower.insert(0, shown)
        shown_disk = self.folder / "shown-disk"
        mounts.overlay(lower, shown_disk / "upper", shown_disk / "work", self.path)

    def _new(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def remove(self) -> None:
        """Unmount everything and delete the disk; a second time does nothing."""
        remove(self.folder, self.place)


def reachable_agent(state: Path) -> Path:
    """The agent's program, where containers' users can reach it."""
    built = build.agent(state / "programs")
    RUN.mkdir(mode=0o711, exist_ok=True)
    program = RUN / built.name
    if not program.exists():
        shutil.copyfile(built, program.with_suffix(".part"))
        program.with_suffix(".part").chmod(0o755)
        program.with_suffix(".part").rename(program)
    return program


def cores_folder(place: Path, count: int) -> Path:
    """A folder to be shown as /sys: nothing but how many cores there are."""
    cpu = place / "sys/devices/system/cpu"
    cpu.mkdir(parents=True, exist_ok=True)
    for name in ("online", "possible", "present"):
        (cpu / name).write_text(f"0-{count - 1}\n" if count > 1 else "0\n")
    for number in range(count):
        (cpu / f"cpu{number}").mkdir(exist_ok=True)
    return place / "sys"


def claim(engine: str, box_id: str, state: Path, folder: Path) -> None:
    """Make a box's part of `RUN`, and write down whose it is: platforms with other state leave it alone."""
    RUN.mkdir(mode=0o711, exist_ok=True)
    (RUN / box_id).mkdir(mode=0o711, exist_ok=True)
    claim = {"engine": engine, "state": str(state.resolve()), "folder": str(folder.resolve())}
    (RUN / box_id / CLAIM).write_text(json.dumps(claim))


def claimed(engine: str, state: Path) -> dict[str, Path]:
    """Boxes of an engine with this state that have something on this host, and their folders."""
    found = {}
    for path in RUN.glob(f"*/{CLAIM}"):
        with suppress(OSError, ValueError):
            said = json.loads(path.read_text())
            if said["engine"] == engine and said["state"] == str(state.resolve()):
                found[path.parent.name] = Path(said["folder"])
    return found


def remove(folder: Path, place: Path) -> None:
    """What a box had mounted and written."""
    for point in mounts.mounts_below(place, folder):
        mounts.unmount(point)
    shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):
        for name in ("disk.img", "config.json"):
            (folder / name).unlink(missing_ok=True)
        for name in ("disk", "shown-disk", "layers", "shown"):
            shutil.rmtree(folder / name, ignore_errors=True)


def config(
    spec: Spec, root: Root, image: Image, agent: Path, cores: int, group: str | None, *, filtered: bool = True
) -> dict[str, Any]:
    """The OCI configuration.

    Args:
        spec, root, image: of the box.
        agent: the program to run.
        cores: that programs shall see.
        group: path of its control group, or None.
        filtered: whether system calls are filtered (a kernel of its own refuses by itself).
    """
    memory = spec.limits.memory
    capabilities = [f"CAP_{name}" for name in CAPABILITIES]
    mapping = [{"containerID": 0, "hostID": root.owner, "size": OWNERS}]
    namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup", "user"]
    linux: dict[str, Any] = {
        "namespaces": [{"type": name} for name in namespaces],
        "uidMappings": mapping,
        "gidMappings": mapping,
        "maskedPaths": [f"/proc/{name}" for name in MASKED],
        "readonlyPaths": [f"/proc/{name}" for name in READ_ONLY],
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
    }
    if group is not None:
        linux["cgroupsPath"] = group
    if filtered:
        linux["seccomp"] = seccomp.as_oci()
    return {
        "ociVersion": "1.0.2",
        "hostname": HOSTNAME,
        "root": {"path": str(root.path), "readonly": False},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": [AGENT, "--fd", "0"],
            "env": [],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            "rlimits": [
                {"type": "RLIMIT_CORE", "hard": 0, "soft": 0},
                {"type": "RLIMIT_NOFILE", "hard": 4096, "soft": 1024},
            ],
        },
        "mounts": [*_mounts(memory), *_binds(image, agent, cores_folder(root.place, cores))],
        "linux": linux,
    }


def _mounts(memory: int) -> Sequence[dict[str, Any]]:
    def at(place: str, kind: str, *options: str) -> dict[str, Any]:
        return {"destination": place, "type": kind, "source": kind, "options": ["nosuid", *options]}

    return (
        at("/proc", "proc", "nodev", "noexec"),
        at("/dev", "tmpfs", "mode=755", "size=64k", "strictatime"),
        at("/dev/pts", "devpts", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        at("/dev/shm", "tmpfs", "nodev", "mode=1777", f"size={memory // 2}"),
        at("/dev/mqueue", "mqueue", "nodev", "noexec"),
        at("/tmp", "tmpfs", "nodev", "mode=1777", f"size={memory // 2}"),
        at("/run", "tmpfs", "nodev", "mode=755", "size=1m"),
    )


def _binds(image: Image, agent: Path, sys: Path) -> Sequence[dict[str, Any]]:
    shown = [(name, Path(name)) for name in image.binds] + [(AGENT, agent), ("/sys", sys)]
    options = ["bind", "ro", "nosuid", "nodev"]
    return [{"destination": to, "type": "none", "source": str(what), "options": options} for to, what in shown]
