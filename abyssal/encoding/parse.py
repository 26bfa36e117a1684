"""A completion back to a message, piece by piece and total: no text of a model raises (encoding.md 5).

What the parser says does not depend on how the pieces were cut: it decides at a place of the text only when
nothing that may follow can change the decision, and holds back what is undecided.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from abyssal.encoding.dsml import BEFORE_CALLS, as_json
from abyssal.encoding.literals import DSML, EOS, SPECIAL_TOKENS, THINK_END
from abyssal.encoding.messages import ToolCall

_MARK = re.escape(DSML)
_GAP = r"[ \t\r\n]{0,4}"  # blank space that near misses have inside a tag
_WRAPPER = re.compile(rf"<{_GAP}{_MARK}{_GAP}(tool_?calls?|function_calls){_GAP}>")
_WRAPPER_END = re.compile(rf"<{_GAP}/{_GAP}{_MARK}{_GAP}(tool_?calls?|function_calls){_GAP}>")
_INVOKE = re.compile(rf'<{_GAP}{_MARK}{_GAP}invoke{_GAP} name{_GAP}={_GAP}"([^"]*)"{_GAP}>')
_INVOKE_END = re.compile(rf"<{_GAP}/{_GAP}{_MARK}{_GAP}invoke{_GAP}>")
_PARAMETER = re.compile(
    rf'<{_GAP}{_MARK}{_GAP}parameter{_GAP} name{_GAP}={_GAP}"([^"]*)"'
    rf'(?:{_GAP} string{_GAP}={_GAP}"(true|false)")?{_GAP}>'
)
_PARAMETER_END = re.compile(rf"<{_GAP}/{_GAP}{_MARK}{_GAP}parameter{_GAP}>")
# the beginning of a tag of ours: what follows decides which
_TAG = re.compile(rf"<{_GAP}/?{_GAP}{_MARK}")
_TAG_BEGUN = re.compile(rf"<{_GAP}/?{_GAP}(?:{'|'.join(re.escape(DSML[:n]) for n in range(len(DSML), -1, -1))})\Z")
_BLANK = re.compile(r"[ \t\r\n]*")
_CLOSED_TAG = re.compile(r'(?:[^">]|"[^"]*")*+>')
LONGEST_MARK = 64  # characters of a closing tag or a special token with all its gaps
LONGEST_TAG = 2048  # a tag that has not closed by then is none
_TOKEN = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
_TOKEN_ENDS = tuple({token[-1] for token in SPECIAL_TOKENS})
_INTEREST = re.compile("[<`\\n｜]")  # what in content may be more than text
SLICE = 4096  # characters of a long piece that are looked at together
SHOWN = 100  # characters of a repair's detail
# DSML's mark stands inside tags; the others stand alone
_TOKENS = tuple(token for token in SPECIAL_TOKENS if token != DSML)


@dataclass(frozen=True)
class Reasoning:
    """Thinking."""

    text: str


@dataclass(frozen=True)
class Text:
    """Content."""

    text: str


@dataclass(frozen=True)
class Call:
    """A whole tool call: it closed, its tool is declared and its required arguments are there."""

    index: int
    name: str
    arguments: str


@dataclass(frozen=True)
class Repair:
    """Something that was not as the format has it, and what was done.

    Attributes:
        name: truncated_reasoning, incomplete_call, loose_call, repaired_argument, duplicate_parameter,
            rejected_call, leaked_token, or text_after_end.
        detail: what it was about.
    """

    name: str
    detail: str


@dataclass(frozen=True)
class End:
    """The completion is over; `complete` if it ended with its own end token."""

    complete: bool


Event = Reasoning | Text | Call | Repair | End


@dataclass
class Parsed:
    """A whole completion."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)
    complete: bool = False

    def message(self) -> dict[str, Any]:
        """The assistant message in OpenAI's form."""
        calls = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.tool_calls
        ]
        return {
            "role": "assistant",
            "content": self.content,
            "reasoning_content": self.reasoning,
            "tool_calls": calls,
        }


class Parser:
    """Events of one completion.

    Args:
        thinking: whether it begins with reasoning.
        tools: declared function objects; None accepts every name.
        allow_calls: False for tool_choice "none": calls are rejected.
    """

    def __init__(
        self, *, thinking: bool, tools: Iterable[Mapping[str, Any]] | None = None, allow_calls: bool = True
    ):
        self._tools = None if tools is None else {str(tool["name"]): tool for tool in tools}
        self._allow = allow_calls
        self._state = self._reasoning if thinking else self._content
        self._buffer = ""
        self._final = False
        self._events: list[Event] = []
        self._index = 0
        self._wrapped = False
        self._fence = ""  # the run of backticks that is open
        self._after = ""
        self._tail = ""  # the last of the content
        # of the call that is open: how far it is understood, how far it is searched, and what it has so far
        self._at = self._searched = 0
        self._parameters: list[tuple[str, str | None, str]] = []
        self._inside: re.Match[str] | None = None
        self._stray = False

    @property
    def thinking(self) -> bool:
        """Whether the next piece continues the reasoning."""
        return self._state == self._reasoning

    def feed(self, text: str) -> list[Event]:
        """What one more piece makes certain."""
        if len(text) <= SLICE:
            self._buffer += text
            return self._run()
        # each step cuts the buffer's beginning off, which is a copy of the rest: keep it short
        for at in range(0, len(text), SLICE):
            self._buffer += text[at : at + SLICE]
            self._consume()
        return self._run()

    def finish(self) -> list[Event]:
        """What is left when the model stopped without its end token (length), or after `End`."""
        self._final = True
        events = self._run()
        if self._after:
            events.append(Repair("text_after_end", self._after[:SHOWN]))
        if self._state != self._over:
            if self._state == self._reasoning:
                events.append(Repair("truncated_reasoning", "the reasoning was not closed"))
            self._state = self._over
            events.append(End(False))
        return events

    def _run(self) -> list[Event]:
        self._consume()
        events, self._events = self._events, []
        return _joined(events) if len(events) > 1 else events

    def _consume(self) -> None:
        while self._buffer and self._state():
            pass

    # states; each consumes from the buffer and says whether it could

    def _over(self) -> bool:
        if len(self._after) < SHOWN:
            self._after = (self._after + self._buffer).lstrip()
        self._buffer = ""
        return False

    def _reasoning(self) -> bool:
        at, token = self._next_token(SPECIAL_TOKENS)
        if token is None:
            return self._give(Reasoning, self._held(SPECIAL_TOKENS))
        self._emit(Reasoning, self._buffer[:at])
        self._buffer = self._buffer[at + len(token) :]
        if token == THINK_END:
            self._state = self._content
        elif token == EOS:
            self._events.append(Repair("truncated_reasoning", "the reasoning was not closed"))
            self._end()
        else:
            self._events.append(Repair("leaked_token", token))
        return True

    def _content(self) -> bool:
        """Plain text up to the next thing of interest."""
        found = _INTEREST.search(self._buffer)
        place = found.start() if found else len(self._buffer)
        if place:
            self._text(self._buffer[:place])
            self._buffer = self._buffer[place:]
            return True
        first = self._buffer[0]
        if first == "`":
            return self._backticks()
        if first == "\n":
            return self._newline()
        return self._mark()

    def _newline(self) -> bool:
        """Newlines before a block of calls belong to it; others are text."""
        run = len(self._buffer) - len(self._buffer.lstrip("\n"))
        behind = self._buffer[run:]
        if not behind and not self._final:
            return False
        if run >= 2 and len(self._fence) < 3:
            self._fence = ""  # inline code does not go over a blank line
        if behind and self._fence == "" and self._may_be_block(behind):
            tag = self._whole_tag(behind)
            if tag is None and not self._final:
                return False
            if tag is not None and self._opens(behind):
                kept = max(run - len(BEFORE_CALLS), 0)
                self._text("\n" * kept)
                self._buffer = behind
                return self._mark()
        self._text("\n" * run)
        self._buffer = behind
        return True

    def _backticks(self) -> bool:
        run = len(self._buffer) - len(self._buffer.lstrip("`"))
        if run == len(self._buffer) and not self._final:
            return False
        ticks = "`" * run
        if not self._fence:
            self._fence = ticks
        elif self._fence == ticks or (len(self._fence) >= 3 and run >= len(self._fence)):
            self._fence = ""
        self._text(ticks)
        self._buffer = self._buffer[run:]
        return True

    def _mark(self) -> bool:
        """A place where a special token or a tag may begin."""
        for token in _TOKENS:
            if self._buffer.startswith(token):
                self._buffer = self._buffer[len(token) :]
                if token == EOS:
                    self._end()
                else:
                    self._events.append(Repair("leaked_token", token))
                return True
        if not self._final and any(token.startswith(self._buffer) for token in (*_TOKENS, DSML)):
            return False
        if self._fence and _TAG.match(self._buffer):  # prose about the markup
            return self._pass(len(_TAG.match(self._buffer).group()), quoted=True)  # type: ignore[union-attr]
        if self._may_be_block(self._buffer):
            tag = self._whole_tag(self._buffer)
            if tag is None and not self._final:
                return False
            if tag is not None and self._opens(self._buffer):
                self._wrapped = _WRAPPER.match(self._buffer) is not None
                self._state = self._block
                return True
            if tag is not None and (_WRAPPER_END.match(tag) or _INVOKE_END.match(tag) or _PARAMETER_END.match(tag)):
                self._events.append(Repair("leaked_token", tag))
                self._buffer = self._buffer[len(tag) :]
                return True
        if self._buffer.startswith(DSML):
            if not self._fence:
                self._events.append(Repair("leaked_token", DSML))
                self._buffer = self._buffer[len(DSML) :]
                return True
            return self._pass(len(DSML), quoted=True)
        return self._pass(1)

    def _block(self) -> bool:
        """A block of calls, or a call without its wrapper; consumed call by call."""
        if self._wrapped:
            wrapper = _WRAPPER.match(self._buffer)
            assert wrapper is not None
            if wrapper.group() != f"<{DSML}tool_calls>":
                self._events.append(Repair("loose_call", wrapper.group()))
            self._buffer = self._buffer[wrapper.end() :]
        else:
            self._events.append(Repair("loose_call", "the block around the call is missing"))
        self._state = self._between
        return True

    def _between(self) -> bool:
        """Between calls of a block."""
        rest = self._buffer.lstrip(" \t\r\n")
        if not rest:
            if self._final:
                self._buffer = ""
            return False
        if rest.startswith(EOS):
            self._buffer = rest[len(EOS) :]
            if self._wrapped:
                self._events.append(Repair("loose_call", "the block of calls was not closed"))
            self._end()
            return True
        if self._may_be_block(rest) or any(token.startswith(rest) for token in _TOKENS):
            tag = self._whole_tag(rest)
            if tag is None and not self._final:
                return False
            end = _WRAPPER_END.match(rest)
            if end is not None and self._wrapped:
                self._buffer = rest[end.end() :]
                self._state, self._wrapped = self._content, False
                return True
            if _INVOKE.match(rest):
                self._buffer = rest
                self._state = self._call
                return True
            if tag is not None and self._wrapped:
                self._events.append(Repair("leaked_token", tag))
                self._buffer = rest[len(tag) :]
                return True
        # something else: the block is over
        self._state, self._wrapped = self._content, False
        return True

    def _call(self) -> bool:
        """One call, from its opening tag to its closing one; goes on where it had to wait."""
        opening = _INVOKE.match(self._buffer)
        assert opening is not None
        at = self._at = max(self._at, opening.end())
        self._searched = max(self._searched, at)
        while True:
            blank = _BLANK.match(self._buffer, at)
            begin = max(blank.end() if blank else at, self._searched if not self._inside else at)
            if not self._inside:
                found = _TAG.search(self._buffer, begin)
                over = self._buffer.find(EOS, begin)
                if found is None or 0 <= over < found.start():
                    return self._unfinished(over)
                self._stray |= found.start() > (blank.end() if blank else at)
                tag = self._whole_tag(self._buffer[found.start() : found.start() + LONGEST_TAG + len(EOS)])
                if tag is None:
                    return self._unfinished(over) if over >= 0 or self._final else False
                at = self._at = self._searched = found.start() + len(tag)
                if _INVOKE_END.fullmatch(tag):
                    break
                parameter = _PARAMETER.fullmatch(tag)
                if parameter is None:
                    self._stray = True
                    continue
                self._inside = parameter
            end = _PARAMETER_END.search(self._buffer, self._searched)
            over = self._buffer.find(EOS, self._searched)
            if end is None or 0 <= over < end.start():
                return self._unfinished(over)
            key, kind = self._inside.groups()
            self._parameters.append((key, kind, self._buffer[at : end.start()]))
            self._inside = None
            at = self._at = self._searched = end.end()
        raw, self._buffer = self._buffer[:at], self._buffer[at:]
        parameters, stray = self._parameters, self._stray
        self._leave_call(self._between)
        self._judge(opening.group(1), parameters, raw, stray)
        return True

    def _leave_call(self, state: Callable[[], bool]) -> None:
        self._at = self._searched = 0
        self._parameters, self._inside, self._stray = [], None, False
        self._state = state

    def _unfinished(self, over: int) -> bool:
        """A call that has not closed: wait, or drop it if nothing more can come."""
        if over < 0 and not self._final:
            # what was searched is not searched again, but for a tag that may have begun
            self._searched = max(self._searched, self._at, len(self._buffer) - LONGEST_MARK)
            return False
        end = over if over >= 0 else len(self._buffer)
        self._events.append(Repair("incomplete_call", self._buffer[:end]))
        self._buffer = self._buffer[end:]
        self._wrapped = False
        self._leave_call(self._content)
        return True

    def _judge(self, name: str, parameters: Sequence[tuple[str, str | None, str]], raw: str, stray: bool) -> None:
        """Decide whether a closed call is one."""
        values: dict[str, str] = {}
        repairs: list[Repair] = []
        schema = self._schema(name)
        for key, kind, value in parameters:
            if key in values:
                repairs.append(Repair("duplicate_parameter", f"{name}.{key}"))
            text = as_json(value)
            if kind == "true" or (kind is None and _type_of(schema, key) == "string"):
                values[key] = text
            elif _is_json(value):
                values[key] = value
            else:
                values[key] = text
                repairs.append(Repair("repaired_argument", f"{name}.{key} is no JSON: {value[:SHOWN]}"))
            if kind is None:
                repairs.append(Repair("repaired_argument", f"{name}.{key} does not say whether it is a string"))
        problem = None
        if not self._allow:
            problem = "tools are not to be used"
        elif self._tools is not None and name not in self._tools:
            problem = f"no tool {name!r} is declared"
        else:
            required = schema.get("required") if isinstance(schema, Mapping) else None
            missing = [key for key in required if key not in values] if isinstance(required, list) else []
            if missing:
                problem = f"{name} lacks {', '.join(map(str, missing))}"
        if problem is not None:
            self._events.append(Repair("rejected_call", problem))
            self._text(_TOKEN.sub("", raw))
            return
        if stray:
            repairs.append(Repair("loose_call", f"{name} has text between its parameters"))
        self._events += repairs
        arguments = "{" + ", ".join(f"{as_json(key)}: {value}" for key, value in values.items()) + "}"
        self._events.append(Call(self._index, name, arguments))
        self._index += 1

    def _schema(self, name: str) -> Any:
        tool = (self._tools or {}).get(name, {})
        return tool.get("parameters") or tool.get("input_schema") or {}

    # helpers

    def _end(self) -> None:
        self._events.append(End(True))
        self._state = self._over

    def _pass(self, count: int, quoted: bool = False) -> bool:
        self._text(self._buffer[:count], quoted)
        self._buffer = self._buffer[count:]
        return True

    def _text(self, text: str, quoted: bool = False) -> None:
        """Content; where what was taken out would join its neighbours into a special token, a space parts them."""
        if quoted:
            self._tail = ""
        else:
            joined = self._tail + text
            if any(end in text for end in _TOKEN_ENDS):  # else no token ends here
                found = _TOKEN.search(joined)
                while found is not None:
                    joined = joined[: found.end() - 1] + " " + joined[found.end() - 1 :]
                    found = _TOKEN.search(joined)
                text = joined[len(self._tail) :]
            self._tail = joined[-LONGEST_MARK:]
        self._emit(Text, text)

    def _emit(self, kind: type[Reasoning] | type[Text], text: str) -> None:
        if text:
            self._events.append(kind(text))

    def _give(self, kind: type[Reasoning] | type[Text], held: int) -> bool:
        free = len(self._buffer) - held
        self._emit(kind, self._buffer[:free])
        self._buffer = self._buffer[free:]
        return False

    def _next_token(self, tokens: Sequence[str]) -> tuple[int, str | None]:
        found = [(at, token) for token in tokens if (at := self._buffer.find(token)) >= 0]
        return min(found, default=(-1, None), key=lambda pair: (pair[0], -len(pair[1] or "")))

    def _held(self, tokens: Sequence[str]) -> int:
        """Characters at the end that may begin a token."""
        if self._final:
            return 0
        longest = max(map(len, tokens)) - 1
        for n in range(min(longest, len(self._buffer)), 0, -1):
            end = self._buffer[-n:]
            if any(token.startswith(end) for token in tokens):
                return n
        return 0

    def _may_be_block(self, text: str) -> bool:
        return _TAG.match(text) is not None or (not self._final and _TAG_BEGUN.match(text) is not None)

    def _whole_tag(self, text: str) -> str | None:
        """A tag up to the first closing bracket outside quotes, or None if that has not come.

        If it never comes (the answer ends, or the tag grows too long), the mark alone is the tag.
        """
        mark = _TAG.match(text)
        if mark is None:
            return None
        body = text[:LONGEST_TAG]
        over = body.find(EOS)
        body = body[:over] if over >= 0 else body
        found = _CLOSED_TAG.match(body, mark.end())
        if found is not None:
            return found.string[: found.end()]
        return mark.group() if over >= 0 or self._final or len(text) >= LONGEST_TAG else None

    @staticmethod
    def _opens(text: str) -> bool:
        return _WRAPPER.match(text) is not None or _INVOKE.match(text) is not None


def _joined(events: Sequence[Event]) -> list[Event]:
    """Texts that follow each other as one."""
    made: list[Event] = []
    for kind, found in groupby(events, key=type):
        if issubclass(kind, Reasoning | Text):
            made.append(kind("".join(event.text for event in found if isinstance(event, kind))))
        else:
            made += found
    return made


def _type_of(schema: Any, key: str) -> Any:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    found = properties.get(key) if isinstance(properties, Mapping) else None
    return found.get("type") if isinstance(found, Mapping) else None


def _is_json(text: str) -> bool:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


def parse(
    completion: str,
    *,
    thinking: bool,
    tools: Iterable[Mapping[str, Any]] | None = None,
    allow_calls: bool = True,
) -> Parsed:
    """A whole completion at once; see `Parser`."""
    parser = Parser(thinking=thinking, tools=tools, allow_calls=allow_calls)
    parsed = Parsed()
    for event in [*parser.feed(completion), *parser.finish()]:
        if isinstance(event, Text):
            parsed.content += event.text
        elif isinstance(event, Reasoning):
            parsed.reasoning += event.text
        elif isinstance(event, Call):
            parsed.tool_calls.append(ToolCall(event.name, event.arguments))
        elif isinstance(event, Repair):
            parsed.repairs.append(event)
        else:
            parsed.complete = event.complete
    return parsed
