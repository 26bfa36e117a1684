"""Conversations with tools: one is needed, none fits, two after each other, two at once, or nothing but talk.

Every argument stands in the request or in an earlier result, letter by letter. Optional parameters that nobody
mentioned are left out. Wrong choices lie near: the same object with another action, the same action upon another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from abyssal.train.data.example import MODES, Example, Message, ThinkingMode, assistant, user
from abyssal.train.data.phrases import capitalised, fill, phrases
from abyssal.train.data.pools import Split, pick, pick_some
from abyssal.train.data.tools import Parameter, Tool, make_object, make_tool, parameter_for
from abyssal.train.data.values import as_text, make_code, make_value, table

KINDS = ("single", "none_fits", "two_steps", "parallel", "talk")
WEIGHTS = (0.42, 0.18, 0.22, 0.08, 0.1)
FAILS = 0.08  # of the calls
SECOND_REQUEST = 0.2  # of the conversations with one call go on
FURTHER = {"single": 0.6, "none_fits": 0.2, "parallel": 0.1, "talk": 0.1}  # kinds of requests that come later
Call = dict[str, Any]


@dataclass(frozen=True)
class ToolUse:
    """The generator.

    Args:
        split: part of the pools: tools of one part never occur in the other.
        offered: how many tools are offered, both ends included.
        modes: thinking modes to choose from.
        requests: how many a conversation has at least, both ends included. With one alone, most of what is read are
            schemas; with several, more of it is learnt from.
    """

    split: Split = "train"
    offered: tuple[int, int] = (1, 6)
    modes: Sequence[ThinkingMode] = MODES
    requests: tuple[int, int] = (1, 1)

    def generate(
        self, rng: np.random.Generator, *, kind: str | None = None, mode: ThinkingMode | None = None
    ) -> Example:
        """A conversation; `meta["calls"]` holds the calls of each assistant turn, in order.

        Args:
            rng: the only source of chance.
            kind: one of `KINDS`.
            mode: how much is thought; otherwise any of the generator's.
        """
        chosen = kind if kind is not None else KINDS[int(rng.choice(len(KINDS), p=WEIGHTS))]
        chosen_mode = mode if mode is not None else pick(rng, self.modes)
        talk = _Talk(rng, self.split, chosen_mode)
        if rng.random() < 0.4:
            talk.messages.append({"role": "system", "content": pick(rng, phrases("systems"))})
        if chosen == "two_steps":
            first, second, needed = self._pair(rng)
            talk.tools = self._offer(rng, [first, second], first)
            talk.two_steps(first, second, needed)
        else:
            tool = make_tool(rng, self.split)
            if chosen == "parallel":
                while not _countable(tool):
                    tool = make_tool(rng, self.split)
            wanted = [] if chosen == "none_fits" else [tool]
            talk.tools = self._offer(rng, wanted, tool)
            if chosen == "single":
                talk.single(tool)
                if rng.random() < SECOND_REQUEST:
                    talk.single(pick(rng, talk.tools))
            elif chosen == "none_fits":
                talk.none_fits(tool)
            elif chosen == "parallel":
                talk.parallel(tool)
            else:
                talk.small_talk()
        for _ in range(1, int(rng.integers(self.requests[0], self.requests[1] + 1))):
            self._go_on(rng, talk)
        tools = [tool.to_json() for tool in talk.tools]
        return Example(talk.messages, "tool_use", chosen_mode, tools, source=chosen, meta={"calls": talk.calls})

    def _go_on(self, rng: np.random.Generator, talk: _Talk) -> None:
        """One more request, with the tools that are there."""
        kind = list(FURTHER)[int(rng.choice(len(FURTHER), p=list(FURTHER.values())))]
        countable = [tool for tool in talk.tools if _countable(tool)]
        if kind == "none_fits":
            talk.none_fits(self._other(rng, talk.tools, pick(rng, talk.tools)))
        elif kind == "talk":
            talk.small_talk()
        elif kind == "parallel" and countable:
            talk.parallel(pick(rng, countable))
        else:
            talk.single(pick(rng, talk.tools))

    def _other(self, rng: np.random.Generator, tools: Sequence[Tool], near: Tool) -> Tool:
        """A tool that does what none of these does, often with the object or the action of `near`."""
        while True:
            chance = rng.random()
            if chance < 0.3:
                tool = make_tool(rng, self.split, of=near.object)
            elif chance < 0.6:
                tool = make_tool(rng, self.split, kind=near.kind)
            else:
                tool = make_tool(rng, self.split)
            if all((tool.group, tool.object) != (t.group, t.object) and tool.name != t.name for t in tools):
                return tool

    def _offer(self, rng: np.random.Generator, wanted: list[Tool], near: Tool) -> list[Tool]:
        """The wanted tools among others, none of which does what they do."""
        many = max(int(rng.integers(self.offered[0], self.offered[1] + 1)), len(wanted), 1)
        offered = list(wanted)
        while len(offered) < many:
            offered.append(self._other(rng, [*wanted, near, *offered], near))
        return pick_some(rng, offered, len(offered))

    def _pair(self, rng: np.random.Generator) -> tuple[Tool, Tool, Parameter]:
        """A tool that reads something, and one that needs what it returns."""
        first = make_tool(rng, self.split, kind=pick(rng, ("lookup", "search")))
        kinds = [kind for kind, row in table("tool_kinds").items() if row["group"] not in ("read", "make")]
        kind = pick(rng, kinds)
        if rng.random() < 0.5:
            name = f"{first.object.replace(' ', '_')}_id"
            needed = parameter_for(rng, name, "code", f"Id of the {first.object}.")
            return first, make_tool(rng, self.split, kind=kind, of=first.object, given=[needed]), needed
        name, value = pick(rng, list(table("results").items()))
        needed = parameter_for(rng, name, _open(value), pick(rng, (f"The {name}.", f"Value of the {name}.")))
        other = make_object(rng, self.split)
        while other == first.object:
            other = make_object(rng, self.split)
        return first, make_tool(rng, self.split, kind=pick(rng, (kind, "create")), of=other, given=[needed]), needed


@dataclass
class _Talk:
    """A conversation while it is made."""

    rng: np.random.Generator
    split: Split
    mode: ThinkingMode
    tools: list[Tool] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)

    def single(self, tool: Tool) -> None:
        arguments, told = self._arguments(tool)
        self._ask(f"{tool.action(self.rng)}{told}")
        self._call([(tool, arguments)])
        self._finish(tool, self._result(tool))

    def none_fits(self, tool: Tool) -> None:
        _, told = self._arguments(tool)
        action = tool.action(self.rng)
        self._ask(f"{action}{told}")
        thought = self._survey() + f"The user wants to {action}. None of the tools does that, so I call none."
        self._answer(fill(self.rng, self.split, pick(self.rng, phrases("none_fits")), action=action), thought)

    def small_talk(self) -> None:
        said, reply = pick(self.rng, phrases("small_talk")).split(" | ")
        self.messages.append(user(said))
        self._answer(reply, self._survey() + "This needs no tool. I simply answer.")

    def parallel(self, tool: Tool) -> None:
        """The same tool for two values of one parameter."""
        twice = pick(self.rng, [p for p in tool.parameters if _repeats(p)])
        arguments, told = self._arguments(tool, without=twice)
        one = twice.draw(self.rng, self.split)
        two = one
        while two == one:
            two = twice.draw(self.rng, self.split)
        self._ask(f"{tool.action(self.rng)} for the {twice.label} {one} and also for the {twice.label} {two}{told}")
        both = [_in_order(tool, {**arguments, twice.name: value}) for value in (one, two)]
        self._call([(tool, arguments) for arguments in both])
        results = [self._result(tool, fails=False) for _ in both]
        self._results(results)
        texts = [f"For {value}, {_facts(result)}." for value, result in zip((one, two), results, strict=True)]
        self._answer(" ".join(texts), "Both results are there. I tell them one after the other.")

    def two_steps(self, first: Tool, second: Tool, needed: Parameter) -> None:
        """The second call needs what the first returned."""
        arguments, told = self._arguments(first)
        by_id = second.object == first.object
        rest, told_rest = self._arguments(second, without=needed)
        action = second.action(self.rng, it=by_id)
        source = "" if by_id else f" with the {needed.label} that you get"
        asked = f"{first.action(self.rng)}{told}, then {action}{source}{told_rest}"
        self._ask(asked)
        self._call([(first, arguments)], more=f"First {first.name}, then {second.name} with the {needed.label}.")
        found = self._result(first, fails=False)
        value = make_code(self.rng, self.split) if by_id else make_value(self.rng, self.split, needed.value)
        found = {**found, needed.name: value}
        self._results([{key: found[key] for key in pick_some(self.rng, list(found), len(found))}])
        whole = _in_order(second, {**rest, needed.name: value})
        self._call([(second, whole)], more=f"The {needed.label} is {as_text(value)}.")
        self._finish(second, self._result(second))

    def _ask(self, wish: str) -> None:
        frame = pick(self.rng, phrases("requests"))
        text = frame.replace("{wish}", wish)
        self.messages.append(user(capitalised(text)))

    def _arguments(self, tool: Tool, without: Parameter | None = None) -> tuple[dict[str, Any], str]:
        """Values in the order of the schema, and the words that give them, in any order."""
        arguments = {}
        told = []
        for parameter in tool.parameters:
            if parameter is not without and (parameter.required or self.rng.random() < 0.5):
                value = parameter.draw(self.rng, self.split)
                arguments[parameter.name] = value
                told.append(parameter.phrase(self.rng, value))
        separator = pick(self.rng, (" ", ", "))
        return arguments, "".join(f"{separator}{words}" for words in pick_some(self.rng, told, len(told)))

    def _survey(self) -> str:
        """Max looks at every tool before it chooses."""
        if self.mode != "think-max":
            return ""
        seen = [f"{tool.name}: {tool.description}" for tool in self.tools]
        return "Let me look at the tools.\n" + "\n".join(seen) + "\n"

    def _call(self, calls: list[tuple[Tool, dict[str, Any]]], more: str = "") -> None:
        numbers = range(sum(map(len, self.calls)), sum(map(len, self.calls)) + len(calls))
        self.calls.append([{"name": tool.name, "arguments": arguments} for tool, arguments in calls])
        wire = [
            {
                "id": f"call_{number}",
                "type": "function",
                "function": {"name": tool.name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            for number, (tool, arguments) in zip(numbers, calls, strict=True)
        ]
        first = not self.messages or self.messages[-1]["role"] == "user"
        thought = self._survey() if first else ""
        thought += " ".join(filter(None, [more, f"I call {calls[0][0].name}."]))
        if self.mode == "think-max":
            thought += "".join(self._checked(tool, arguments) for tool, arguments in calls)
        content = pick(self.rng, phrases("before_calls")) if self.rng.random() < 0.2 else ""
        self.messages.append(assistant(content, thought if self.mode != "non-think" else "", wire))

    def _checked(self, tool: Tool, arguments: dict[str, Any]) -> str:
        lines = [f"\n{p.name} = {as_text(arguments[p.name])}" for p in tool.parameters if p.name in arguments]
        left_out = [p.name for p in tool.parameters if p.name not in arguments]
        if left_out:
            lines.append(f"\nNot asked for: {', '.join(left_out)}.")
        return "".join(lines) or "\nIt needs nothing."

    def _result(self, tool: Tool, fails: bool | None = None) -> dict[str, Any]:
        if fails if fails is not None else self.rng.random() < FAILS:
            return {"error": pick(self.rng, phrases("failures"))}
        if "done" in table("tool_kinds")[tool.kind]:
            done: dict[str, Any] = {"ok": True}
            if self.rng.random() < 0.5:
                done["id"] = make_code(self.rng, self.split)
            return done
        names = pick_some(self.rng, list(table("results")), int(self.rng.integers(1, 4)))
        return {name: make_value(self.rng, self.split, table("results")[name]) for name in names}

    def _results(self, results: list[dict[str, Any]]) -> None:
        total = sum(map(len, self.calls))
        for number, result in zip(range(total - len(results), total), results, strict=True):
            content = json.dumps(result, ensure_ascii=False)
            self.messages.append({"role": "tool", "tool_call_id": f"call_{number}", "content": content})

    def _finish(self, tool: Tool, result: dict[str, Any]) -> None:
        """The result, and an answer that says what it says."""
        self._results([result])
        done = table("tool_kinds")[tool.kind].get("done")
        if "error" in result:
            answer = f"That did not work: {result['error']}."
            thought = "The tool reports an error. I say so."
        elif done is not None:
            answer = f"The {tool.object} has been {done}."
            if "id" in result:
                answer += f" Its id is {result['id']}."
            thought = "It worked."
        else:
            opening = pick(self.rng, (f"Here is the {tool.object}:", f"The {tool.object} is here:", "I found this:"))
            answer = f"{opening} {_facts(result)}."
            thought = "The result has what was asked for."
        self._answer(answer, thought)

    def _answer(self, content: str, thought: str) -> None:
        self.calls.append([])
        self.messages.append(assistant(content, thought if self.mode != "non-think" else ""))


def _in_order(tool: Tool, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments in the order of the schema."""
    return {p.name: arguments[p.name] for p in tool.parameters if p.name in arguments}


def _facts(result: dict[str, Any]) -> str:
    told = ["it worked" if name == "ok" else f"the {name} is {as_text(value)}" for name, value in result.items()]
    return " and ".join(filter(None, [", ".join(told[:-1]), told[-1]]))


def _repeats(parameter: Parameter) -> bool:
    """Whether a request can name two values of it."""
    return parameter.value.startswith(("pool:", "int:")) or parameter.value in ("date", "code", "full_name")


def _countable(tool: Tool) -> bool:
    return any(map(_repeats, tool.parameters))


def _open(value: str) -> str:
    """A field of a result as a parameter: any text where the result has a choice."""
    return "pool:adjectives" if value.startswith("enum") else value
