"""Every engine that runs on this machine, against everything that engines have to do."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from abyssal.sandbox.api import Engine, Probe
from abyssal.sandbox.conformance.attempts import CONTROLS, attempt
from abyssal.sandbox.conformance.bench import Check
from abyssal.sandbox.conformance.suite import CHECKS, missing, put
from abyssal.sandbox.engines.bwrap import BwrapEngine
from abyssal.sandbox.engines.gvisor import INTERRUPT, ORPHANS, GvisorEngine
from abyssal.sandbox.engines.runc import RuncEngine

ENGINES: dict[str, Callable[[Path], Engine]] = {"runc": RuncEngine, "bwrap": BwrapEngine, "gvisor": GvisorEngine}


# what a release of an engine cannot do, as its probe says too; everything else is held against it
FAULTS = {
    "a_timeout_kills_all_that_was_started": ORPHANS,
    "what_a_command_leaves_behind_ends_with_it": ORPHANS,
    "interrupt_from_a_terminal": INTERRUPT,
}


# a short pass over everything that engines have to do; the other checks run on request
SHORT = {
    *("runs_and_tells_streams_apart", "feeds_input_and_its_end", "says_what_ended_it", "a_terminal"),
    *("a_timeout_kills_all_that_was_started", "environment_and_folder", "the_user_is_no_root", "says_what_it_is"),
    *("writes_reads_lists_moves_removes", "what_is_no_file_is_refused", "links_lead_nowhere_outside"),
    *("trees_travel", "hostile_archives_are_refused", "memory_on_the_heap", "processes", "disk", "cores_seen"),
    *("what_cannot_be_met_is_refused", "the_same_content_has_the_same_digest", "a_fork_goes_on_from_here"),
    *("whoever_waits_learns_of_the_end", "nothing_is_left", "a_start_that_fails_leaves_nothing"),
    *("control_groups", "descriptors_that_leaked", "the_runtime_and_the_agent", "the_hosts_files", "other_boxes"),
    *("no_network", "links_to_processes", "near_addresses", "names_that_change_their_mind", "another_port"),
    *("ports_lead_inside",),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Path:
    """One state folder for all checks."""
    folder = tmp_path_factory.mktemp("state")
    shutil.copytree(programs, folder / "programs")
    return folder


@cache
def probed(name: str, state: Path) -> tuple[Engine, Probe]:
    engine = ENGINES[name](state)
    return engine, asyncio.run(engine.probe())


def params() -> list[ParameterSet]:
    """Every check, those that are not of the short pass with the marker."""
    marks = {check.name: () if check.name in SHORT else (pytest.mark.boxes,) for check in CHECKS}
    return [pytest.param(check, marks=marks[check.name], id=check.name) for check in CHECKS]


@pytest.mark.parametrize("check", params())
@pytest.mark.parametrize("name", ENGINES)
def test_conformance(name: str, check: Check, shared: Path) -> None:
    engine, probe = probed(name, shared)
    if not probe.ok:
        pytest.skip(f"{name}: {probe.detail} ({probe.remedy})")
    if why := missing(check, engine):
        pytest.skip(why)
    if probe.placed is not None and (fault := FAULTS.get(check.name)) in probe.placed.degraded:
        pytest.skip(str(fault))
    asyncio.run(put(check, engine, shared))


def test_the_short_pass_names_checks() -> None:
    assert {check.name for check in CHECKS} > SHORT


@pytest.mark.skipif(os.geteuid() != 0 or os.uname().machine != "x86_64", reason="controls run as root on x86-64")
@pytest.mark.parametrize("name", CONTROLS)
def test_control_the_attempt_succeeds_without_a_sandbox(name: str) -> None:
    """In name spaces of their own for mounts and the host's name, and nothing else around them."""
    apart = ("unshare", "--mount", "--uts", "--propagation", "private")
    try:
        done = subprocess.run([*apart, *attempt(name)], capture_output=True, text=True, check=False)
    finally:
        Path("/tmp/node").unlink(missing_ok=True)
    if done.stdout.strip() in ("-38", "-97", "-22", "-2"):
        pytest.skip(f"this kernel has no {name} at all: {done.stdout.strip()}")
    assert done.stdout.strip() == "0", done
