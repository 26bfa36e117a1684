"""Text to token ids and back over HTTP, for harnesses that have no tokenizer (evals.md 10)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from abyssal.chat.api import Completer
from abyssal.encoding.literals import BOS, EOS
from abyssal.encoding.messages import Conversation
from abyssal.encoding.render import render
from abyssal.encoding.tokenizer import Piece
from abyssal.server.errors import ApiError
from abyssal.server.fields import checked


class TokenizeBody(BaseModel):
    """Text, or a conversation, to encode."""

    model_config = ConfigDict(extra="ignore")

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    thinking: bool = True
    add_special_tokens: bool = True


class DetokenizeBody(BaseModel):
    """Ids to decode."""

    model_config = ConfigDict(extra="ignore")

    tokens: list[int] = Field(max_length=1 << 22)


def tokenize(data: Any, completer: Completer) -> list[int]:
    """Ids of a text, behind a BOS unless told otherwise, or of a conversation's prompt.

    Raises:
        ApiError: neither or both are given.
        InputError: the conversation is malformed.
    """
    body = checked(TokenizeBody, data)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if body.prompt is not None:
        start = [Piece(BOS, special=True)] if body.add_special_tokens else []
        return completer.encode([*start, Piece(body.prompt)])
    conversation = Conversation.from_json(body.messages, body.tools)
    return completer.encode(render(conversation.messages, thinking=body.thinking, snapshot=completer.snapshot))


def detokenize(data: Any, completer: Completer) -> str:
    """Text of ids, special tokens spelled out.

    Raises:
        InputError: an id has no text.
    """
    return completer.decode(checked(DetokenizeBody, data).tokens)


def information(completer: Completer) -> dict[str, Any]:
    """What a client must know to use the ids; there is no Jinja template, the server renders."""
    return {"tokenizer_class": "abyssal", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS,
            "chat_template": None, "model_max_length": completer.context}  # fmt: skip
