"""The official agent, `deepseek-harness-sdk`, completes a tool turn against our server (own marker: it is large).

    python -m venv V && V/bin/pip install --pre deepseek-harness-sdk
    DSH_PYTHON=V/bin/python python -m pytest -m harness tests/server/test_harness.py

The model is scripted: what is tested is that the agent accepts our wire and we accept its requests.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from abyssal.encoding.literals import DSML
from tests.server.serving import Scripted, serving

AGENT = """
import json, sys
from deepseek_harness import DeepSeekHarness

with DeepSeekHarness(
    dsh_home=sys.argv[1], cwd=sys.argv[2], profile="sdk-minimal", provider="deepseek-official",
    model="deepseek-v4-flash", reasoning_effort="high", base_url=sys.argv[3], api_key="none",
) as harness:
    result = harness.run("Which number is in the file?", session_id="one")
print(json.dumps({"text": result.final_response, "finish": result.finish_reason}))
"""


@pytest.mark.harness
def test_the_official_agent_calls_its_shell_and_reads_the_result(tmp_path: Path) -> None:
    python = os.environ.get("DSH_PYTHON")
    assert python, "set DSH_PYTHON to a Python that has deepseek-harness-sdk"
    work = tmp_path / "work"
    work.mkdir()
    (work / "number.txt").write_text("61847\n")

    def script(prompt: str) -> str:
        results = re.findall(r"<tool_result>(.*?)</tool_result>", prompt, re.S)
        thought = "I look. " if not results else "I have it. "
        think = f"{thought}</think>" if prompt.endswith("<think>") else ""
        if not results:
            return (
                f'{think}Let me see.\n\n<{DSML}tool_calls>\n<{DSML}invoke name="bash">\n'
                f'<{DSML}parameter name="command" string="true">cat number.txt</{DSML}parameter>\n'
                f"</{DSML}invoke>\n</{DSML}tool_calls>"
            )
        number = re.search(r"\d{5}", results[-1])
        return f"{think}The number is {number.group() if number else results[-1]}."

    scripted = Scripted(script)
    with serving(scripted) as url:
        done = subprocess.run(
            [python, "-c", AGENT, str(tmp_path / "home"), str(work), f"{url}/anthropic"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == {"text": "The number is 61847.", "finish": "completed"}
    assert "<think>I look. </think>Let me see." in scripted.prompts[-1], "its reasoning came back"
