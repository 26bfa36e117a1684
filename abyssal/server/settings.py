"""What an operator decides about the server."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an operator decides.

    Attributes:
        api_keys: SHA-256 digests of the keys that may call; none leaves the door open.
        legacy_names: whether deepseek-chat and deepseek-reasoner are answered.
        strict: refuse missing reasoning and wrong signatures as the vendor does, instead of repairing.
        vendor_sampling: in thinking mode, ignore temperature and penalties as the vendor does.
        answer_reserve: tokens of `max_tokens` that thinking must leave for the answer.
        body_bytes: largest body.
        body_s: seconds in which a body must have come.
        requests: most requests at once, waiting ones among them; more are told to come back.
        requests_per_key: the same for one key; None for no limit.
        tokens_per_key: tokens, of prompts and answers, that a key may use until the server ends.
        traces: requests whose tokens are kept for the trace page.
        cors: origins that may call from a browser.
        log_prompts: whether prompts and answers go to the log.
        keep_alive_s: quiet seconds after which a comment is sent.
        grace_s: seconds that running requests get when the server is asked to end.
    """

    api_keys: tuple[bytes, ...] = ()
    legacy_names: bool = True
    strict: bool = False
    vendor_sampling: bool = False
    answer_reserve: int = 0
    body_bytes: int = 64 << 20
    body_s: float = 60.0
    requests: int = 256
    requests_per_key: int | None = None
    tokens_per_key: int | None = None
    traces: int = 32
    cors: tuple[str, ...] = ()
    log_prompts: bool = False
    keep_alive_s: float = 10.0
    grace_s: float = 30.0


def digest(key: str) -> bytes:
    """How a key is kept."""
    return hashlib.sha256(key.encode()).digest()


def keys(texts: Sequence[str]) -> tuple[bytes, ...]:
    """Digests of API keys."""
    return tuple(digest(text) for text in texts)


def caller_of(key: str, known: Sequence[bytes]) -> str | None:
    """The name of whoever sends this key, or None for nobody; takes as long for every key."""
    given = digest(key)
    found = [hmac.compare_digest(given, one) for one in known]
    return given.hex()[:16] if any(found) else None
