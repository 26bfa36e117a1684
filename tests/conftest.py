"""The tests keep their caches away from those of the user who runs them."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def _home(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["ABYSSAL_HOME"] = str(tmp_path_factory.mktemp("home"))
