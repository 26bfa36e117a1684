"""What the trace page is told, with the real engine behind: prompt tokens, sampled ones, chosen blocks."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import openai

from abyssal.chat.local import LocalCompleter
from abyssal.checkpoint.load import load_model
from abyssal.cli.models import bundled_folder
from abyssal.encoding.messages import Message
from abyssal.encoding.render import render
from abyssal.encoding.tokenizer import Tokenizer
from abyssal.engine.engine import Engine
from abyssal.server.settings import Settings
from tests.server.serving import serving


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.loads(answer.read())


def test_a_trace_tells_tokens_and_blocks() -> None:
    model = load_model(bundled_folder()).requires_grad_(False)
    tokenizer = Tokenizer(bundled_folder())
    completer = LocalCompleter(Engine(model, budget=1 << 28, slots=4), tokenizer, "nano")
    layers = sum(ratio == 4 for ratio in model.config.backbone_ratios)
    text = "In the beginning God created the heaven and the earth. " * 40
    with serving(completer, Settings(traces=2)) as url:
        api = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        raw = api.chat.completions.with_raw_response.create(
            model="nano", messages=[{"role": "user", "content": text}], max_tokens=12, seed=2, logprobs=True,
            top_logprobs=2,
        )  # fmt: skip
        answer = raw.parse()
        trace = get(f"{url}/traces/{raw.headers['x-request-id']}")
        prompt = tokenizer.encode_pieces(render([Message("user", text)], thinking=True, effort="high"))
        assert trace["prompt"]["ids"] == prompt and len(trace["prompt"]["texts"]) == len(prompt)
        assert trace["prompt"]["texts"][-1] == "<think>" and trace["ratio"] == 4
        (told,) = trace["answers"]
        assert told["finish_reason"] == "length" and len(told["tokens"]) == 12
        assert told["tokens"][0]["kind"] == "reasoning"
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        for place, (token, shown) in enumerate(zip(told["tokens"], logprobs.content, strict=True)):
            assert token["logprob"] == shown.logprob and len(shown.top_logprobs) == 2
            assert [p for _, _, p in token["top"][:2]] == [entry.logprob for entry in shown.top_logprobs]
            seen = (len(prompt) + place) // 4
            assert len(token["blocks"]) == layers
            for blocks in token["blocks"]:
                assert len(blocks) == min(model.config.index_topk, seen) and max(blocks) < seen
        for _ in range(2):
            api.chat.completions.create(model="nano", messages=[{"role": "user", "content": "x"}], max_tokens=2)
        kept = get(f"{url}/traces")["traces"]
        assert len(kept) == 2 and trace["id"] not in [one["id"] for one in kept], "the oldest is gone"
    completer.close()
