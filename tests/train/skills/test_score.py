"""Whole evaluations: by one who knows everything, by one who knows nothing, and by the bundled model."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import abyssal
from abyssal.base.errors import DataError, InputError, RunError
from abyssal.chat.api import Accepted, Completion, Continued, PromptUse
from abyssal.checkpoint.load import load_model
from abyssal.encoding.literals import BOS, DSML
from abyssal.encoding.tokenizer import Tokenizer
from abyssal.train.data.corpora import read_corpus
from abyssal.train.data.example import MODES
from abyssal.train.skills.bits import cut, score_bits
from abyssal.train.skills.plan import Plan, Stretch
from abyssal.train.skills.score import SUITES, score, score_with
from tests.train.skills.oracle import Oracle, bench_of, knowing

NANO = Path(abyssal.__file__).parent / "models" / "nano"
ASKED = tuple(suite for suite in SUITES if suite != "bits")
PLAN = Plan(
    (Stretch(600, 3), Stretch(2000, 4, per_text=2), Stretch(4000, 3, per_text=3, joint=True)),
    tools=3,
    free=2,
    arithmetic=4,
    chat=3,
    copying=2,
    depths=(0.0, 0.5, 1.0),
    retrieval_modes=("non-think", "think-high"),
)


def leaves(results: Any) -> Iterator[dict[str, Any]]:
    """Every rate in a result that has items."""
    if isinstance(results, dict):
        if "n" in results:
            if results["n"]:
                yield results
        else:
            for value in results.values():
                yield from leaves(value)


def test_who_knows_everything() -> None:
    oracle = knowing(PLAN)
    results = score_with(bench_of(oracle), None, PLAN, ASKED)
    found = list(leaves(results["suites"]))
    assert len(found) > 100 and all(rate["rate"] == 1.0 for rate in found)
    suites = results["suites"]
    assert suites["retrieval"]["outcomes"]["non-think"]["single"] == {
        "600": {"right": 3},
        "2000": {"right": 4},
        "4000": {"right": 3},
    }
    assert set(suites["retrieval"]["grid"]["think-high"]["key_value"]["2000"]) == {"0.0", "0.5", "1.0"}
    thinking = suites["arithmetic"]["thinking_tokens"]
    assert thinking["non-think"]["most"] == 0
    assert thinking["non-think"]["mean"] < thinking["think-high"]["mean"] < thinking["think-max"]["mean"]
    assert any(oracle.bound) and not all(oracle.bound), "tools are asked with and without the grammar"
    assert suites["tools"]["without_grammar"]["by_kind"]["non-think"]["single"]["n"] == 2
    json.dumps(results)


@pytest.mark.parametrize(
    "said", ["no", f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="no_such_tool">\n</{DSML}invoke>\n</{DSML}tool_calls>']
)
def test_who_knows_nothing(said: str) -> None:
    """Nothing is right; who calls nothing is right where nothing should be called."""
    results = score_with(bench_of(Oracle(otherwise=said)), None, PLAN, ASKED)["suites"]
    for suite, name in (
        ("retrieval", "by_length"),
        *((suite, "by_kind") for suite in ("arithmetic", "copying", "chat")),
    ):
        found = list(leaves(results[suite][name]))
        assert found and all(rate["rate"] == 0.0 for rate in found)
    assert results["chat"]["signs"]["capital"]["rate"] == 0.0
    tools = results["tools"]["with_grammar"]
    silent = said == "no"
    for mode in MODES:
        for kind, rate in tools["by_kind"][mode].items():
            # in the thinking modes it never closes its thinking
            good = silent and kind in ("none_fits", "talk") and mode == "non-think"
            assert rate["rate"] == float(good), (mode, kind)
    assert tools["well_formed"]["non-think"]["rate"] == float(silent)


def test_texts_are_shared() -> None:
    """Questions about one text follow each other, so that the prefix cache has it."""
    plan = replace(PLAN, retrieval=PLAN.retrieval[1:], retrieval_modes=("non-think",))
    oracle = knowing(plan)
    score_with(bench_of(oracle), None, plan, ["retrieval"])
    texts = [prompt.rsplit("\n\n", 1)[0] for prompt in oracle.prompts]
    runs = 1 + sum(one != other for one, other in pairwise(texts))
    assert (len(texts), len(set(texts)), runs) == (3 * 4 + 3 * 3, 3 * 2 + 1, 3 * 2 + 1)


def test_a_killed_evaluation_goes_on() -> None:
    """Rows that are there are not asked again, and count."""
    oracle = knowing(PLAN)
    first = bench_of(oracle)
    whole = score_with(first, None, PLAN, ASKED)
    rows = first.journal.rows
    for known in (rows[: len(rows) // 2], rows[::3], rows):
        oracle.prompts.clear()
        again = score_with(bench_of(oracle, known), None, PLAN, ASKED)
        assert again["suites"] == whole["suites"]
        turns = sum(len(row["replies"]) if "replies" in row else 1 for row in rows if row not in known)
        assert len(oracle.prompts) == turns


def test_a_model_that_is_right_once_and_then_wrong() -> None:
    """A two-step item counts only if the second call is right too; the result is fed after the first."""
    plan = replace(PLAN, tool_modes=("non-think",))
    oracle = knowing(plan)
    for prompt in oracle.answers:
        if "<tool_result>" in prompt:
            oracle.answers[prompt] = "It is done."
    tools = score_with(bench_of(oracle), None, plan, ["tools"])["suites"]["tools"]["with_grammar"]
    assert tools["by_kind"]["non-think"]["two_steps"]["rate"] == 0.0
    assert tools["outcomes"]["non-think"]["two_steps"] == {"none": 3}
    assert tools["by_kind"]["non-think"]["single"]["rate"] == 1.0, "the call was right, and the answer calls nothing"
    assert tools["tells_result"]["non-think"]["single"]["rate"] < 1.0


def test_bits_per_byte() -> None:
    """One bit for every byte; parts are whole characters, and no byte is lost or read twice."""
    documents = ["Grüße, 世界! " * 40, "x" * 100, ""]
    parts = list(cut("prose", documents, 64))
    assert "".join(part.text for part in parts) == "".join(documents)
    assert all(len(part.text.encode()) <= 64 for part in parts) and len({part.id for part in parts}) == len(parts)
    plan = replace(PLAN, part=64)
    found = score_bits(bench_of(Oracle(otherwise="")), plan, "prose", documents)
    size = sum(len(text.encode()) for text in documents)
    assert found["bits_per_byte"] == pytest.approx(1.0) and found["bytes"] == found["tokens"] == size
    some = score_bits(bench_of(Oracle(otherwise="")), replace(plan, parts=3), "prose", documents)
    assert (some["parts"], some["part"]) == (3, 64)
    with pytest.raises(DataError, match="no held-out code"):
        score_bits(bench_of(Oracle()), plan, "code", [])


def test_an_engine_that_fails() -> None:
    """Its error comes as it is, and what was done before is kept."""

    class Failing(Oracle):
        async def complete(self, completion: Completion) -> AsyncIterator[Accepted | PromptUse | Continued]:
            finish: Literal["stop", "failed"] = "stop" if len(self.prompts) < 2 else "failed"
            async for part in super().complete(completion):
                if isinstance(part, Continued):
                    part = replace(part, finish=finish, error=None if finish == "stop" else "out of order")
                yield part

    bench = bench_of(Failing(otherwise="no"))
    with pytest.raises(RunError, match="out of order"):
        score_with(bench, None, PLAN, ["copying"])
    assert len(bench.journal.rows) == 2


def test_unknown_suites_and_missing_data() -> None:
    with pytest.raises(InputError, match="no suite is called chess"):
        score_with(bench_of(Oracle()), None, PLAN, ["chess"])
    with pytest.raises(InputError, match="give the data folder"):
        score_with(bench_of(Oracle()), None, PLAN, ["bits"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of two short documents of each kind."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "corpus").mkdir()
    for name in ("prose", "prose.held_out", "code", "code.held_out"):
        texts = [f"This is a sentence of {name}. Here comes another one. " * 20, "def f(x):\n    return x + 1\n" * 30]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / "corpus" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_bundled_model(tmp_path: Path, data: Path) -> None:
    """Through the real engine; a second time everything comes out of the journal."""
    stretches = (Stretch(300, 2), Stretch(700, 2, per_text=2, joint=True))
    plan = Plan(
        stretches, tools=1, free=1, arithmetic=2, chat=1, copying=1, tool_modes=("non-think",), part=700, parts=3
    )
    path = tmp_path / "rows.jsonl"
    found = score(NANO, data, plan, journal=path, silent=True)
    suites = found["suites"]
    assert set(suites) == set(found["seconds"]) == set(SUITES)
    assert {kind: rate["n"] for kind, rate in suites["retrieval"]["by_kind"]["non-think"].items()} == {
        "single": 4,
        "multi_key": 4,
        "key_value": 4,
    }
    assert suites["tools"]["with_grammar"]["well_formed"]["non-think"]["n"] == 5
    assert 0 < suites["bits"]["prose"]["bits_per_byte"] < 8 and suites["bits"]["code"]["parts"] == 3
    text = path.read_text()
    again = score(NANO, data, plan, journal=path, silent=True)
    assert again["suites"] == suites and path.read_text() == text


def test_bits_agree_with_the_model(data: Path) -> None:
    """The engine's scores are the log-probabilities of the plain forward."""
    plan = Plan((), tools=0, free=0, arithmetic=0, chat=0, copying=0, part=500, parts=2)
    found = score(NANO, data, plan, ["bits"], silent=True)["suites"]["bits"]["code"]
    parts = list(cut("code", read_corpus(data / "corpus", "code", held_out=True), 500))
    chosen = [parts[i * len(parts) // 2] for i in range(2)]
    tokenizer, model = Tokenizer(NANO), load_model(NANO)
    bits = 0.0
    for part in chosen:
        ids = torch.tensor([tokenizer.special(BOS), *tokenizer.encode(part.text)])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids[None])[0].double(), -1)
        bits -= float(logprobs[:-1].gather(1, ids[1:, None]).sum()) / math.log(2)
    size = sum(len(part.text.encode()) for part in chosen)
    assert found["bytes"] == size and found["bits_per_byte"] == pytest.approx(bits / size, abs=1e-4)
