"""Text completions, scored prompts and token ids over HTTP, with the bundled model behind."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from abyssal.chat.local import LocalCompleter
from abyssal.checkpoint.load import load_model
from abyssal.cli.models import bundled_folder
from abyssal.encoding.literals import BOS, EOS, USER
from abyssal.encoding.tokenizer import Tokenizer
from abyssal.engine.engine import Engine
from abyssal.engine.prefix_cache import PrefixCache
from abyssal.model import Transformer
from tests.server.serving import Scripted, serving

TEXT = "In the beginning God created the heaven and the earth."


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_model(bundled_folder()).requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(bundled_folder())


@pytest.fixture(scope="module")
def url(model: Transformer, tokenizer: Tokenizer) -> Iterator[str]:
    engine = Engine(
        model, budget=1 << 29, slots=16, prefix=lambda memory: PrefixCache(memory, "test"),
        token_bytes=tokenizer.token_bytes,
    )  # fmt: skip
    completer = LocalCompleter(engine, tokenizer, "nano")
    with serving(completer) as address:
        yield address
    completer.close()


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def post(url: str, body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_scores_of_prompts_as_lm_eval_asks_for_them(
    api: openai.OpenAI, model: Transformer, tokenizer: Tokenizer
) -> None:
    """Lists of token ids, echo, logprobs 1, one token: against a plain forward."""
    prompts = [[0, *tokenizer.encode(text)] for text in (TEXT, "And it came to pass", "x")]
    answer = api.completions.create(
        model="nano", prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for ids, choice in zip(prompts, answer.choices, strict=True):
        with torch.inference_mode():
            want = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        found = choice.logprobs
        assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
        assert found.token_logprobs[0] is None and len(found.token_logprobs) == len(ids) + 1
        for place, token in enumerate(ids[1:], 1):
            assert abs(found.token_logprobs[place] - float(want[place - 1, token])) < 1e-9
            greedy = int(want[place - 1].argmax()) == token
            assert (found.token_logprobs[place] == max(found.top_logprobs[place].values())) == greedy
        assert choice.text.startswith(tokenizer.decode(ids[1:]))
    assert answer.usage is not None and answer.usage.completion_tokens == 3
    assert answer.usage.prompt_tokens == sum(map(len, prompts))


def test_an_echo_alone_and_offsets(api: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = api.completions.create(model="nano", prompt=TEXT, echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (TEXT, "length")
    found = choice.logprobs
    assert found is not None and found.tokens is not None and found.text_offset is not None
    assert found.tokens[0] == BOS and "".join(found.tokens[1:]) == TEXT
    assert found.text_offset[:2] == [0, 0], "BOS has no text"
    for token, offset in zip(found.tokens[1:], found.text_offset[1:], strict=True):
        assert TEXT[offset:].startswith(token)


def test_a_stream_is_the_whole_answer_in_pieces(api: openai.OpenAI) -> None:
    asked: Any = {"model": "nano", "prompt": [TEXT, "Now"], "max_tokens": 12, "seed": 5, "n": 2, "logprobs": 2}
    whole = api.completions.create(**asked)
    texts, tokens, finish = [""] * 4, [[] for _ in range(4)], [None] * 4
    usage = None
    for chunk in api.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.token_logprobs
            finish[choice.index] = choice.finish_reason
    assert [c.text for c in whole.choices] == texts
    assert [c.logprobs.token_logprobs for c in whole.choices] == tokens
    assert [c.finish_reason for c in whole.choices] == finish
    assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens


def test_stop_strings_are_cut_wherever_they_lie(api: openai.OpenAI) -> None:
    def ask(seed: int, **more: Any) -> Any:
        return api.completions.create(model="nano", prompt=TEXT, max_tokens=60, seed=seed, **more)

    seed, free = next((s, text) for s in range(20) if len(text := ask(s).choices[0].text) > 100)
    for begin in (1, len(free) // 2, len(free) - 5):
        stop = free[begin : begin + 4]
        choice = ask(seed, stop=stop).choices[0]
        assert (choice.text, choice.finish_reason) == (free[: free.index(stop)], "stop")
        pieces = ask(seed, stop=[stop], stream=True)
        assert "".join(c.choices[0].text for c in pieces) == choice.text


def test_text_and_ids_are_the_same_prompt(api: openai.OpenAI, tokenizer: Tokenizer) -> None:
    one = api.completions.create(model="nano", prompt=TEXT, max_tokens=8, seed=1)
    other = api.completions.create(model="nano", prompt=[0, *tokenizer.encode(TEXT)], max_tokens=8, seed=1)
    assert one.choices[0].text == other.choices[0].text
    bare = api.completions.create(
        model="nano", prompt=TEXT, max_tokens=8, seed=1, extra_body={"add_special_tokens": False}
    )
    assert bare.usage.prompt_tokens == one.usage.prompt_tokens - 1  # type: ignore[union-attr]


def test_filling_in_the_middle() -> None:
    class WithFim(Scripted):
        def special(self, text: str) -> int | None:
            return 7

    with serving(WithFim(lambda prompt: f"[{prompt}]")) as url:
        body = {"model": "deepseek-v4-pro", "prompt": "def f():", "suffix": "return x", "max_tokens": 400}
        status, answer = post(f"{url}/beta/completions", body)
        assert status == 200
        want = f"{BOS}<｜fim▁begin｜>def f():<｜fim▁hole｜>return x<｜fim▁end｜>"
        assert answer["choices"][0]["text"] == f"[{want}]"
    with serving(Scripted(lambda _: "x")) as url:
        status, answer = post(f"{url}/v1/completions", body)
        assert status == 400 and answer["error"]["param"] == "suffix"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"prompt": []}, 400), ({"prompt": [[]]}, 400), ({"prompt": [99999]}, 400), ({"prompt": [-1]}, 400),
        ({"prompt": 3}, 422), ({"prompt": ["a"] * 129}, 422), ({"logprobs": 21}, 422), ({"max_tokens": -1}, 422),
        ({"model": "other"}, 404), ({"prompt": [0] * 1_100_000}, 400), ({"temperature": "hot"}, 422),
    ],
)  # fmt: skip
def test_bad_requests(url: str, change: dict[str, Any], status: int) -> None:
    found, answer = post(f"{url}/v1/completions", {"model": "nano", "prompt": "a", **change})
    assert found == status and answer["error"]["message"]
    found, _ = post(f"{url}/v1/completions", {"model": "nano", "prompt": "a", **change, "stream": True})
    assert found == status


def test_tokens_over_http(url: str, tokenizer: Tokenizer) -> None:
    text = f"caf\u00e9 {USER} \U0001f600"
    status, answer = post(f"{url}/tokenize", {"prompt": text})
    assert status == 200 and answer["tokens"] == [0, *tokenizer.encode(text)]
    assert answer["count"] == len(answer["tokens"])
    assert tokenizer.special(USER) not in answer["tokens"], "text forges no special token"
    assert post(f"{url}/detokenize", {"tokens": answer["tokens"]}) == (200, {"prompt": BOS + text})
    status, answer = post(f"{url}/tokenize", {"messages": [{"role": "user", "content": "hi"}]})
    assert tokenizer.decode(answer["tokens"], keep_special=True) == f"{BOS}{USER}hi<｜Assistant｜><think>"
    with urllib.request.urlopen(f"{url}/tokenizer_info") as info:
        told = json.loads(info.read())
    assert (told["bos_token"], told["eos_token"]) == (BOS, EOS)
    for body in ({}, {"prompt": "a", "messages": []}, {"prompt": 3}, []):
        assert post(f"{url}/tokenize", body)[0] in (400, 422)
    assert post(f"{url}/detokenize", {"tokens": [4096]})[0] == 400


def test_more_tokens_than_there_can_be_are_clamped(model: Transformer, tokenizer: Tokenizer) -> None:
    """Agents ask for 256,000 tokens; a small memory is no reason to refuse them, but a long prompt is."""
    memory = model.new_memory(pages=0, slots=0)
    engine = Engine(
        model, budget=2 * memory.page_bytes + 2 * memory.slot_bytes, slots=2, token_bytes=tokenizer.token_bytes
    )
    completer = LocalCompleter(engine, tokenizer, "nano")
    with serving(completer) as url:
        body = {"model": "nano", "prompt": [0] * 250, "max_tokens": 10**9, "logit_bias": {"1": -100}}
        status, answer = post(f"{url}/v1/completions", body)
        assert status == 200 and answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 256 - 250
        status, answer = post(f"{url}/v1/completions", {**body, "prompt": [0] * 257})
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    completer.close()
