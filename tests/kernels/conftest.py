"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from abyssal.kernels.choice import choice, forced


@pytest.fixture
def native_runs() -> Iterator[None]:
    """Native kernels run, also where the environment asks for the reference."""
    supported = choice().supported
    with forced(supported[0] if supported else "reference"):
        yield
