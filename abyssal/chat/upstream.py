"""What other engines say over HTTP: models, chunks of a stream, tokens and errors, in each one's words.

Read in vllm/entrypoints/openai, sglang/srt/entrypoints/openai and llama.cpp's tools/server, in November 2026.
"""

from __future__ import annotations

import json
import re
from typing import Any

import httpx2
from pydantic import BaseModel, ValidationError

from abyssal.base.errors import AbyssalError, CapacityError, ContextError, InputError, RunError
from abyssal.chat.api import TokenInfo
from abyssal.encoding.literals import THINK_END

SHOWN = 1000  # characters of what an upstream sent that an error shows
UNNAMED = (
    "the upstream does not name the tokens' ids, which log-probabilities need: leave out logprobs, or serve with"
    " vLLM or llama.cpp"
)
_TOO_LONG = re.compile("context|maximum model length", re.IGNORECASE)
_TOKEN_ID = re.compile(r"token_id:(\d+)")


class _Entry(BaseModel):
    """llama.cpp's form of a token with its log-probability."""

    id: int
    logprob: float
    top_logprobs: list[_Entry] = []


class Logprobs(BaseModel):
    """Tokens of a chunk in OpenAI's form, or in llama.cpp's (`content`)."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
    content: list[_Entry] | None = None


class Choice(BaseModel):
    """More of one answer; vLLM says in `stop_reason` what ended it, SGLang in `matched_stop`."""

    index: int = 0
    text: str | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None
    token_ids: list[int] | None = None
    stop_reason: int | str | None = None
    matched_stop: int | str | None = None

    @property
    def closed(self) -> bool:
        """Whether the end of the thinking ended it; where nothing is said of it, it is taken to be that."""
        said = self.model_fields_set & {"stop_reason", "matched_stop"}
        return not said or THINK_END in (self.stop_reason, self.matched_stop)

    def infos(self, top: int) -> list[TokenInfo | None]:
        """Its tokens; the first of a prompt has no log-probability.

        Args:
            top: how many of the likeliest to keep beside each.
        Raises:
            InputError: the upstream does not say which tokens they are.
        """
        found = self.logprobs
        if found is None:
            if self.text:
                raise InputError(UNNAMED)
            return []
        if found.content is not None:
            return [TokenInfo(e.id, e.logprob, _best([(o.id, o.logprob) for o in e.top_logprobs], top))
                    for e in found.content]  # fmt: skip
        # with an echo, `token_ids` has the answer's tokens alone
        ids = self.token_ids if len(self.token_ids or ()) == len(found.tokens) else None
        infos: list[TokenInfo | None] = []
        for i, (name, logprob) in enumerate(zip(found.tokens, found.token_logprobs, strict=False)):
            token = _id(name) if ids is None else ids[i]
            others = (found.top_logprobs or [])[i : i + 1] if top else []
            likely = [(_id(other), value) for other, value in ((others[0] or {}) if others else {}).items()]
            infos.append(None if logprob is None else TokenInfo(token, logprob, _best(likely, top)))
        return infos


def _id(name: str) -> int:
    found = _TOKEN_ID.fullmatch(name)
    if found is None:
        raise InputError(UNNAMED)
    return int(found[1])


def _best(likely: list[tuple[int, float]], top: int) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens; engines add the chosen one to them."""
    return tuple(sorted(likely, key=lambda pair: -pair[1])[:top])


class _Details(BaseModel):
    cached_tokens: int | None = None


class Usage(BaseModel):
    """Tokens so far, or in all."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Timings(BaseModel):
    """llama.cpp's."""

    cache_n: int | None = None


class Chunk(BaseModel):
    """An event of a stream."""

    object: str | None = None
    choices: list[Choice] = []
    usage: Usage | None = None
    timings: _Timings | None = None
    error: Any = None

    @classmethod
    def read(cls, data: str) -> Chunk:
        """An event's data.

        Raises:
            RunError: it is malformed, or reports a failure.
        """
        try:
            chunk = cls.model_validate_json(data)
        except ValidationError:
            raise RunError(f"the upstream sent what is no completion: {data[:SHOWN]}") from None
        if chunk.error is not None or chunk.object == "error":
            raise RunError(f"the upstream failed: {message_of(data)}")
        return chunk

    @property
    def cached(self) -> int | None:
        """Tokens of the prompt that were reused, where the engine tells."""
        details = self.usage.prompt_tokens_details if self.usage is not None else None
        if details is not None and details.cached_tokens is not None:
            return details.cached_tokens
        return self.timings.cache_n if self.timings is not None else None


def entry_of(client: httpx2.Client, root: str, model: str | None) -> dict[str, Any]:
    """What `/v1/models` says of a model; of the first, if it is None.

    Raises:
        InputError: nobody answers, or it is not among them.
    """
    try:
        response = client.get(f"{root}/v1/models")
        response.raise_for_status()
        entries = [entry for entry in response.json()["data"] if isinstance(entry, dict)]
    except httpx2.HTTPStatusError as error:
        status = error.response.status_code
        raise InputError(f"{root}/v1/models answers with {status}: check --upstream and --upstream-key") from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise InputError(f"{root} cannot be reached ({error}): check --upstream, and that the engine runs") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{root}/v1/models is no list of models: check --upstream") from None
    if model is None:
        return entries[0] if entries else {}
    names = [str(entry.get("id")) for entry in entries]
    if entries and model not in names:
        raise InputError(f"{root} does not serve {model!r}: give --upstream-model {' or '.join(names)}")
    return next((entry for entry in entries if entry.get("id") == model), {})


def context_of(client: httpx2.Client, root: str, entry: dict[str, Any]) -> int | None:
    """How long the context is, if the engine says so."""
    known = [entry.get("max_model_len"), entry.get("context_length")]
    meta = entry.get("meta")
    if isinstance(meta, dict):  # llama.cpp: what a slot has counts, not what the model was trained for
        try:
            known.append(client.get(f"{root}/props").json()["default_generation_settings"]["n_ctx"])
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            known.append(meta.get("n_ctx_train"))
    return next((value for value in known if isinstance(value, int) and value > 0), None)


def tokenize_body(model: str, text: str) -> dict[str, Any]:
    """A request to `/tokenize` in the words of vLLM and SGLang, and of llama.cpp."""
    return {"model": model, "prompt": text, "add_special_tokens": False,
            "content": text, "add_special": False, "parse_special": True}  # fmt: skip


def tokenized(response: httpx2.Response) -> list[int] | None:
    """Token ids in an answer of `/tokenize`, or None if it is none."""
    try:
        ids = response.json()["tokens"] if response.is_success else None
    except (ValueError, KeyError, TypeError):
        return None
    return ids if isinstance(ids, list) and all(isinstance(token, int) for token in ids) else None


def message_of(body: str) -> str:
    """The text of an error: OpenAI's form, SGLang's without the envelope, or FastAPI's."""
    found = _error(body)
    text = next((found[name] for name in ("message", "detail") if isinstance(found.get(name), str)), body.strip())
    return text[:SHOWN]


def _error(body: str) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except ValueError:
        return {}
    inner = data.get("error") if isinstance(data, dict) else None
    if isinstance(inner, str):
        return {"message": inner}
    found = inner if isinstance(inner, dict) else data
    return found if isinstance(found, dict) else {}


def refusal(status: int, body: str, context: int) -> AbyssalError:
    """What the status and body of a refused completion mean.

    Args:
        context: tokens that the upstream has room for, as far as we know.
    """
    text, found = message_of(body), _error(body)
    if status in (httpx2.codes.TOO_MANY_REQUESTS, httpx2.codes.SERVICE_UNAVAILABLE):
        return CapacityError(f"the upstream is busy ({status}): {text}")
    if status in (httpx2.codes.UNAUTHORIZED, httpx2.codes.FORBIDDEN):
        return RunError(f"the upstream refuses our key ({status}): start the gateway with another --upstream-key")
    if status == httpx2.codes.NOT_FOUND:
        return RunError(f"the upstream has no such model or no /v1/completions ({status}): {text}")
    if not 400 <= status < 500:
        return RunError(f"the upstream answers with {status}: {text}")
    if isinstance(found.get("n_prompt_tokens"), int):  # llama.cpp
        asked, held = found["n_prompt_tokens"], found.get("n_ctx", context)
        return ContextError(f"the prompt has {asked} tokens, the context holds {held}: shorten it")
    if _TOO_LONG.search(text):
        return ContextError(f"{text.rstrip('.')}: the context holds {context} tokens, shorten the prompt")
    return InputError(f"the upstream refuses the request: {text}")
