"""A part of the suite for engines, on machines: the whole of it takes many minutes where processors are emulated."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from abyssal.sandbox.conformance.bench import Check
from abyssal.sandbox.conformance.suite import CHECKS, missing, put
from abyssal.sandbox.engines.qemu_microvm import QemuMicrovmEngine
from tests.sandbox.test_vm_guests import pytestmark as pytestmark  # the same reasons to skip

CHOSEN = {
    *("runs_and_tells_streams_apart", "says_what_ended_it", "a_timeout_kills_all_that_was_started"),
    *("the_user_is_no_root", "writes_reads_lists_moves_removes", "trees_travel", "processes"),
    *("near_addresses", "around_the_proxy", "names_that_change_their_mind", "a_connection_of_an_earlier_phase"),
    *("a_fork_has_the_policy_of_now", "ports_lead_inside"),
    *("a_fork_goes_on_from_here", "the_same_content_has_the_same_digest", "whoever_waits_learns_of_the_end"),
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> QemuMicrovmEngine:
    return QemuMicrovmEngine(tmp_path_factory.mktemp("state"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("check", [check for check in CHECKS if check.name in CHOSEN], ids=lambda check: check.name)
def test_conformance(engine: QemuMicrovmEngine, check: Check, tmp_path: Path) -> None:
    assert not missing(check, engine)
    asyncio.run(put(check, engine, tmp_path))


def test_the_chosen_checks_exist() -> None:
    assert {check.name for check in CHECKS} >= CHOSEN
