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

KEPT = 16  # compiled grammars: an agent comes back with the same tools at every turn
# between JSON's marks, where the schema says nothing else: an unsure model would write blanks until its answer is cut
JSON_STYLE: Any = {"whitespace_pattern": r" |\n[ \t]{0,32}"}


@dataclass(frozen=True)
class Grammar:
    """What an answer must match.

    Attributes:
        kind: "json_schema" for a JSON schema, with a blank or an indented new line between its marks at most; "lark"
            for a grammar in llguidance's Lark dialect; "regex".
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
        layout = json.loads(Path(tokenizer).read_text(encoding="utf-8"))
        # releases flag some "special": false, and the free text of a grammar would hold those
        for token in layout["added_tokens"]:
            token["special"] = True
        self._tokenizer = llguidance.LLTokenizer(json.dumps(layout), n_vocab=vocab_size, eos_token=end)
        # states of the lexer are made when they are met: all at once would fail for hundreds of tools
        self._limits = llguidance.LLParserLimits(precompute_large_lexemes=False)
        self._compiled: dict[Grammar, Any] = {}  # the one used last comes last
        self.vocab_size = vocab_size

    def start(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning.

        Raises:
            InputError: the grammar is invalid; the text says where.
        """
        matcher = self._compiled.pop(grammar, None)
        if matcher is None:
            matcher = self._compile(grammar)
        self._compiled[grammar] = matcher
        if len(self._compiled) > KEPT:
            del self._compiled[next(iter(self._compiled))]
        return Matcher(matcher.deep_copy(), self.vocab_size)

    def _compile(self, grammar: Grammar) -> Any:
        try:
            if grammar.kind == "json_schema":
                compiled = llguidance.LLMatcher.grammar_from_json_schema(json.loads(grammar.text), JSON_STYLE)
            elif grammar.kind == "lark":
                compiled = llguidance.LLMatcher.grammar_from_lark(grammar.text)
            else:
                compiled = llguidance.LLMatcher.grammar_from_regex(grammar.text)
        except ValueError as error:
            raise InputError(f"the {grammar.kind} is invalid: {_first_line(error)}") from None
        # warnings are no problem, and validation alone does not meet the limits
        matcher = llguidance.LLMatcher(self._tokenizer, compiled, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise InputError(f"the {grammar.kind} is invalid: {_first_line(matcher.get_error())}")
        return matcher


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
    def problem(self) -> str | None:
        """What broke the matcher, which then allows nothing but the end; None if nothing did."""
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else None

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def copy(self) -> Matcher:
        """A second matcher at the same place."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)
