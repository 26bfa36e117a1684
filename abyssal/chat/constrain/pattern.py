"""Regular expressions of JSON schemas as llguidance has them, which knows neither search nor anchors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from abyssal.chat.constrain.spelling import BAR, FREE, hexed

MOST_DEPTH = 48  # of groups in groups
MOST_REPEATS = 100_000  # of a part of a pattern
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = "[0-9A-Za-z]([0-9A-Za-z\\x{2d}]{0,61}[0-9A-Za-z])?"
_DAYS = "0[1-9]|[12][0-9]"
_DAY = f"[0-9]{{4}}-((0[13578]|1[02])-({_DAYS}|3[01])|(0[469]|11)-({_DAYS}|30)|02-({_DAYS}))"
_TIME = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\x{2e}[0-9]{1,9})?(Z|[+\\x{2d}]([01][0-9]|2[0-3]):[0-5][0-9])"
_WORD = "[0-9A-Fa-f]{1,4}"
_LOCAL = "[0-9A-Za-z_+\\x{2d}]+"
FORMATS = {  # with the lengths that they have
    "date": (_DAY, 10, 10),
    "time": (_TIME, 9, 24),
    "date-time": (f"{_DAY}T{_TIME}", 20, 35),
    "duration": ("P([0-9]+W|([0-9]+Y)?([0-9]+M)?[0-9]+D(T[0-9]+H)?|T[0-9]+[HMS])", 3, math.inf),
    "uuid": ("[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", 36, 36),
    "ipv4": (f"{_BYTE}(\\x{{2e}}{_BYTE}){{3}}", 7, 15),
    "ipv6": (
        "|".join(
            [f"({_WORD}:){{7}}{_WORD}", f"({_WORD}:){{1,7}}:", f":(:{_WORD}){{1,7}}"]
            + [f"({_WORD}:){{1,{7 - n}}}(:{_WORD}){{1,{n}}}" for n in range(1, 7)]
        ),
        3,
        39,
    ),
    "hostname": (f"{_LABEL}(\\x{{2e}}{_LABEL}){{0,7}}", 1, math.inf),
    "email": (f"{_LOCAL}(\\x{{2e}}{_LOCAL})*@{_LABEL}(\\x{{2e}}{_LABEL}){{0,7}}", 3, math.inf),
    "uri": ("[A-Za-z][0-9A-Za-z+\\x{2e}\\x{2d}]*:[0-9A-Za-z!#-&(-\\x{2f}:;=?@_~]+", 3, math.inf),
}


@dataclass(frozen=True)
class Expression:
    """A regular expression of llguidance's for whole texts, and how long these are."""

    text: str
    least: int = 0
    most: float = math.inf

    def then(self, other: Expression) -> Expression:
        """One text behind another."""
        return Expression(self.text + other.text, self.least + other.least, self.most + other.most)

    def times(self, least: int, most: float, sign: str) -> Expression:
        """Several texts."""
        longest = 0 if 0 in (self.most, most) else self.most * most
        return Expression(f"({self.text}{sign})", self.least * least, longest)


def _either(ways: Sequence[Expression]) -> Expression:
    text = "|".join(way.text for way in ways)
    return Expression(f"({text})", min(way.least for way in ways), max(way.most for way in ways))


def expression_of(pattern: Any) -> Expression | None:
    """An expression for each text in which a schema's pattern is found; None if there is none.

    The pattern is ECMA-262's. Lookarounds, back references, word boundaries and anchors within a pattern have no
    counterpart. None of the texts has a bar, so that it needs no other expression beside it to be spared.
    """
    if not isinstance(pattern, str):
        return None
    reader = _Pattern(pattern)
    try:
        found = reader.whole()
    except _UnknownError:
        return None
    return found if reader.at == len(pattern) else None


class _UnknownError(Exception):
    """A pattern that has no counterpart."""


_CLASSES = {
    "d": "0-9",
    "D": "\\x{0}-\\x{2f}\\x{3a}-\\x{ff5b}\\x{ff5d}-\\x{10ffff}",
    "w": "0-9A-Za-z_",
    "W": "\\x{0}-\\x{2f}\\x{3a}-\\x{40}\\x{5b}-\\x{5e}\\x{60}\\x{7b}-\\x{ff5b}\\x{ff5d}-\\x{10ffff}",
    "s": "\\x{9}-\\x{d}\\x{20}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}"
    "\\x{3000}\\x{feff}",
    "S": "\\x{0}-\\x{8}\\x{e}-\\x{1f}\\x{21}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}\\x{200b}-\\x{2027}"
    "\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}\\x{3001}-\\x{fefe}\\x{ff00}-\\x{ff5b}\\x{ff5d}-\\x{10ffff}",
}
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_COUNTS: dict[str, tuple[int, float]] = {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}
_ANYTHING = Expression(f"{FREE}*")
_NOTHING = Expression("", 0, 0)
_HEX = frozenset("0123456789abcdefABCDEF")


def _range(low: str, high: str) -> str:
    """The characters of a class from one to another, but the bar."""
    if low <= BAR <= high:
        parts = [(low, chr(ord(BAR) - 1)), (chr(ord(BAR) + 1), high)]
        return "".join(_range(first, last) for first, last in parts if first <= last)
    return f"{hexed(low)}-{hexed(high)}"


class _Pattern:
    """Reads a pattern from `at` on."""

    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0

    def _next(self, *expected: str) -> bool:
        """Step over one of these, if one comes."""
        for word in expected:
            if self.text.startswith(word, self.at):
                self.at += len(word)
                return True
        return False

    def _take(self) -> str:
        if self.at >= len(self.text):
            raise _UnknownError
        self.at += 1
        return self.text[self.at - 1]

    def whole(self) -> Expression:
        """The alternatives, each found anywhere unless anchored."""
        ways = []
        while True:
            begin = _NOTHING if self._next("^") else _ANYTHING
            body = self._sequence()
            ways.append(begin.then(body).then(_NOTHING if self._next("$") else _ANYTHING))
            if not self._next("|"):
                return _either(ways)

    def _sequence(self) -> Expression:
        found = _NOTHING
        while self.at < len(self.text) and self.text[self.at] not in "|)$":
            found = found.then(self._quantified())
        return found

    def _quantified(self) -> Expression:
        atom = self._atom()
        if self._next("*", "+", "?"):
            sign = self.text[self.at - 1]
            atom = atom.times(*_COUNTS[sign], sign)
        elif self._next("{"):
            count, closed, _ = self.text[self.at :].partition("}")
            least, comma, most = count.partition(",")
            numbers = [number for number in (least, most) if number]
            if not closed or not least or not all(n.isascii() and n.isdecimal() and len(n) < 9 for n in numbers):
                raise _UnknownError
            if any(int(number) > MOST_REPEATS for number in numbers) or (most and int(most) < int(least)):
                raise _UnknownError
            top = int(most) if most else math.inf if comma else int(least)
            atom = atom.times(int(least), top, f"{{{count}}}")
            self.at += len(count) + 1
        else:
            return atom
        self._next("?")  # how much it prefers to match does not matter
        if self.at < len(self.text) and self.text[self.at] in "*+?{":
            raise _UnknownError
        return atom

    def _atom(self) -> Expression:
        char = self._take()
        if char == "(":
            return self._group()
        if char == "[":
            return Expression(self._class(), 1, 1)
        if char == ".":
            return Expression("[^\\x{a}\\x{d}\\x{2028}\\x{2029}\\x{ff5c}]", 1, 1)
        if char in "^*+?{":
            raise _UnknownError
        member = self._member(char)
        if member == BAR:
            raise _UnknownError
        return Expression(f"[{member}]" if len(member) > 1 else hexed(member), 1, 1)

    def _group(self) -> Expression:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise _UnknownError
        if self._next("?") and not self._next(":"):
            if not self._next("<", "P<") or self._next("=", "!"):
                raise _UnknownError
            while self._take() != ">":
                pass
        ways = [self._sequence()]
        while self._next("|"):
            ways.append(self._sequence())
        if not self._next(")"):
            raise _UnknownError
        self.depth -= 1
        return _either(ways)

    def _class(self) -> str:
        parts: list[str] = []
        negated = self._next("^")
        if self._next("]"):
            if negated:
                return FREE
            raise _UnknownError
        while not self._next("]"):
            low = self._member(self._take(), inside=True)
            if len(low) > 1:  # a class of its own
                parts.append(low)
            elif self.text[self.at : self.at + 1] == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self._member(self._take(), inside=True)
                if len(high) > 1 or high < low:
                    raise _UnknownError
                parts.append(_range(low, high))
            else:
                parts.append(_range(low, low))
        if negated:
            return f"[^{''.join(parts)}{hexed(BAR)}]"
        if not any(parts):
            raise _UnknownError
        return f"[{''.join(parts)}]"

    def _member(self, char: str, inside: bool = False) -> str:
        """A character, or the ranges of a class that has a name."""
        if char == "\\":
            char = self._take()
            if char in _CLASSES:
                return _CLASSES[char]
            if char in "xu":
                char = self._code(char)
            elif char in _CONTROLS:
                char = _CONTROLS[char]
            elif char == "b" and inside:
                char = "\b"
            elif char.isalnum():  # back references, boundaries, properties
                raise _UnknownError
        if 0xD800 <= ord(char) < 0xE000:
            raise _UnknownError
        return char

    def _code(self, kind: str) -> str:
        """A character by its number; above U+FFFF ECMA-262 writes two halves."""
        if kind == "u" and self._next("{"):
            digits, closed, _ = self.text[self.at :].partition("}")
            self.at += len(digits) + 1
            if not closed or not 0 < len(digits) < 7 or not _HEX.issuperset(digits) or int(digits, 16) > 0x10FFFF:
                raise _UnknownError
            return chr(int(digits, 16))
        code = self._digits(2 if kind == "x" else 4)
        if 0xD800 <= code < 0xDC00 and self._next("\\u"):
            low = self._digits(4)
            if not 0xDC00 <= low < 0xE000:
                raise _UnknownError
            code = 0x10000 + ((code - 0xD800) << 10) + low - 0xDC00
        return chr(code)

    def _digits(self, count: int) -> int:
        digits = self.text[self.at : self.at + count]
        if len(digits) < count or not _HEX.issuperset(digits):
            raise _UnknownError
        self.at += count
        return int(digits, 16)
