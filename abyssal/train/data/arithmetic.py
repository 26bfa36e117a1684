"""Arithmetic of several steps: at once, with short working, or with long working that is checked.

Non-think gives the answer alone. High writes one line a step. Max does each step digit by digit or in parts, and
turns it round to check it. So the modes cost different numbers of tokens, and what they cost buys accuracy.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from abyssal.train.data.example import MODES, Example, ThinkingMode, assistant, user
from abyssal.train.data.phrases import fill, phrases
from abyssal.train.data.pools import Split, draw, pick, pool

KINDS = ("sum", "story")
LARGEST = 99_999
IRREGULAR = {"knife": "knives", "leaf": "leaves", "shelf": "shelves", "scarf": "scarves", "radio": "radios"}
SIGNS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}


@dataclass(frozen=True)
class Step:
    """`left sign right = result`."""

    left: int
    sign: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}"


@dataclass(frozen=True)
class Arithmetic:
    """The generator.

    Args:
        split: part that the problems belong to, by their digest.
        operations: of a sum, both ends included; stories have two or three.
        modes: thinking modes to choose from.
    """

    split: Split = "train"
    operations: tuple[int, int] = (2, 4)
    modes: Sequence[ThinkingMode] = MODES

    def generate(
        self, rng: np.random.Generator, *, kind: str | None = None, mode: ThinkingMode | None = None
    ) -> Example:
        """A problem and its answer, whose last line is "The answer is: N".

        Args:
            rng: the only source of chance.
            kind: one of `KINDS`.
            mode: how it is worked out; otherwise any of the generator's.
        """
        chosen = kind if kind is not None else pick(rng, KINDS)
        chosen_mode = mode if mode is not None else pick(rng, self.modes)
        question, expression = self._story(rng) if chosen == "story" else self._sum(rng)
        steps = steps_of(expression)
        reasoning = {"non-think": "", "think-high": short_working(steps), "think-max": long_working(steps)}[chosen_mode]
        messages = [user(question), assistant(f"The answer is: {steps[-1].result}", reasoning)]
        meta = {"targets": [str(steps[-1].result)], "expression": expression, "operations": len(steps)}
        return Example(messages, "arithmetic", chosen_mode, source=chosen, meta=meta)

    def _sum(self, rng: np.random.Generator) -> tuple[str, str]:
        def one() -> str:
            terms = [str(_number(rng))]
            for _ in range(int(rng.integers(self.operations[0], self.operations[1] + 1))):
                sign = pick(rng, ("+", "-", "*", "+", "-"))
                terms += [sign, str(int(rng.integers(2, 13)) if sign == "*" else _number(rng))]
            if len(terms) > 3 and rng.random() < 0.3:
                at = 2 * int(rng.integers(0, len(terms) // 2 - 1))
                terms[at], terms[at + 2] = f"({terms[at]}", f"{terms[at + 2]})"
            return " ".join(terms)

        expression = draw(self.split, lambda: _until_good(one))
        return pick(rng, phrases("sums")).replace("{sum}", expression), expression

    def _story(self, rng: np.random.Generator) -> tuple[str, str]:
        text, _, formula = pick(rng, phrases("word_problems")).partition(" | ")
        numbers: dict[str, str] = {}

        def one() -> str:
            for letter in "npqr":
                numbers[letter] = str(int(rng.integers(11, 100) if rng.random() < 0.5 else rng.integers(2, 20)))
            return re.sub("[npqr]", lambda match: numbers[match.group()], formula)

        expression = draw(self.split, lambda: _until_good(one))
        names = {name: pick(rng, pool(name, self.split)) for name in ("first_names", "roles", "places", "cities")}
        things = plural(pick(rng, pool("things", self.split)))
        return fill(rng, self.split, text, things=things, **names, **numbers), expression


def steps_of(expression: str) -> list[Step]:
    """The operations of an expression of whole numbers, in the order in which they are done.

    Raises:
        ValueError: it has something else than numbers, "+", "-", "*" and brackets.
    """
    steps: list[Step] = []

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if not isinstance(node, ast.BinOp) or type(node.op) not in SIGNS:
            raise ValueError(f"{expression!r} is no sum of whole numbers")
        left, right = value(node.left), value(node.right)
        sign = SIGNS[type(node.op)]
        result = left + right if sign == "+" else left - right if sign == "-" else left * right
        steps.append(Step(left, sign, right, result))
        return result

    value(ast.parse(expression, mode="eval").body)
    return steps


def short_working(steps: Sequence[Step]) -> str:
    """One line a step."""
    return "\n".join(map(str, steps))


def long_working(steps: Sequence[Step]) -> str:
    """Every step in parts, then every step turned round."""
    lines = []
    for number, step in enumerate(steps, start=1):
        lines.append(f"Step {number}: {step.left} {step.sign} {step.right}")
        lines += {"+": _added, "-": _taken, "*": _multiplied}[step.sign](step)
        lines.append(f"So {step}")
    lines.append("Check:")
    for step in steps:
        if step.sign == "+":
            lines.append(f"{step.result} - {step.right} = {step.left}, right.")
        elif step.sign == "-":
            lines.append(f"{step.result} + {step.right} = {step.left}, right.")
        else:
            lines.append(f"{step.right} * {step.left} = {step.result}, right.")
    return "\n".join(lines)


def plural(thing: str) -> str:
    """More than one of a word of things.txt."""
    if thing in IRREGULAR:
        return IRREGULAR[thing]
    if thing.endswith(("ch", "sh", "x", "s", "o")):
        return f"{thing}es"
    if thing.endswith("y") and thing[-2] not in "aeiou":
        return f"{thing[:-1]}ies"
    return f"{thing}s"


def _added(step: Step) -> list[str]:
    """Digit by digit from the right, with what is carried."""
    lines = []
    carry = 0
    left, right = str(step.left)[::-1], str(step.right)[::-1]
    for place in range(max(len(left), len(right))):
        one, two = (int(digits[place]) if place < len(digits) else 0 for digits in (left, right))
        total = one + two + carry
        with_carry = f" + {carry}" if carry else ""
        lines.append(f"{one} + {two}{with_carry} = {total}, write {total % 10}, carry {total // 10}")
        carry = total // 10
    return lines


def _taken(step: Step) -> list[str]:
    """The parts of the second number, one after the other."""
    lines = []
    left = step.left
    for part in _parts(step.right):
        lines.append(f"{left} - {part} = {left - part}")
        left -= part
    return lines


def _multiplied(step: Step) -> list[str]:
    """The first number times the parts of the second, or the other way round if that has fewer parts."""
    whole, split = (step.left, step.right) if step.left < step.right else (step.right, step.left)
    lines = []
    total = 0
    for part in _parts(split):
        lines.append(f"{part} * {whole} = {part * whole}")
        if total:
            lines.append(f"{total} + {part * whole} = {total + part * whole}")
        total += part * whole
    return lines


def _parts(number: int) -> list[int]:
    """345 is 300, 40 and 5."""
    digits = str(number)
    parts = [int(digit) * 10 ** (len(digits) - 1 - place) for place, digit in enumerate(digits)]
    return [part for part in parts if part] or [0]


def _number(rng: np.random.Generator) -> int:
    return int(rng.integers(2, 100)) if rng.random() < 0.8 else int(rng.integers(100, 1000))


def _until_good(make: Callable[[], str]) -> str:
    """Until nothing falls below zero or grows too large on the way."""
    while True:
        expression = make()
        if all(0 <= step.result <= LARGEST for step in steps_of(expression)):
            return expression
