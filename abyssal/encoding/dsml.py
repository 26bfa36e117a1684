"""DSML: the markup in which V4 sees tools and writes calls (encoding.md 3)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from abyssal.encoding.literals import DSML, THINK_END, THINK_START
from abyssal.encoding.messages import ToolCall

_TOOLS = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, \
arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK_START}), you MUST output your complete reasoning inside \
{THINK_START}...{THINK_END} BEFORE any tool calls or final response.

Otherwise, output directly after {THINK_END} with tool calls or final response.

### Available Tool Schemas

"""
_AFTER_TOOLS = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
BEFORE_CALLS = "\n\n"


def as_json(value: Any) -> str:
    """JSON as the official encoder writes it."""
    return json.dumps(value, ensure_ascii=False)


def tools_section(functions: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """The section that names the tools: template, the schemas (a caller's text), template."""
    return _TOOLS, "\n".join(as_json(function) for function in functions), _AFTER_TOOLS


def parameters_of(arguments: str) -> dict[str, Any]:
    """The parameters of a call; text that is no JSON object becomes one parameter named `arguments`."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


def calls(tool_calls: Sequence[ToolCall]) -> list[tuple[str, bool]]:
    """The block of calls behind an answer: stretches of text, and whether each is a caller's own."""
    parts: list[tuple[str, bool]] = [(f"{BEFORE_CALLS}<{DSML}tool_calls>\n", False)]
    for call in tool_calls:
        parts += [(f'<{DSML}invoke name="', False), (call.name, True), ('">\n', False)]
        parameters = parameters_of(call.arguments)
        for i, (key, value) in enumerate(parameters.items()):
            text = isinstance(value, str)
            parts += [
                ("\n" if i else "", False),
                (f'<{DSML}parameter name="', False),
                (key, True),
                (f'" string="{"true" if text else "false"}">', False),
                (value if text else as_json(value), True),
                (f"</{DSML}parameter>", False),
            ]
        parts.append((f"\n</{DSML}invoke>\n", False))
    parts.append((f"</{DSML}tool_calls>", False))
    return parts
