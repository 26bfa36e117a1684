"""The page under /docs: every route with its fields and a line to try it, made on the server without scripts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from abyssal.server.openapi import JSON, Operation, describe, plain
from abyssal.server.settings import Settings

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <meta name="referrer" content="no-referrer">
  <title>Routes of abyssal</title>
  <link rel="icon" href="web/favicon.svg" type="image/svg+xml">
  <link rel="stylesheet" href="web/base.css">
  <link rel="stylesheet" href="web/docs.css">
</head>
<body>
  <header class="docs-head">
    <a class="brand" href="./"><img src="web/favicon.svg" alt="">abyssal</a>
    <a href="openapi.json">openapi.json</a>
  </header>
  <main class="docs">
    <h1>Routes</h1>
{about}
{contents}
{operations}
  </main>
</body>
</html>
"""


def page(operations: Iterable[Operation], settings: Settings, model: str, url: str) -> str:
    """The whole page.

    Args:
        model: the name that examples use.
        url: where the server was called, for the examples.
    """
    operations = list(operations)
    description = describe(operations, settings)
    about = "\n".join(f"    <p>{_prose(line)}</p>" for line in description["info"]["description"].split("\n\n"))
    if settings.api_keys:
        key = "Requests need a key, as <code>Authorization: Bearer KEY</code> or <code>x-api-key: KEY</code>."
        about += f"\n    <p>{key}</p>"
    links = []
    sections = []
    for group, members in groupby(operations, key=lambda operation: operation.group):
        shown = list(members)
        items = "".join(
            f'<li><a href="#{_anchor(operation)}"><code>{escape(plain(operation.paths[0]))}</code></a></li>'
            for operation in shown
        )
        links.append(f"      <div><h2>{escape(group)}</h2><ul>{items}</ul></div>")
        sections.append(f"    <h2>{escape(group)}</h2>")
        sections += [_section(operation, description, settings, model, url) for operation in shown]
    contents = '    <nav aria-label="Routes">\n' + "\n".join(links) + "\n    </nav>"
    return _PAGE.format(about=about, contents=contents, operations="\n".join(sections))


def _section(
    operation: Operation, description: Mapping[str, Any], settings: Settings, model: str, url: str
) -> str:
    path = plain(operation.paths[0])
    told = description["paths"][path][operation.method.lower()]
    schemas = description["components"]["schemas"]
    lines = [
        f'    <section id="{_anchor(operation)}">',
        f"      <h3><b>{operation.method}</b> <code>{escape(path)}</code></h3>",
        f"      <p>{escape(operation.summary)}.</p>",
    ]
    if len(operation.paths) > 1:
        others = ", ".join(f"<code>{escape(plain(other))}</code>" for other in operation.paths[1:])
        lines.append(f'      <p class="hint">The same: {others}.</p>')
    if operation.event is not None:
        streams = 'With <code>"stream": true</code> the answer comes as server-sent events.'
        lines.append(f'      <p class="hint">{streams}</p>')
    for parameter in told.get("parameters", ()):
        name, place, text = parameter["name"], parameter["in"], parameter["description"]
        lines.append(f"      <p><code>{escape(name)}</code>, in the {place}: {escape(text)}</p>")
    if operation.body is not None:
        lines.append(_table("Fields of the body", _rows(told["requestBody"]["content"][JSON]["schema"], schemas)))
    for media, content in told["responses"]["200"]["content"].items():
        shown = _rows(content["schema"], schemas) if media == JSON else []
        if shown:
            lines.append(_table("Fields of the answer", shown, folded=True))
    refusals = [
        f"<dt>{status}</dt><dd>{escape(response['description'])}</dd>"
        for status, response in told["responses"].items()
        if status != "200"
    ]
    if refusals:
        lines.append(f"      <details><summary>Refusals</summary><dl>{''.join(refusals)}</dl></details>")
    lines.append(f"      <pre tabindex=\"0\"><code>{escape(curl(operation, settings, model, url))}</code></pre>")
    lines.append("    </section>")
    return "\n".join(lines)


def curl(operation: Operation, settings: Settings, model: str, url: str) -> str:
    """A line for the shell that tries the route."""
    path = plain(operation.paths[0]).replace("{name}", model).replace("{id}", "ID")
    words = ["curl", "-s", shlex.quote(url + path)]
    if settings.api_keys and not operation.free:
        words += ["-H", '"Authorization: Bearer $KEY"']
    if operation.body is not None:
        named = {"model": model} if "model" in operation.body.model_fields else {}
        example = json.dumps(named | dict(operation.example))
        words += ["-H", "'Content-Type: application/json'", "-d", shlex.quote(example)]
    return " ".join(words)


def _anchor(operation: Operation) -> str:
    words = plain(operation.paths[0]).replace("{", "").replace("}", "").split("/")
    return "-".join(word for word in words if word)


def _prose(text: str) -> str:
    """Text with code between backticks."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _table(title: str, rows: Sequence[tuple[str, str, str]], *, folded: bool = False) -> str:
    body = "".join(
        f"<tr><th scope=\"row\"><code>{escape(name)}</code></th><td>{escape(kind)}</td><td>{escape(need)}</td></tr>"
        for name, kind, need in rows
    )
    head = '<thead><tr><th scope="col">Field</th><th scope="col">Value</th><th scope="col"></th></tr></thead>'
    table = f'<div class="scrolls" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>'
    opened = "" if folded else " open"
    return f"      <details{opened}><summary>{escape(title)}</summary>{table}</details>"


def _resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in schema:
        schema = schemas[schema["$ref"].rsplit("/", 1)[1]]
    return schema


def _choices(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a value may be, without null."""
    schema = _resolved(schema, schemas)
    found = [_resolved(choice, schemas) for choice in schema.get("anyOf", [schema])]
    return [choice for choice in found if choice.get("type") != "null"]


def _rows(schema: Mapping[str, Any], schemas: Mapping[str, Any], before: str = "") -> list[tuple[str, str, str]]:
    """Fields with what they may be and whether they must be there; those of objects inside follow their own."""
    rows = []
    for choice in _choices(schema, schemas):
        if "items" in choice:
            rows += _rows(choice["items"], schemas, before.removesuffix(".") + "[].")
        for name, inner in choice.get("properties", {}).items():
            need = "required" if name in choice.get("required", ()) else ""
            rows.append((before + name, _kind(inner, schemas), need))
            rows += _rows(inner, schemas, f"{before}{name}.")
    return rows


def _kind(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    """What a value may be, in words."""
    return " or ".join(dict.fromkeys(_one_kind(choice, schemas) for choice in _choices(schema, schemas))) or "null"


def _one_kind(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    allowed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if allowed:
        return ", ".join(json.dumps(value) for value in allowed)
    kind = schema.get("type", "anything")
    if "prefixItems" in schema:
        return f"list: {', '.join(_kind(item, schemas) for item in schema['prefixItems'])}"
    if kind == "array":
        return "list of " + _kind(schema.get("items", {}), schemas).replace("object", "objects")
    names = {"string": "text", "object": "object", "boolean": "true or false"}
    limits = {
        "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
    }  # fmt: skip
    bounds = [f"{words} {schema[key]:g}" for key, words in limits.items() if key in schema]
    return ", ".join([names.get(kind, kind), *bounds])
