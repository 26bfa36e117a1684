"""What generators give: conversations for SFT and passages for pre-training, as plain data (training.md 6)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from abyssal.base.errors import DataError
from abyssal.base.files import write_aside

ThinkingMode = Literal["non-think", "think-high", "think-max"]
MODES: tuple[ThinkingMode, ...] = ("non-think", "think-high", "think-max")
Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A conversation whose assistant turns are to be learnt.

    Attributes:
        messages: in OpenAI's form, with `reasoning_content` in the thinking modes.
        domain: which generator, "tool_use" and so on.
        thinking_mode: how it is to be rendered.
        tools: function tools in OpenAI's form.
        source: kind within the domain.
        id: stable name, given by whoever numbers the examples.
        meta: what an evaluation needs to score the last answer and to sort it; never rendered.
    """

    messages: list[Message]
    domain: str
    thinking_mode: ThinkingMode = "non-think"
    tools: list[dict[str, Any]] = field(default_factory=list)
    source: str = ""
    id: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object of one JSON line."""
        return {
            "messages": self.messages,
            "tools": self.tools,
            "thinking_mode": self.thinking_mode,
            "domain": self.domain,
            "source": self.source,
            "id": self.id,
            "meta": self.meta,
        }

    @classmethod
    def from_json(cls, data: Any) -> Example:
        """Read such an object; `meta` may be absent.

        Raises:
            DataError: a field is missing or unknown, or the mode is none of the three.
        """
        needed = {"messages", "tools", "thinking_mode", "domain", "source", "id"}
        if not isinstance(data, dict) or not needed <= data.keys() <= needed | {"meta"}:
            raise DataError(f"an example needs the fields {', '.join(sorted(needed))}, meta may follow: write it again")
        if data["thinking_mode"] not in MODES:
            raise DataError(f"thinking_mode is {data['thinking_mode']!r}: use one of {', '.join(MODES)}")
        return cls(**data)


@dataclass(frozen=True)
class Passage:
    """Running text for pre-training, of which some parts follow from what stands before.

    Attributes:
        text: the whole.
        answers: `(start, end)` in characters of the parts that follow: where skill is measured.
        domain: which generator.
        meta: what an evaluation needs to sort it.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    domain: str
    meta: dict[str, Any] = field(default_factory=dict)


def user(content: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": content}


def assistant(content: str, reasoning: str = "", calls: Iterable[Message] = ()) -> Message:
    """An answer, with reasoning and calls if there are any."""
    message: Message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls := list(calls):
        message["tool_calls"] = calls
    return message


def write_examples(path: Path | str, examples: Iterable[Example]) -> int:
    """Write JSON lines; their number.

    Raises:
        SaveError: the file system refused; the old file is unchanged.
    """
    count = 0
    with write_aside(path) as aside, open(aside, "w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(example.to_json(), ensure_ascii=False) + "\n")
            count += 1
    return count


def read_examples(path: Path | str) -> Iterator[Example]:
    """Read JSON lines, one at a time.

    Raises:
        DataError: the file is missing, or a line is no example; the line is named.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield Example.from_json(json.loads(line))
                except (ValueError, DataError) as error:
                    raise DataError(f"{path}, line {number}: {error}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
