"""`abyssal train` through the real program: a run, its end by SIGTERM, its export, its report, bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from abyssal.train.recipe import names
from tests.cli.program import abyssal
from tests.train.small import MODEL

RECIPE = f"""{MODEL}vocab_size = 64

[pretrain]
tokens = 200
[pretrain.schedule]
steps = 6
[pretrain.sources.pairs]
kind = "pairs"
weight = 1
lengths = [32, 64]

[sft]
start = "pretrain"
tokens = 200
[sft.schedule]
steps = 2
[sft.sources.pairs]
kind = "pairs"
weight = 1
seed = 1
lengths = [32, 64]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ABYSSAL_HOME", str(tmp_path / "home"))
    path = tmp_path / "small.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_stage_is_trained_and_its_weights_are_a_release(recipe: Path, tmp_path: Path) -> None:
    first = abyssal("train", "pretrain", "--recipe", recipe, "--set", "pretrain.bfloat16_muon=true")
    run = tmp_path / "home" / "train" / "runs" / "small" / "pretrain"
    assert first.stdout.startswith("finished: step 6") and str(run / "report.html") in first.stdout
    assert first.stderr.count("Muon orthogonalises in ") == 1
    assert "step 6/6" in first.stderr and "tokens/s" in first.stderr
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    assert (run / "report.html").is_file()
    abyssal("train", "sft", "--recipe", recipe)
    out = tmp_path / "release"
    assert "step_00000002" in abyssal("train", "export", run.parent / "sft", "--out", out).stdout
    logits = tmp_path / "logits.npy"
    abyssal("logits", out, "--ids", "3,4,5", "--out", logits)
    assert logits.is_file()
    assert str(run / "report.html") in abyssal("train", "report", run).stdout


def test_a_stopped_run_goes_on(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", "from abyssal.cli.main import main; main()", "train", "pretrain"]
    command += ["--recipe", str(recipe), "--run", str(run), "--set", "pretrain.schedule.steps=100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        assert process.stderr.readline().startswith("step 1/")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert process.stdout.read().startswith("stopped, and saved: step ")
    done = steps(run)
    assert done == list(range(1, done[-1] + 1))
    refused = abyssal("train", "pretrain", "--recipe", recipe, "--run", run, code=2)
    assert "other rules (schedule.steps)" in refused.stderr


def test_torchrun_trains_on_two_processes(recipe: Path, tmp_path: Path) -> None:
    """Only the first one talks and writes the report; one process exports what two have trained."""
    home = tmp_path / "home" / "train" / "runs" / "small"
    program = [sys.executable, "-c", "from abyssal.cli.main import main; main()"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    asked = ["train", "pretrain", "--recipe", str(recipe), "--set", "pretrain.passes=2", "--experts", "2"]
    command = [*launcher, "--no-python", "--", *program, *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: step 6") == 1 == done.stderr.count("step 6/6")
    assert steps(home / "pretrain") == [1, 2, 3, 4, 5, 6]
    assert (home / "pretrain" / "report.html").is_file()
    out = tmp_path / "release"
    assert "step_00000006" in abyssal("train", "export", home / "pretrain", "--out", out).stdout
    alone = abyssal("train", "pretrain", "--recipe", recipe, "--experts", "2", code=2)
    assert "start with torchrun" in alone.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["pretrain", "--recipe", "giant"], f"use {', '.join(names())}"),
        (["pretrain", "--set", "pretrain.speed=3"], "unknown key speed"),
        (["pretrain"], "tokenizer.json does not exist"),
        (["pretrain", "--recipe", "test", "--track", "paper", "--set", "pretrain.schedule.steps=1"], "no sink 'paper'"),
        (["sft", "--recipe", "test"], "has no [sft]"),
        (["data", "--no-debian", "--against", "nowhere.jsonl"], "nowhere.jsonl is no evaluation set"),
        (["data", "--no-debian", "--against", "/dev/null", "--against", "/dev/null"], "sets are called null"),
        (["export", "nowhere", "--out", "x"], "nowhere has no checkpoint"),
        (["report", "nowhere"], "nowhere holds no run"),
    ],
)
def test_bad_input_is_a_line(recipe: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    assert told in abyssal("train", *arguments, code=2, cwd=tmp_path).stderr


def test_a_score_is_one_object_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABYSSAL_HOME", str(tmp_path / "home"))
    asked = ["train", "score", "nano", "--suite", "copying", "--suite", "chat", "--out", tmp_path / "card"]
    found = json.loads(abyssal(*asked, "--json").stdout)
    assert found["suites"].keys() == {"copying", "chat"}
    assert json.loads((tmp_path / "card" / "scores.json").read_text()) == found
    assert "no plan 'huge'" in abyssal("train", "score", "--plan", "huge", code=2).stderr
    assert "no suite is called games" in abyssal("train", "score", "--suite", "games", code=2).stderr
    assert "bits per byte need" in abyssal("train", "score", "--suite", "bits", code=2).stderr


def test_a_plan_is_computed_and_says_so() -> None:
    assert abyssal("train", "plan", "flash", "--gpus", "256").stdout.startswith("computed, not measured: 256 x GPU")
    found = json.loads(abyssal("train", "plan", "flash", "--gpus", "256", "--mfu", "0.5", "--json").stdout)
    assert found["computed"] is True and found["gpus"] == 256
    assert found["tokens_per_s"] == pytest.approx(0.5 * 495e12 * 256 / found["flops"])
    assert "at least" in abyssal("train", "plan", "flash", "--gpus", "2", code=2).stderr
