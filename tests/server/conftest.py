"""The vendors' clients keep connections open until they are collected, which pytest takes for a leak."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest


@pytest.fixture(autouse=True)
def _clients_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made: list[Any] = []
    for kind in (openai.OpenAI, anthropic.Anthropic):

        def begin(self: Any, *args: Any, _begin: Any = kind.__init__, **more: Any) -> None:
            _begin(self, *args, **more)
            made.append(self)

        monkeypatch.setattr(kind, "__init__", begin)
    yield
    for client in made:
        client.close()
