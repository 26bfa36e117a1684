"""What a model may write freely, and how text stands in a grammar of llguidance's."""

from __future__ import annotations

import json
from collections.abc import Iterable

from abyssal.encoding.literals import DSML, EOS, SPECIAL_TOKENS

MOST_NAME = 1024  # characters of a name; the parser gives up on a tag of 2,048


def literal(text: str) -> str:
    """A string in Lark, which is one of JSON."""
    return json.dumps(text).replace("\x7f", "\\u007f")


def hexed(char: str) -> str:
    """A character in a regular expression."""
    return char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}"


BAR = "｜"
FREE = f"[^{hexed(BAR)}]"


def sized(least: int, most: int | None) -> str:
    """How often, in a regular expression."""
    return f"{{{least},{'' if most is None else most}}}"


def spared(words: Iterable[str]) -> str:
    """An expression for text in which nothing between two bars begins with one of the words."""

    def but(words: set[str]) -> str:
        heads = sorted({word[0] for word in words})
        ways = ["", f"[^{hexed(BAR)}{''.join(map(hexed, heads))}]{FREE}*"]
        for head in heads:
            rests = {word[1:] for word in words if word[0] == head}
            ways += [] if "" in rests else [hexed(head) + but(rests)]
        return f"({'|'.join(ways)})"

    return f"{FREE}*({hexed(BAR)}({but(set(words))}{hexed(BAR)})*{FREE}*)?"


CALL_TEXT = spared((DSML[1:5], EOS[2:6]))  # in a call, other tokens that are spelled out do no harm
CONTENT_TEXT = spared(token.split("｜")[1] for token in SPECIAL_TOKENS if "｜" in token)


def sane(text: str) -> bool:
    """Whether text can be written within a call: it has an encoding and no mark."""
    return not any(0xD800 <= ord(c) < 0xE000 for c in text) and DSML not in text and EOS not in text


def writable(name: str) -> bool:
    """Whether a name can stand in a tag."""
    return sane(name) and '"' not in name and len(name) <= MOST_NAME
