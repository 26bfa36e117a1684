"""The tests keep their caches away from those of the user who runs them; the longest come first."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is given the most time begins first, so that no worker runs it alone when all else is done."""

    def limit(item: pytest.Item) -> float:
        mark = item.get_closest_marker("timeout")
        return float(mark.args[0]) if mark is not None and mark.args else 0.0

    items.sort(key=limit, reverse=True)  # stable: tests of one module stay together


@pytest.fixture(autouse=True, scope="session")
def _home(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["ABYSSAL_HOME"] = str(tmp_path_factory.mktemp("home"))
