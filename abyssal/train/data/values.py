"""Values that requests, tools and results speak about, drawn by the kind that a table names."""

from __future__ import annotations

import string
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from abyssal.train.data.phrases import fill, phrases
from abyssal.train.data.pools import Split, draw, pick, pick_some, pool, wide_pool

TABLES = Path(__file__).parent / "tables"
QUOTED = 0.05  # of the messages hold marks that careless encoders break


@cache
def table(name: str) -> dict[str, Any]:
    """A file of tables/."""
    with open(TABLES / f"{name}.toml", "rb") as file:
        return tomllib.load(file)


def make_value(rng: np.random.Generator, split: Split, kind: str) -> Any:
    """A value of a kind: "pool:NAME", "int:LOW:HIGH", "float:LOW:HIGH", "enum:A,B,...", "bool", or one named here."""
    name, _, rest = kind.partition(":")
    if name == "pool":
        return pick(rng, wide_pool(rest, split))
    if name == "int":
        low, high = map(int, rest.split(":"))
        return int(rng.integers(low, high + 1))
    if name == "float":
        low, high = map(int, rest.split(":"))
        tenths = int(rng.integers(low * 10 + 1, high * 10))
        return tenths // 10 if tenths % 10 == 0 else tenths / 10
    if name == "enum":
        return pick(rng, rest.split(","))
    if name == "bool":
        return bool(rng.random() < 0.5)
    return _NAMED[name](rng, split)


def as_text(value: Any) -> str:
    """How sentences write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    return str(value)


def make_code(rng: np.random.Generator, split: Split) -> str:
    """Letters and digits, as order numbers have them."""

    def one() -> str:
        letters = "".join(pick(rng, string.ascii_uppercase) for _ in range(int(rng.integers(1, 4))))
        digits = "".join(pick(rng, string.digits) for _ in range(int(rng.integers(2, 6))))
        return letters + pick(rng, ("-", "", "-")) + digits

    return draw(split, one)


def _full_name(rng: np.random.Generator, split: Split) -> str:
    return f"{pick(rng, pool('first_names', split))} {pick(rng, pool('last_names', split))}"


def _username(rng: np.random.Generator, split: Split) -> str:
    name = pick(rng, pool("first_names", split)).lower()
    return f"{name}{pick(rng, ('', '_', '.'))}{pick(rng, wide_pool('things', split))}{int(rng.integers(1, 100))}"


def _email(rng: np.random.Generator, split: Split) -> str:
    first, last = _full_name(rng, split).lower().split(" ", 1)
    return f"{first}.{last.replace(' ', '')}@{pick(rng, wide_pool('places', split))}.example"


def _date(rng: np.random.Generator, split: Split) -> str:
    return f"{int(rng.integers(2024, 2031))}-{int(rng.integers(1, 13)):02d}-{int(rng.integers(1, 29)):02d}"


def _time(rng: np.random.Generator, split: Split) -> str:
    return f"{int(rng.integers(0, 24)):02d}:{5 * int(rng.integers(0, 12)):02d}"


def _phone(rng: np.random.Generator, split: Split) -> str:
    return f"+{int(rng.integers(20, 99))} {int(rng.integers(100, 1000))} {int(rng.integers(10000, 100000))}"


def _digits(rng: np.random.Generator, split: Split) -> str:
    """A text of digits, which may begin with 0: no number."""
    return "".join(pick(rng, string.digits) for _ in range(int(rng.integers(4, 7))))


def _title(rng: np.random.Generator, split: Split) -> str:
    words = [pick(rng, wide_pool("adjectives", split)), pick(rng, wide_pool("things", split))]
    words += [pick(rng, wide_pool("roles", split))] if rng.random() < 0.4 else []
    return " ".join(words).capitalize() if rng.random() < 0.5 else " ".join(words).title()


def _message(rng: np.random.Generator, split: Split) -> str:
    text = fill(rng, split, pick(rng, phrases("messages")))
    if rng.random() < QUOTED:
        text += " " + pick(
            rng, ("<b>Now!</b>", "Tom & Co.", "50% / 50%", "Ask for C:\\temp.", "x < y", "It's 5 o'clock.")
        )
    return text


def _keyword(rng: np.random.Generator, split: Split) -> str:
    lists = ("things", "adjectives", "roles")
    words = pick_some(rng, [word for name in lists for word in wide_pool(name, split)], 2)
    return " ".join(words[: int(rng.integers(1, 3))])


def _path(rng: np.random.Generator, split: Split) -> str:
    folders = pick_some(rng, wide_pool("places", split), int(rng.integers(1, 3)))
    ending = pick(rng, ("txt", "csv", "pdf", "json", "py", "md"))
    return f"/{'/'.join(folders)}/{pick(rng, wide_pool('things', split))}_{int(rng.integers(1, 100))}.{ending}".replace(
        " ", ""
    )


def _url(rng: np.random.Generator, split: Split) -> str:
    return f"https://{pick(rng, wide_pool('places', split))}.example/{pick(rng, wide_pool('things', split))}"


def _named_place(rng: np.random.Generator, split: Split) -> str:
    words = (pick(rng, wide_pool(name, split)).capitalize() for name in ("adjectives", "places"))
    return " ".join(words)


def _list(rng: np.random.Generator, split: Split) -> list[str]:
    return pick_some(rng, wide_pool("things", split), int(rng.integers(2, 4)))


_NAMED = {
    "full_name": _full_name,
    "username": _username,
    "email": _email,
    "date": _date,
    "time": _time,
    "phone": _phone,
    "code": make_code,
    "digits": _digits,
    "title": _title,
    "message": _message,
    "keyword": _keyword,
    "path": _path,
    "url": _url,
    "named_place": _named_place,
    "list": _list,
}
