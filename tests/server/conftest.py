"""A scripted server for each module of tests, and clients that are closed behind each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.server.serving import Scripted, script, serving


@pytest.fixture(scope="module")
def scripted() -> Scripted:
    """Calls the tool, then says what it returned."""
    return Scripted(script)


@pytest.fixture(scope="module")
def url(scripted: Scripted) -> Iterator[str]:
    """A server around it."""
    with serving(scripted) as address:
        yield address


@pytest.fixture(autouse=True)
def _clients_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """They keep connections open until they are collected, which pytest takes for a leak."""
    made: list[Any] = []
    for kind in (openai.OpenAI, anthropic.Anthropic):

        def begin(self: Any, *args: Any, _begin: Any = kind.__init__, **more: Any) -> None:
            _begin(self, *args, **more)
            made.append(self)

        monkeypatch.setattr(kind, "__init__", begin)
    yield
    for client in made:
        client.close()
