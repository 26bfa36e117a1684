"""Constrained decoding through llguidance: which tokens may come next."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import llguidance
import numpy as np
from numpy.typing import NDArray

from abyssal.base.errors import InputError


@dataclass(frozen=True)
class Grammar:
    """What an answer must match.

    Attributes:
        kind: "json_schema" for a JSON schema, "lark" for a grammar in llguidance's Lark dialect, "regex".
        text: the schema, grammar or expression.
    """

    kind: Literal["json_schema", "lark", "regex"]
    text: str


class GrammarCompiler:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: a tokenizer.json.
        vocab_size: logits of the model, at least the tokens of the tokenizer.
        end: id of the token that may come where the grammar is complete.
    """

    def __init__(self, tokenizer: Path | str, vocab_size: int, end: int):
        text = Path(tokenizer).read_text(encoding="utf-8")
        self._tokenizer = llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=end)
        self.vocab_size = vocab_size

    def start(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning.

        Raises:
            InputError: the grammar is invalid; the text says where.
        """
        try:
            if grammar.kind == "json_schema":
                compiled = llguidance.LLMatcher.grammar_from_json_schema(json.loads(grammar.text))
            elif grammar.kind == "lark":
                compiled = llguidance.LLMatcher.grammar_from_lark(grammar.text)
            else:
                compiled = llguidance.LLMatcher.grammar_from_regex(grammar.text)
        except ValueError as error:
            raise InputError(f"the {grammar.kind} is invalid: {_first_line(error)}") from None
        problem = llguidance.LLMatcher.validate_grammar(compiled, self._tokenizer)
        if problem:
            raise InputError(f"the {grammar.kind} is invalid: {_first_line(problem)}")
        return Matcher(llguidance.LLMatcher(self._tokenizer, compiled), self.vocab_size)


def _first_line(problem: object) -> str:
    return str(problem).strip().splitlines()[0]


class Matcher:
    """How far an answer has come in a grammar."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> NDArray[np.bool_]:
        """True for the tokens that may come next, [vocabulary]."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(mask, bitorder="little")[: self._vocab_size].astype(np.bool_)

    def accept(self, token: int) -> None:
        """A token was chosen, which `allowed` must have named."""
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def copy(self) -> Matcher:
        """A second matcher at the same place."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)
