"""Fields that several APIs have in common: thinking, efforts, formats, stop texts, and how bodies are checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from abyssal.chat.api import Sampling
from abyssal.encoding.messages import Conversation, Message
from abyssal.encoding.snapshots import Effort
from abyssal.server.errors import ApiError

# requested to actual (api.md 3)
EFFORTS: dict[str, Effort] = {
    "minimal": "low", "low": "low", "medium": "high", "high": "high", "xhigh": "high", "max": "max", "ultra": "max",
}  # fmt: skip
DEFAULT_EFFORT: Effort = "high"
STOPS = 16
# pydantic's errors that mean the form is wrong, not the value
_FORM = ("missing", "extra_forbidden")

Body = TypeVar("Body", bound=BaseModel)


def checked(kind: type[Body], data: Any) -> Body:
    """A request's JSON as a body.

    Raises:
        ApiError: 400 for what is no object or lacks a field, 422 for a value out of range, with its path.
    """
    if not isinstance(data, Mapping):
        raise ApiError(400, "the body is no JSON object: send one")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        known = [part for part in first["loc"] if isinstance(part, int) or part in _names(kind, data)]
        path = ".".join(str(part) for part in known) or str(first["loc"][0])
        raise ApiError(400 if first["type"] in _FORM else 422, f"{path}: {first['msg']}", param=path) from None


def refuse(data: Any, names: Sequence[str]) -> None:
    """Refuse what we know and do not support.

    Raises:
        ApiError: 400, a request's JSON has a field of these names.
    """
    for name in names if isinstance(data, Mapping) else ():
        if data.get(name) not in (None, False):
            raise ApiError(400, f"{name} is not supported: leave it out", param=name, code="unsupported_parameter")


def _names(kind: type[BaseModel], data: Any) -> set[str]:
    """Names of fields at any depth; pydantic's paths also name the members of unions."""
    names = set(kind.model_fields)
    stack = [data]
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            names |= {key for key in value if isinstance(key, str)}
            stack += value.values()
        elif isinstance(value, list):
            stack += value
    return names


class Thinking(BaseModel):
    """Whether to think, and for how many tokens at most."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(default=None, ge=1)

    @property
    def on(self) -> bool:
        """Whether to think; "between_tools" asks for words between calls, which are content here."""
        return self.type in ("enabled", "adaptive")


def effort_of(name: str | None, param: str) -> Effort:
    """The effort that a request names.

    Raises:
        ApiError: 422, it is unknown.
    """
    if name is None or name == "none":
        return DEFAULT_EFFORT
    if name not in EFFORTS:
        raise ApiError(422, f"{param} {name!r} is unknown: use none, {', '.join(EFFORTS)}", param=param)
    return EFFORTS[name]


def stops_of(stop: str | Sequence[str] | None, param: str) -> tuple[str, ...]:
    """Texts that end an answer.

    Raises:
        ApiError: 422, too many or an empty one.
    """
    texts = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(texts) > STOPS or not all(texts):
        raise ApiError(422, f"{param}: give up to {STOPS} texts, none of them empty", param=param)
    return texts


def given(body: BaseModel, *names: str) -> dict[str, Any]:
    """The fields of these names that are not null."""
    return {name: value for name in names if (value := getattr(body, name)) is not None}


class SampledBody(BaseModel):
    """How tokens are chosen, as OpenAI's older APIs and vLLM name it."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: dict[int, float] | None = None
    seed: int | None = None

    def sampling(self) -> Sampling:
        """The fields that are not null."""
        return Sampling(**given(self, *SampledBody.model_fields))


@dataclass(frozen=True)
class Format:
    """What the content must look like.

    Attributes:
        schema: JSON schema that it must match, or None.
        shown: whether the prompt shows it.
        strict: refuse it if it cannot be enforced whole.
    """

    schema: Mapping[str, Any] | None = None
    shown: bool = False
    strict: bool = False

    @property
    def in_prompt(self) -> Mapping[str, Any] | None:
        """The schema, if the prompt shows it."""
        return self.schema if self.shown else None


def format_of(form: Mapping[str, Any] | None, param: str) -> Format:
    """A response format: text, json_object, or json_schema in Chat's nested or Responses' flat form.

    Raises:
        ApiError: 400, another type, or a schema that is missing.
    """
    kind = (form or {}).get("type", "text")
    if form is None or kind == "text":
        return Format()
    if kind == "json_object":
        return Format({"type": "object"})
    if kind != "json_schema":
        raise ApiError(400, f"{param}.type {kind!r} is unknown: use text, json_object or json_schema", param=param)
    inner = form.get("json_schema", form)
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        raise ApiError(400, f"{param} has no schema: give json_schema.schema", param=param)
    return Format(schema, True, bool(inner.get("strict")))


def conversation(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None, schema: Mapping[str, Any] | None
) -> tuple[Message, ...]:
    """Messages of an API whose turns are made of blocks or items, as the encoder keeps them apart.

    Neighbours that make up one answer, or one system message, become one. System messages behind the first turn
    keep their place but become the user's: the encoder opens no answer behind a system message, and would put the
    tools there.

    Args:
        messages: in OpenAI's form, their contents as text.
        tools: in OpenAI's form.
        schema: that the prompt shows, or None.
    Raises:
        ApiError: 400, nobody asks anything.
        InputError: something is malformed.
    """
    groups: list[list[dict[str, Any]]] = []
    begun = False
    for message in messages:
        begun = begun or message["role"] != "system"
        role = "user" if begun and message["role"] == "system" else message["role"]
        if groups and role in ("system", "assistant") and groups[-1][0]["role"] == role:
            groups[-1].append(message)
        else:
            groups.append([{**message, "role": role}])
    made = [_joined(group) if len(group) > 1 else group[0] for group in groups]
    if not any(message["role"] in ("user", "tool") for message in made):
        raise ApiError(400, "there is no message of a user: give one")
    return Conversation.from_json(made, list(tools or ()), schema).messages


def _joined(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    reasoning = [text for one in group if (text := one.get("reasoning_content")) is not None]
    return {
        "role": group[0]["role"],
        "content": "\n\n".join(text for one in group if (text := one.get("content"))),
        "reasoning_content": "\n\n".join(reasoning) if reasoning else None,
        "tool_calls": [call for one in group for call in one.get("tool_calls", ())],
    }
