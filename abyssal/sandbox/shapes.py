"""The contract's data as JSON and back: what the log and HTTP have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from abyssal.sandbox import errors
from abyssal.sandbox.api import STRENGTH, SUBSTRATES, Allowed, Exit, Limits, Network, Placed, Require, Spec, Stat, Usage
from abyssal.sandbox.errors import BadRequest, SandboxError

JSON = Mapping[str, Any]
_SIZES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def size(value: int | str) -> int:
    """Bytes from a number or from a text such as 512M.

    Raises:
        BadRequest: it is neither.
    """
    text = str(value).strip().lower().removesuffix("b").removesuffix("i")
    factor = _SIZES.get(text[-1:], 1)
    try:
        number = float(text[:-1] if factor > 1 else text)
        if number < 0 or isinstance(value, bool):
            raise ValueError
        return int(number * factor)
    except (ValueError, OverflowError):
        raise BadRequest(f"{value!r} is no size: give bytes, or a number with K, M or G") from None


def limits(value: JSON) -> Limits:
    """Limits from JSON; sizes may be texts."""
    known: dict[str, Any] = dict(_only(value, Limits, "limits"))
    try:
        for name, number in known.items():
            known[name] = float(number) if name == "cpu" else int(number) if name == "pids" else size(number)
    except (TypeError, ValueError):
        raise BadRequest(f"limits {dict(value)!r} are not numbers") from None
    return Limits(**known)


def network(value: JSON) -> Network:
    """A network policy from JSON."""
    known = _only(value, Network, "network")
    if known.get("mode", "none") not in ("none", "allow", "open"):
        raise BadRequest(f"network mode {known['mode']!r} is unknown: choose none, allow or open")
    allow = tuple(Allowed(**_only(entry, Allowed, "network.allow")) for entry in known.get("allow", ()))
    return Network(known.get("mode", "none"), allow)


def spec(value: JSON) -> Spec:
    """A sandbox that is asked for, from JSON.

    Raises:
        BadRequest: a field is unknown or wrong.
    """
    known = dict(_only(value, Spec, "sandbox"))
    if known.get("substrate") not in SUBSTRATES:
        raise BadRequest(f"substrate {known.get('substrate')!r} is unknown: choose from {', '.join(SUBSTRATES)}")
    if "limits" in known:
        known["limits"] = limits(known["limits"])
    if "network" in known:
        known["network"] = network(known["network"])
    if "require" in known:
        require = Require(**_only(known["require"], Require, "require"))
        if require.boundary is not None and require.boundary not in STRENGTH:
            raise BadRequest(f"boundary {require.boundary!r} is unknown: choose from {', '.join(STRENGTH)}")
        known["require"] = require
    for name in ("env", "labels"):
        texts(known.get(name, {}), name)
    for name in ("ttl", "idle_ttl"):
        if name in known and not (known[name] is None and name == "idle_ttl"):
            known[name] = seconds(known[name], name)
    for name in ("image", "cwd", "user"):
        if name in known and not (isinstance(known[name], str) and known[name]):
            raise BadRequest(f"{name} {known[name]!r} is no text")
    return Spec(**known)


def seconds(value: Any, name: str) -> float:
    """A positive number of seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise BadRequest(f"{name} {value!r} is no positive number of seconds")
    return float(value)


def texts(value: Any, name: str) -> Mapping[str, str]:
    """A mapping of texts to texts."""
    if not isinstance(value, Mapping) or not all(isinstance(item, str) for pair in value.items() for item in pair):
        raise BadRequest(f"{name} {value!r} does not map texts to texts")
    return value


def plain(value: Any) -> Any:
    """A dataclass of the contract as JSON; `asdict` copies deeply, which for every record adds up."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if is_dataclass(value):
        return {part.name: plain(getattr(value, part.name)) for part in fields(value)}
    return value


def placed(value: JSON) -> Placed:
    """What a caller got, from JSON."""
    return Placed(value["engine"], value["boundary"], value["accel"], tuple(value["degraded"]))


def stat(value: JSON) -> Stat:
    """A file's facts, from JSON."""
    return Stat(**value)


def exit_of(res: JSON) -> Exit:
    """How a command ended, from the result of its operation."""
    return Exit(
        res["exit_code"], res["signal"], res["timed_out"], res["limit"], res["duration_ms"], Usage(**res["usage"])
    )


_ATTRIBUTES = ("which", "cause", "op_id", "seq", "expected", "got")


def error_json(error: SandboxError) -> dict[str, Any]:
    """An error with what it knows besides its message."""
    known = {name: getattr(error, name) for name in _ATTRIBUTES if hasattr(error, name)}
    return {"type": type(error).__name__, "message": str(error), **known}


def error_of(value: JSON) -> SandboxError:
    """The error that `error_json` told of."""
    kind = getattr(errors, str(value.get("type")), SandboxError)
    if not (isinstance(kind, type) and issubclass(kind, SandboxError)):
        kind = SandboxError
    known = [value[name] for name in _ATTRIBUTES if name in value]
    return kind(*known, value.get("message", ""))


def _only(value: Any, kind: type, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRequest(f"{name} {value!r} is no object")
    known = {field.name for field in fields(kind)}
    unknown = set(value) - known
    if unknown:
        raise BadRequest(
            f"{name} does not know {', '.join(sorted(map(str, unknown)))}: it has {', '.join(sorted(known))}"
        )
    return value
