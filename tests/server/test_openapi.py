"""The description under /openapi.json against the real server: generated requests to every route, good and bad.

Each answer must have a status, a media type, headers and a shape that the description names; a body that its schema
does not allow must be refused, and one that it allows must be answered, once fields whose values the schema leaves
open (such as the model's name) have a value that means something. Streams are read whole; each of their events is
held against its schema too.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route

from abyssal.encoding.literals import DSML
from abyssal.server import openapi
from abyssal.server.app import Server
from abyssal.server.settings import Settings, keys
from tests.server.serving import Scripted, serving

EXAMPLES = 30  # of each route


def completer() -> Scripted:
    return Scripted(lambda prompt: "I think.</think>So it is." if prompt.endswith("<think>") else "So it is.")


SERVER = Server(completer())
DESCRIPTION = openapi.describe(SERVER.operations(), SERVER.settings)
BODIES = {openapi.plain(path): operation.body for operation in SERVER.operations() for path in operation.paths}
schema = schemathesis.openapi.from_dict(DESCRIPTION)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
          response_schema_conformance, negative_data_rejection]  # fmt: skip

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
QUESTION = [{"role": "user", "content": "hi"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
# values for fields that the schema leaves open; None where no other value means anything here
OPEN: dict[str, list[Any]] = {
    "model": ["nano", "deepseek-v4-pro", "deepseek-chat", "claude-opus-5"],
    "messages": [QUESTION, PARTS],
    "input": ["hi", QUESTION],
    "prompt": ["hi", ["hi", "ho"], [72, 105], [[72], [105]]],
    "suffix": [None],
    "tokens": [[], [72, 105]],
    "tool_choice": ["auto", "none"],
    "response_format": [{"type": "text"}],
    "text": [{"format": {"type": "text"}}],
    "output_config": [{"effort": "low"}, {}],
    "reasoning": [{"effort": "none"}, {"effort": "max"}, {}],
    "reasoning_effort": ["none", "minimal", "xhigh", "ultra"],
    "chat_template_kwargs": [{"thinking": False}, {"other": 1}],
    "system": ["Be brief.", [{"type": "text", "text": "Be brief."}]],
    "logit_bias": [{"72": -1.5}],
    "include": [["message.output_text.logprobs"]],
    "previous_response_id": [None],
    "stop": ["it", ["so", "it"]],
    "stop_sequences": [["it"]],
    "n": [1, 3],
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(completer()) as address:
        yield address


def tool(path: str) -> dict[str, Any]:
    """A tool as the API of this path has it."""
    if "/messages" in path:
        return {"name": "f", "input_schema": PARAMETERS}
    if "/responses" in path:
        return {"type": "function", "name": "f", "parameters": PARAMETERS}
    return {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}


def with_meaning(body: dict[str, Any], path: str, draw: Any) -> dict[str, Any]:
    """The body with a value that means something in each field whose schema says little."""
    made = dict(body)
    for name in OPEN:
        if made.get(name) is not None:
            made[name] = draw(st.sampled_from(OPEN[name]))
    if made.get("tools"):
        made["tools"] = [tool(path)]
    if made.get("tool_choice") and "/messages" in path:
        made["tool_choice"] = {"type": made["tool_choice"]}
    if made.get("top_logprobs") is not None and "chat" in path:
        made["logprobs"] = True  # one needs the other, which a schema could say only at length
    if path == "/tokenize":
        made = {"messages": QUESTION} if made.get("messages") else {"prompt": "hi"}
    return made


def only_converted(sent: bytes, path: str) -> bool:
    """Whether a body is accepted because numbers may come as text and the like, which the description says."""
    model = BODIES[path]
    if model is None:
        return False
    try:
        model.model_validate(json.loads(sent))
    except ValueError:
        return False
    try:
        model.model_validate_json(sent, strict=True)
    except ValidationError:
        return True
    return False


@schema.given(data=st.data())
@schema.parametrize()
@settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
def test_routes_do_what_the_description_says(case: Any, data: Any, url: str) -> None:
    path = case.path
    good = case.meta.generation.mode.is_positive
    if "name" in case.path_parameters and good:
        case.path_parameters["name"] = data.draw(st.sampled_from(["nano", "claude-opus-5", "gpt-5"]))
    if good and isinstance(case.body, dict):
        case.body = with_meaning(case.body, path, data.draw)
    answer = case.call(base_url=url)
    converted = not good and only_converted(answer.request.body, path)
    case.validate_response(answer, checks=[c for c in CHECKS if not (converted and c is negative_data_rejection)])
    if good and BODIES[path] is not None:
        assert answer.status_code == 200, (case.body, answer.text)


def get(url: str, **headers: str) -> tuple[str, Mapping[str, str]]:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        return answer.read().decode(), answer.headers


def test_the_description_is_openapi_and_is_what_the_server_sends(url: str) -> None:
    schema.validate()
    for shape in DESCRIPTION["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(shape)
    assert json.loads(get(f"{url}/openapi.json")[0]) == DESCRIPTION
    ids = [operation["operationId"] for path in DESCRIPTION["paths"].values() for operation in path.values()]
    assert len(set(ids)) == len(ids)


def test_every_route_is_described() -> None:
    pages = {"/", "/trace", "/docs", "/openapi.json", "/web/{name}"}
    routes = {openapi.plain(route.path) for route in SERVER.app().routes if isinstance(route, Route)}
    assert routes == set(DESCRIPTION["paths"]) | pages


def check(url: str, method: str, path: str, **parts: Any) -> Any:
    """Send one request, and hold the answer against the description."""
    answer = schema[path][method].Case(**parts).call_and_validate(base_url=url, checks=CHECKS)
    assert answer.status_code == 200
    return answer


def test_a_trace_has_the_described_shape(url: str) -> None:
    body = {"model": "nano", "messages": QUESTION}
    answer = check(url, "POST", "/v1/chat/completions", body=body, media_type="application/json")
    (number,) = answer.headers["x-request-id"]
    assert number in check(url, "GET", "/traces").text
    assert number in check(url, "GET", "/traces/{id}", path_parameters={"id": number}).text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_tool_call_has_the_described_shape(path: str, stream: bool) -> None:
    calls = f'<{DSML}tool_calls>\n<{DSML}invoke name="f">\n</{DSML}invoke>\n</{DSML}tool_calls>'
    ask = {"input": "hi"} if "responses" in path else {"messages": QUESTION, "max_tokens": 500}
    body = {"model": "nano", "tools": [tool(path)], "stream": stream, **ask}
    with serving(Scripted(lambda _: f"Thinking.</think>Now.\n\n{calls}")) as url:
        answer = check(url, "POST", path, body=body, media_type="application/json")
        assert '"f"' in answer.text


def test_keys_and_budgets_are_described_where_there_are_some() -> None:
    limits = Settings(api_keys=keys(["k"]), tokens_per_key=9)
    told = openapi.describe(SERVER.operations(), limits)
    assert set(told["components"]["securitySchemes"]) == {"bearer", "x-api-key"}
    assert "securitySchemes" not in DESCRIPTION["components"]
    chat, health = told["paths"]["/v1/chat/completions"]["post"], told["paths"]["/health"]["get"]
    assert chat["security"] == [{"bearer": []}, {"x-api-key": []}] and "security" not in health
    assert {"401", "402"} <= set(chat["responses"]) and "401" not in health["responses"]
    assert not {"401", "402"} & set(DESCRIPTION["paths"]["/v1/chat/completions"]["post"]["responses"])


def test_the_page_lists_every_route_and_asks_nobody_else() -> None:
    with serving(completer(), Settings(api_keys=keys(["k"]))) as url:
        text, headers = get(f"{url}/docs")
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        for path in DESCRIPTION["paths"]:
            assert f"<code>{path}</code>" in text
        for field in ("reasoning_effort", "stop_sequences", "previous_response_id", "add_special_tokens"):
            assert f"<code>{field}</code>" in text
        assert f"curl -s {url}/v1/messages -H &quot;Authorization: Bearer $KEY&quot;" in text
        assert "<script" not in text and "<style" not in text and "style=" not in text
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            assert not re.match(r"https?:|//", link)
            if not link.startswith("#"):
                assert get(f"{url}/{link.removeprefix('./')}")[0]
            else:
                assert f'id="{link[1:]}"' in text


def test_the_page_shows_a_host_as_text(url: str) -> None:
    text, _ = get(f"{url}/docs", Host='x"><script>alert(1)</script>')
    assert "<script" not in text
