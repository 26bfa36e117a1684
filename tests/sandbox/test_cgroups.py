"""Control groups: what is killed with a group, and what never is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from abyssal.sandbox.api import MIB, Limits
from abyssal.sandbox.errors import Rejected, Unsupported
from abyssal.sandbox.host.cgroups import Group
from abyssal.sandbox.host.hierarchies import Hierarchies
from tests.sandbox.traces import GROUPS, named

# in the group itself: it must outlive what it kills
JOINS = """
import os, sys
from abyssal.sandbox.host.cgroups import Group
from abyssal.sandbox.host.hierarchies import Hierarchies
group = Group(sys.argv[1], Hierarchies.find())
group.add(os.getpid())
raw = {int(word) for folder in group.folders() for word in (folder / "cgroup.procs").read_text().split()}
print(os.getpid() in raw, os.getpid() in group.pids())
"""
# among numbers of its own, where the group's process has none
SEES = """
import json, sys
from pathlib import Path
from abyssal.sandbox.host.cgroups import Group
from abyssal.sandbox.host.hierarchies import Hierarchies
group = Group(sys.argv[1], Hierarchies.find())
raw = [word for folder in group.folders() for word in (folder / "cgroup.procs").read_text().split()]
print(json.dumps({"raw": raw, "pids": group.pids()}))
group.kill(0.5)
print("alive")
"""
# a platform in another group than we are, which dies
MAKES = """
import os, subprocess, sys
from abyssal.sandbox.api import Limits
from abyssal.sandbox.host.cgroups import Group
from abyssal.sandbox.host.hierarchies import Hierarchies
Group(sys.argv[1], Hierarchies.find()).add(os.getpid())
inner = Group.create(sys.argv[2], Limits(memory=64 << 20, pids=16))
child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
inner.add(child.pid)
print(child.pid, flush=True)
os._exit(9)
"""


@pytest.fixture
def group() -> Iterator[Group]:
    try:
        made = Group.create(f"test-{os.getpid()}", Limits(memory=64 * MIB, pids=16))
    except Unsupported as error:
        pytest.skip(f"no control group can be made here: {error}")
    except Rejected as error:
        if not isinstance(error.__cause__, PermissionError):
            raise
        pytest.skip(f"we may not make a control group here: {error}")
    yield made
    made.remove()
    assert not [folder for folder in made.folders() if folder.exists()]


def test_a_group_has_the_processes_that_were_put_into_it_and_kills_them(group: Group) -> None:
    child = subprocess.Popen(["sleep", "60"])
    group.add(child.pid)
    assert group.pids() == [child.pid]
    group.kill()
    assert child.wait(10) == -9
    assert group.pids() == []


def test_a_group_of_the_dead_is_found_wherever_they_were(group: Group) -> None:
    name = f"{group.name}-inner"
    program = [sys.executable, "-c", MAKES, group.name, name]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    left = Group.left(name)
    assert left.pids() == [int(done.stdout)] and Group(name, Hierarchies.find()).pids() == []
    assert len(left.folders()) == len(group.folders())
    left.remove()
    assert named(GROUPS, name) == []


def test_our_own_process_is_never_of_a_group(group: Group) -> None:
    """Not even where we stand in it: whoever kills by these numbers goes on."""
    program = [sys.executable, "-c", JOINS, group.name]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True False\n"), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="a name space of processes is made as root")
def test_a_process_without_a_number_here_is_never_of_a_group(group: Group) -> None:
    """Version 2 writes 0 for it, and kill(0) would mean our own process group."""
    child = subprocess.Popen(["sleep", "60"])
    try:
        group.add(child.pid)
        done = subprocess.run(
            ["unshare", "--pid", "--fork", sys.executable, "-c", SEES, group.name],
            capture_output=True, text=True, check=False, start_new_session=True,
        )  # fmt: skip
        assert done.returncode == 0, done
        seen, alive = done.stdout.splitlines()
        told = json.loads(seen)
        assert told["pids"] == [] and alive == "alive"
        assert "0" in told["raw"] or Hierarchies.find().v2 is None  # version 1 leaves it out by itself
    finally:
        child.kill()
        child.wait()
