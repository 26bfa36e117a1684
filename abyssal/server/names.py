"""Names under which the one loaded model answers (api.md 2)."""

from __future__ import annotations

from dataclasses import dataclass

from abyssal.server.errors import ApiError

ALIASES = ("deepseek-v4-pro", "deepseek-v4-flash", "deepseek-flash")
LEGACY = {"deepseek-chat": False, "deepseek-reasoner": True}  # whether they think by default


@dataclass(frozen=True)
class Named:
    """What a name means.

    Attributes:
        thinking: whether it thinks unless the request says otherwise.
        deprecated: the vendor has switched this name off.
    """

    thinking: bool = True
    deprecated: bool = False


def resolve(name: str, model: str, *, legacy: bool = True) -> Named:
    """What a name means for the loaded model.

    Raises:
        ApiError: 404 for an unknown name, 400 for a legacy one where those are off.
    """
    if name == model or name in ALIASES or name.startswith("claude"):
        return Named()
    if name in LEGACY:
        if not legacy:
            raise ApiError(400, f"the name {name} was switched off on 2026-07-24: use {model}", param="model")
        return Named(LEGACY[name], deprecated=True)
    raise ApiError(
        404, f"model {name!r} is not served here: use {model}", param="model", code="model_not_found"
    )
