"""Answers that must match a grammar, through llguidance and the bundled tokenizer."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from abyssal.base.errors import InputError
from abyssal.checkpoint.load import load_model
from abyssal.cli.models import bundled_folder
from abyssal.encoding.literals import EOS
from abyssal.encoding.tokenizer import Tokenizer
from abyssal.engine.engine import Engine
from abyssal.engine.grammar import Grammar, GrammarCompiler
from abyssal.engine.request import Request
from abyssal.engine.sampler import Sampling


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(bundled_folder())


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Engine:
    model = load_model(bundled_folder()).requires_grad_(False)
    path, size, end = bundled_folder() / "tokenizer.json", model.config.vocab_size, tokenizer.special(EOS)
    return Engine(
        model,
        budget=1 << 28,
        slots=8,
        grammars=lambda: GrammarCompiler(path, size, end),
        token_bytes=tokenizer.token_bytes,
    )


def ask(engine: Engine, tokenizer: Tokenizer, grammar: Grammar, seed: int, **more: object) -> tuple[str, str]:
    end = tokenizer.special(EOS)
    request = Request(
        prompt=(0, *tokenizer.encode("In the beginning")), max_tokens=more.pop("max_tokens", 120),  # type: ignore
        sampling=Sampling(seed=seed), grammar=grammar, stop=(end,), **more,  # type: ignore[arg-type]
    )  # fmt: skip
    number, events = engine.stream(request)
    tokens = [e.token for e in events if e.token is not None]
    return tokenizer.decode(tokens), str(engine.records[number].answers[0].finish_reason)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["bread", "fish"]},
    },
    "required": ["name", "count", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(6))
def test_answers_match_a_json_schema(engine: Engine, tokenizer: Tokenizer, seed: int) -> None:
    text, finish = ask(engine, tokenizer, Grammar("json_schema", json.dumps(SCHEMA)), seed, max_tokens=400)
    assert finish == "stop"
    jsonschema.validate(json.loads(text), SCHEMA)
    assert not re.search(r"\s{34}", text), "a line break and 32 blanks at most"


def test_answers_match_a_lark_grammar_and_an_expression(engine: Engine, tokenizer: Tokenizer) -> None:
    grammar = Grammar("lark", 'start: item (", " item)*\nitem: /[a-f]{3}/ "=" /[0-9]{1,2}/')
    for seed in range(4):
        text, finish = ask(engine, tokenizer, grammar, seed, max_tokens=60)
        item = r"[a-f]{3}=[0-9]{1,2}"
        assert finish == "length" or re.fullmatch(rf"{item}(, {item})*", text)
        assert re.match(r"[a-f]{1,3}", text)
    text, finish = ask(engine, tokenizer, Grammar("regex", "(yes|no), [a-z]{2,5}!"), 1)
    assert finish == "stop" and re.fullmatch("(yes|no), [a-z]{2,5}!", text)


def test_a_grammar_may_begin_anywhere_in_the_answer(engine: Engine, tokenizer: Tokenizer) -> None:
    """Free until a token comes, then bound; other requests are not."""
    comma = tokenizer.encode(",")[0]
    grammar = Grammar("regex", " [0-9]{3}")
    other = engine.add(Request(prompt=(0, 5), max_tokens=30, sampling=Sampling(seed=9)))
    met = 0
    for seed in range(6):
        text, finish = ask(engine, tokenizer, grammar, seed, grammar_after=(comma,), drafts=2)
        if finish == "stop" and "," in text:
            before, after = text.rsplit(",", 1)  # a comma within another token does not bind
            assert re.fullmatch(" [0-9]{3}", after)
            met += bool(re.search("[a-z]", before))
    assert met >= 2, "some answers must have been free at first"
    alone = engine.add(Request(prompt=(0, 5), max_tokens=30, sampling=Sampling(seed=9)))
    while engine.busy:
        engine.step()
    assert engine.records[other].answers[0].tokens == engine.records[alone].answers[0].tokens


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{"),
        Grammar("json_schema", '{"type": "banana"}'),
        Grammar("lark", "start: ???"),
        Grammar("lark", "start: missing"),
        Grammar("regex", "(unclosed"),
    ],
)
def test_invalid_grammars_are_refused_and_others_go_on(engine: Engine, tokenizer: Tokenizer, grammar: Grammar) -> None:
    number = engine.add(Request(prompt=(0, 5), max_tokens=3))
    with pytest.raises(InputError, match=f"the {grammar.kind} is invalid: "):
        engine.add(Request(prompt=(0, 5), max_tokens=3, grammar=grammar))
    while engine.busy:
        engine.step()
    assert engine.records[number].answers[0].finish_reason in ("length", "stop")


def test_a_grammar_without_a_tokenizer_is_refused(engine: Engine) -> None:
    bare = Engine(engine.model, budget=1 << 27, slots=1)
    with pytest.raises(InputError, match="needs a tokenizer"):
        bare.add(Request(prompt=(1,), max_tokens=1, grammar=Grammar("regex", "a")))
    with pytest.raises(InputError, match="need a tokenizer"):
        bare.add(Request(prompt=(1,), max_tokens=1, stop_strings=("a",)))


def test_a_grammar_that_breaks_fails_its_answer_and_no_other(engine: Engine, tokenizer: Tokenizer) -> None:
    """llguidance gives up on what outgrows its limits; an answer cut there must not look finished."""
    path, end = bundled_folder() / "tokenizer.json", tokenizer.special(EOS)
    broken = GrammarCompiler(path, engine.model.config.vocab_size, end)
    matcher = broken.start(Grammar("regex", "ab+"))
    matcher.accept(tokenizer.encode("z")[0])  # not allowed: it breaks
    assert matcher.problem is not None
    other = engine.add(Request(prompt=(0, 5), max_tokens=5))
    number = engine.add(Request(prompt=(0, 5), max_tokens=5, grammar=Grammar("regex", "ab+")))
    for run in [*engine._waiting, *engine._running.values()]:
        if run.request_number == number:
            run.matcher = matcher
    while engine.busy:
        engine.step()
    failed = engine.records[number].answers[0]
    assert failed.finish_reason == "failed" and "make it simpler" in (failed.error or "")
    assert engine.records[other].answers[0].finish_reason == "length"


def test_a_grammar_waits_for_its_tokens_in_their_order(engine: Engine, tokenizer: Tokenizer) -> None:
    """A comma, then a full stop behind it; a full stop before the comma does not count."""
    comma, stop, end = tokenizer.encode(",")[0], tokenizer.encode(".")[0], tokenizer.special(EOS)
    met = early = 0
    for seed in range(16):
        request = Request(
            prompt=(0, *tokenizer.encode("In the beginning")), max_tokens=150, sampling=Sampling(seed=seed),
            grammar=Grammar("regex", " [0-9]{3}"), grammar_after=(comma, stop), stop=(end,),
        )  # fmt: skip
        number, events = engine.stream(request)
        list(events)
        tokens = engine.records[number].answers[0].tokens
        first = tokens.index(comma) if comma in tokens else len(tokens)
        early += stop in tokens[:first]
        if stop in tokens[first:]:
            bound = tokens[tokens.index(stop, first) + 1 :]
            assert re.fullmatch(" [0-9]{3}", tokenizer.decode(bound)), tokenizer.decode(tokens)
            met += 1
    assert met >= 4 and early >= 1
