"""The command contract (design.md 7), through the real program."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from abyssal.cli.models import bundled_folder
from abyssal.encoding.tokenizer import Tokenizer
from tests.cli.program import abyssal

INSPECT_KEYS = {
    "tensors", "bytes", "parameters", "active_parameters", "context", "kv_bytes_per_token", "kv_bytes",
    "kv_fixed_bytes", "flops_per_token", "kv_vs_v32", "kv_vs_gqa8", "flops_vs_v32",
}  # fmt: skip
GENERATE_KEYS = {
    "text", "tokens", "logprobs", "finish_reason", "prompt_tokens", "cached_tokens", "recomputed_tokens",
    "cache_reason", "first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s", "drafted_tokens",
    "accepted_tokens",
}  # fmt: skip


def test_inspect_presets_and_folders() -> None:
    found = json.loads(abyssal("inspect", "flash", "--json").stdout)
    assert found.keys() >= INSPECT_KEYS
    assert (found["tensors"], found["bytes"]) == (69187, 159609485896)
    assert found["context"] == 1_000_000
    assert found["kv_vs_v32"] == pytest.approx(0.0731, abs=5e-5)
    assert found["flops_vs_v32"] == pytest.approx(0.1017, abs=5e-5)
    pro = json.loads(abyssal("inspect", "pro", "--context", "1048576", "--json").stdout)
    assert pro["flops_vs_v32"] == pytest.approx(0.2674, abs=5e-5)
    folder = json.loads(abyssal("inspect", bundled_folder(), "--json").stdout)
    stored = sum(p.stat().st_size for p in bundled_folder().glob("*.safetensors"))
    assert 0 < stored - folder["bytes"] < 200_000  # headers
    assert stored < 18_000_000
    assert 2e6 < folder["active_parameters"] < 6e6


def test_inspect_for_people_and_its_plot(tmp_path: Path) -> None:
    text = abyssal("inspect", "pro", "--plot", tmp_path / "cost.png").stdout
    assert "10.47% of V3.2" in text and "27.07% of V3.2" in text
    assert (tmp_path / "cost.png").read_bytes()[:4] == b"\x89PNG"


def test_generate_with_the_bundled_model() -> None:
    arguments = ("generate", "--prompt", "In the beginning", "--max-tokens", "24", "--seed", "3", "--json")
    first, second = (json.loads(abyssal(*arguments).stdout) for _ in range(2))
    assert first.keys() == GENERATE_KEYS
    assert first["tokens"] == second["tokens"] and first["logprobs"] == second["logprobs"]
    assert len(first["tokens"]) == len(first["logprobs"]) <= 24
    tokenizer = Tokenizer(bundled_folder())
    assert first["text"] == tokenizer.decode(first["tokens"])
    assert first["prompt_tokens"] == 1 + len(tokenizer.encode("In the beginning"))
    plain = abyssal("generate", "--prompt", "In the beginning", "--max-tokens", "24", "--seed", "3").stdout
    assert plain == first["text"] + "\n"


def test_a_second_question_about_a_file_reuses_it(tmp_path: Path) -> None:
    """Through the disk, in a process of its own; a changed file is used up to the change."""
    home = {**os.environ, "ABYSSAL_HOME": str(tmp_path / "home")}
    text = " ".join(f"Then number {i} came to the well, and drew water." for i in range(120))
    book = tmp_path / "book.txt"
    book.write_text(text, encoding="utf-8")
    arguments = ("generate", "--context", book, "--max-tokens", "5", "--temperature", "0", "--json", "--prompt")
    first = json.loads(abyssal(*arguments, " And", env=home).stdout)
    again = json.loads(abyssal(*arguments, " And", env=home).stdout)
    fresh = json.loads(abyssal(*arguments, " But", "--no-disk-cache", env=home).stdout)
    other = json.loads(abyssal(*arguments, " But", env=home).stdout)
    assert first["cached_tokens"] == fresh["cached_tokens"] == 0 < 1000 < again["cached_tokens"]
    assert again["cached_tokens"] % 128 == 0 and first["prompt_tokens"] - again["cached_tokens"] <= 128
    for name in ("tokens", "logprobs"):
        assert again[name] == first[name] and other[name] == fresh[name]
    assert other["cached_tokens"] == again["cached_tokens"]
    edited = tmp_path / "edited.txt"
    edited.write_text(text.replace("number 60", "No. 60"), encoding="utf-8")
    part = json.loads(abyssal(*arguments[:2], edited, *arguments[3:], " And", env=home).stdout)
    assert 0 < part["cached_tokens"] < again["cached_tokens"]
    assert abyssal("cache", "stats", "--json", env=home).stdout.count("entries") == 1
    assert json.loads(abyssal("cache", "stats", "--json", env=home).stdout)["entries"] > 5
    found = json.loads(abyssal("cache", "diff", book, edited, "--json", env=home).stdout)
    assert found["reused_tokens"] == part["cached_tokens"]
    assert found["common_tokens"] // 128 * 128 == found["reused_tokens"]
    assert found["a_next"].strip().startswith("number") and found["b_next"].strip().startswith("No")
    text_out = abyssal("cache", "diff", book, edited, env=home).stdout
    assert f"part at token {found['common_tokens']}" in text_out
    assert "equal" in abyssal("cache", "diff", book, book, env=home).stdout
    abyssal("cache", "clear", env=home)
    assert json.loads(abyssal("cache", "stats", "--json", env=home).stdout)["entries"] == 0


def test_serve_answers_and_ends_when_asked(tmp_path: Path) -> None:
    import openai

    command = [sys.executable, "-c", "from abyssal.cli.main import main; main()", "serve", "--port", "0"]
    process = subprocess.Popen([*command, "--cache-memory", "512MiB"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline().decode()
        assert line.startswith("listening on http://127.0.0.1:")
        with openai.OpenAI(base_url=line.split()[-1] + "/v1", api_key="none") as client:
            answer = client.chat.completions.create(
                model="nano", messages=[{"role": "user", "content": "hello"}], max_tokens=5
            )
        assert answer.usage is not None and answer.usage.completion_tokens <= 5
        port = line.strip().rsplit(":", 1)[1]
        assert "choose another port" in abyssal("serve", "--port", port, code=2).stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(40) in (0, 130)
        assert b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    assert "give --api-key" in abyssal("serve", "--host", "0.0.0.0", code=2).stderr


def test_encode_and_parse(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden"
    case = json.loads((golden / "official_1.json").read_text(encoding="utf-8"))
    (tmp_path / "all.json").write_text(json.dumps(case["input"]))
    (tmp_path / "messages.json").write_text(json.dumps(case["input"]["messages"]))
    (tmp_path / "tools.json").write_text(json.dumps(case["input"]["tools"]))
    whole = abyssal("encode", tmp_path / "all.json", "--thinking").stdout
    parts = abyssal("encode", tmp_path / "messages.json", "--tools", tmp_path / "tools.json", "--thinking").stdout
    assert whole == parts == case["expected_prompt"]
    (tmp_path / "ask.json").write_text('[{"role": "user", "content": "news"}]')
    assert abyssal("encode", tmp_path / "ask.json", "--task", "query").stdout.endswith("news<｜query｜>")
    effort = ("encode", tmp_path / "ask.json", "--thinking", "--effort", "max", "--snapshot")
    assert "Absolute maximum" in abyssal(*effort, "april").stdout
    assert "Beyond maximum" in abyssal(*effort, "0731").stdout
    wrong = [["--effort", "huge"], ["--snapshot", "may"], ["--task", "sing"]]
    for options in wrong:
        abyssal("encode", tmp_path / "ask.json", *options, code=2)
    (tmp_path / "bad.json").write_text("{")
    abyssal("encode", tmp_path / "bad.json", code=2)
    answer = whole[whole.index("<｜Assistant｜><think>") + len("<｜Assistant｜><think>") :]
    (tmp_path / "answer.txt").write_text(answer[: answer.index("<｜User｜>")], encoding="utf-8")
    found = json.loads(abyssal("parse", tmp_path / "answer.txt", "--thinking").stdout)
    assert found["tool_calls"][0]["function"]["name"] == "get_weather"
    assert json.loads(found["tool_calls"][0]["function"]["arguments"]) == {"location": "Beijing", "unit": "celsius"}
    (tmp_path / "none.json").write_text("[]")
    result = abyssal("parse", tmp_path / "answer.txt", "--thinking", "--tools", tmp_path / "none.json")
    assert not json.loads(result.stdout)["tool_calls"] and "rejected_call: no tool" in result.stderr


def test_generate_obeys_grammars_and_stop_strings(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "maxProperties": 1}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "yes.lark").write_text('start: "yes" | "no"')
    common = ("generate", "--prompt", "In the beginning", "--seed", "3", "--max-tokens", "60", "--json")
    found = json.loads(abyssal(*common, "--grammar", tmp_path / "yes.lark").stdout)
    assert found["text"] in ("yes", "no") and found["finish_reason"] == "stop"
    found = json.loads(abyssal(*common, "--schema", tmp_path / "schema.json").stdout)
    assert found["finish_reason"] == "length" or isinstance(json.loads(found["text"])["n"], int)
    free = json.loads(abyssal(*common).stdout)["text"]
    found = json.loads(abyssal(*common, "--stop", free[20:26]).stdout)
    assert found["text"] == free[: free.index(free[20:26])] and found["finish_reason"] == "stop"
    drafted = json.loads(abyssal(*common, "--drafts", "2").stdout)
    assert drafted["text"] == free and drafted["drafted_tokens"] >= drafted["accepted_tokens"] > 0
    (tmp_path / "bad.lark").write_text("start: ???")
    assert "lark is invalid" in abyssal(*common, "--grammar", tmp_path / "bad.lark", code=2).stderr
    abyssal(*common, "--grammar", tmp_path / "yes.lark", "--schema", tmp_path / "schema.json", code=2)


def test_the_bundled_model_knows_english() -> None:
    """Far better than chance on a held-out sentence, and than on the same words in another order."""
    tokenizer = Tokenizer(bundled_folder())
    from abyssal.checkpoint.load import load_model

    model = load_model(bundled_folder())

    def bits_per_byte(text: str) -> float:
        ids = [0, *tokenizer.encode(text)]
        logprobs = model(torch.tensor([ids])).log_softmax(-1)[0, :-1]
        return -float(logprobs.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).sum()) / len(text) / np.log(2)

    sentence = "And he said unto them, Go into the city, and when you have found the man, bring him to the house."
    shuffled = " ".join(sorted(sentence.split()))
    assert bits_per_byte(sentence) < 2.2
    assert bits_per_byte(sentence) < bits_per_byte(shuffled) - 0.3


def test_generate_from_file_and_ids(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("The module provides", encoding="utf-8")
    options = ("--max-tokens", "3", "--temperature", "0", "--json")
    tokenizer = Tokenizer(bundled_folder())
    ids = [0, *tokenizer.encode("The module provides")]
    from_file = json.loads(abyssal("generate", "--file", tmp_path / "prompt.txt", *options).stdout)
    from_ids = json.loads(abyssal("generate", "--ids", ",".join(map(str, ids)), *options).stdout)
    assert from_file["tokens"] == from_ids["tokens"]


def test_logits_of_a_made_release(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    small = json.loads((bundled_folder() / "config.json").read_text()) | {"vocab_size": 300, "n_routed_experts": 4}
    config.write_text(json.dumps(small))
    abyssal("make-release", config, "--seed", "7", "--layout", "flash", "--out", tmp_path / "r")
    out = tmp_path / "logits.npy"
    ids = "5,6,7,8,9,10,11,12,13"
    abyssal("logits", tmp_path / "r", "--ids", ids, "--dtype", "float64", "--out", out)
    whole = np.load(out)
    assert whole.shape == (9, 300) and whole.dtype == np.float64
    (tmp_path / "ids.txt").write_text(ids.replace(",", "\n"))
    abyssal(
        "logits", tmp_path / "r", "--ids-file", tmp_path / "ids.txt", "--dtype", "float64", "--chunks", "5,1,1,2",
        "--max-memory", "1GiB", "--out", out,
    )  # fmt: skip
    np.testing.assert_allclose(np.load(out), whole, rtol=0, atol=1e-12)
    abyssal("logits", tmp_path / "r", "--ids", ids, "--mode", "packed", "--mtp", "--out", out)
    assert np.load(out).shape == (8, 300) and np.load(out).dtype == np.float32
    abyssal("convert", tmp_path / "r", "--layout", "base", "--out", tmp_path / "b")
    abyssal("logits", tmp_path / "b", "--ids", ids, "--dtype", "float64", "--out", out)
    np.testing.assert_allclose(np.load(out), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "no-such-model"), "no-such-model"),
        (("inspect", "flash", "--context", "0"), "context is 0"),
        (("inspect", "flash", "--context", "2000000"), "2000000"),
        (("inspect", "flash", "--plot", "cost.xyz"), "cost.xyz"),
        (("generate",), "exactly one"),
        (("generate", "--prompt", "a", "--ids", "1"), "exactly one"),
        (("generate", "--ids", "1,x"), "'x'"),
        (("generate", "--ids", "99999"), "99999"),
        (("generate", "--ids", ""), "empty"),
        (("generate", "--prompt", "a", "--temperature", "-1"), "temperature"),
        (("generate", "--prompt", "a", "--max-tokens", "0"), "max_tokens"),
        (("generate", "--prompt", "a", "--model", "flash"), "preset without weights"),
        (("generate", "--file", "/no/such/file"), "/no/such/file"),
        (("generate", "--prompt", "a", "--max-memory", "10MiB"), "0.01 GiB: raise it"),
        (("serve", "--upstream", "http://127.0.0.1:1", "--max-memory", "1GiB"), "--max-memory"),
        (("logits", "nano", "--out", "x.npy"), "exactly one"),
        (("logits", "nano", "--ids", "1", "--out", "x.npy", "--dtype", "int4"), "int4"),
        (("logits", "nano", "--ids", "1", "--out", "x.npy", "--mode", "fast"), "fast"),
        (("logits", "nano", "--ids", "1", "--out", "x.npy", "--max-memory", "lots"), "lots"),
        (("logits", "nano", "--ids", "1,2", "--out", "x.npy", "--max-memory", "1MiB"), "GiB"),
        (("make-release", "nano", "--layout", "q8", "--out", "x"), "q8"),
        (("convert", "nano", "--layout", "0731", "--out", "x"), "0731"),
        (("nonsense",), "nonsense"),
        (("inspect", "flash", "--bogus"), "bogus"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert message in abyssal(*arguments, code=2, cwd=tmp_path).stderr
    assert not list(tmp_path.iterdir())


def test_failed_writing_is_code_1(tmp_path: Path) -> None:
    result = abyssal("logits", "nano", "--ids", "1", "--out", tmp_path / "no" / "dir" / "x.npy", code=1)
    assert "cannot write" in result.stderr and result.stderr.count("\n") == 1


def test_help_is_fast_and_loads_no_torch() -> None:
    script = "import sys, abyssal.cli.main; assert 'torch' not in sys.modules; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert "inspect" in abyssal("--help").stdout
    assert abyssal("--version").stdout.startswith("abyssal ")


def test_interrupt_is_code_130() -> None:
    code = "from abyssal.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "generate", "--prompt", "a", "--temperature", "0", "--max-tokens", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(1)  # it generates
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not stderr


def test_chat_in_a_terminal() -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-c", "from abyssal.cli.main import main; main()", "chat"]
    command += ["--max-tokens", "8", "--effort", "none", "--system", "You continue."]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    seen = b""

    def read_until(mark: bytes, count: int) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while seen.count(mark) < count and time.monotonic() < deadline:
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 4096)
        assert seen.count(mark) >= count, seen

    read_until(b"> ", 1)
    for line, prompts in ((b"In the beginning\n", 2), (b"and then?\n", 3), (b"/new\n", 4)):
        os.write(master, line)
        read_until(b"> ", prompts)
    assert b"length" in seen or len(seen) > 200, "it answered"
    os.write(master, b"\n")
    assert process.wait(30) == 0
    os.close(master)


def test_weights_that_do_not_fit_are_refused_or_kept_quantised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import abyssal.cli.models as models
    from abyssal.base.errors import InputError
    from abyssal.base.machine import Machine

    def with_memory(size: int) -> None:
        machine = Machine("cpu", "x", 2, size, size, size)
        monkeypatch.setattr(models, "this_machine", lambda *_: machine)

    from abyssal.engine.request import Request

    monkeypatch.setenv("ABYSSAL_HOME", str(tmp_path))
    with_memory(30 * 2**20)
    _, engine = models.open_model("nano", cache_bytes=2**28)
    assert engine.model.layers[0].attn.wq_b.state_dict()["weight"].dtype == torch.float8_e4m3fn
    _, stream = engine.stream(Request(prompt=(0, 100), max_tokens=3))
    assert len(list(stream)) >= 1
    with_memory(2**20)
    with pytest.raises(InputError, match="--max-memory"):
        models.open_model("nano")
