"""`abyssal train`: data, stages of a recipe, exports, reports."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from abyssal.base.errors import InputError
from abyssal.base.home import home
from abyssal.base.progress import LINE_EVERY_S, StatusLine

if TYPE_CHECKING:
    from abyssal.train.recipe import Recipe as TrainRecipe
    from abyssal.train.world import World

train = typer.Typer(help="Train models: data, pre-training, SFT, exports, reports.", no_args_is_help=True)

Recipe = Annotated[str, typer.Option(help="nano, test, or a file that ends in .toml.")]
Data = Annotated[Path | None, typer.Option(help="Folder that `train data` filled; default below ABYSSAL_HOME.")]
Run = Annotated[Path | None, typer.Option(help="Folder of the run; an unfinished one goes on.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change the recipe: pretrain.schedule.steps=100.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of the processor; a resumed run needs the same number.")]
Experts = Annotated[int, typer.Option(min=1, help="Under torchrun: processes that share the experts of a layer.")]
Track = Annotated[list[str] | None, typer.Option(help="Also send the metrics to tensorboard or wandb.")]


@train.command()
def data(
    out: Annotated[Path | None, typer.Option(help="The folder to fill; default below ABYSSAL_HOME.")] = None,
    debian: Annotated[bool, typer.Option(help="Also fetch prose from Debian packages, with apt-get.")] = True,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="An evaluation set as JSON Lines, .gz or not: documents that share 13 words are left out."),
    ] = None,
) -> None:
    """Build corpus, tokenizer and token files from packages: those of Python, and Debian's."""
    from abyssal.train.data.contamination import items_of
    from abyssal.train.data.corpora import DEBIAN, DEFAULT, fetch
    from abyssal.train.data.prepare import prepare

    folder = out or _data_folder()
    sets: dict[str, list[str]] = {}
    for path in against or ():
        if path.name in sets:
            raise InputError(f"two evaluation sets are called {path.name}: rename one, since counts are told by name")
        sets[path.name] = items_of(path)
    sources = list(DEFAULT)
    if debian:
        print("fetching packages", file=sys.stderr)
        fetch(DEBIAN, folder / "packages")
        sources += DEBIAN
    print("reading texts, learning the tokenizer", file=sys.stderr)
    made = prepare(folder, sources, packages=folder / "packages" if debian else None, evaluation=sets)
    for name, counts in made["corpus"]["contamination"].items():
        met, items, gone = counts["items_hit"], counts["items"], counts["documents_hit"]
        print(f"{name}: {met} of {items} items met in the text, {gone} documents left out")
    for name, manifest in made["files"].items():
        print(f"{folder / name}.bin: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens")


@train.command()
def pretrain(
    recipe: Recipe = "nano",
    data: Data = None,
    run: Run = None,
    changes: Changes = None,
    threads: Threads = None,
    experts: Experts = 1,
    track: Track = None,
) -> None:
    """Train a recipe's model from nothing, or go on with it."""
    _stage(recipe, "pretrain", data, run, None, changes, threads, experts, track)


@train.command()
def sft(
    recipe: Recipe = "nano",
    data: Data = None,
    run: Run = None,
    start: Annotated[Path | None, typer.Option(help="Run that it begins with; default the one of the recipe.")] = None,
    changes: Changes = None,
    threads: Threads = None,
    experts: Experts = 1,
    track: Track = None,
) -> None:
    """Train on conversations, from where pre-training ended."""
    _stage(recipe, "sft", data, run, start, changes, threads, experts, track)


@train.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Option(help="The release folder to write.")],
    layout: Annotated[str, typer.Option(help="flash, base, bf16 or fp32.")] = "flash",
) -> None:
    """Write a run's last weights as a release, with the tokenizer of its data."""
    from abyssal.arch.tensors import Layout
    from abyssal.train.export import export as write

    name = write(run, out, cast("Layout", layout))
    print(f"{name} of {run} -> {out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB")


@train.command()
def report(run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")]) -> None:
    """Write a run's report card: report.md, and report.html for a browser."""
    from abyssal.train.report import write_report

    print(write_report(run))


@train.command()
def score(
    model: Annotated[str, typer.Argument(help="A release folder, or nano.")] = "nano",
    plan: Annotated[str, typer.Option(help="quick (minutes), full, or million (hours).")] = "quick",
    suite: Annotated[list[str] | None, typer.Option(help="Only this one; may be given again.")] = None,
    data: Data = None,
    journal: Annotated[Path | None, typer.Option(help="File of results so far: a killed evaluation goes on.")] = None,
    seed: Annotated[int, typer.Option(help="Another one asks other questions.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for scores.json and a plot of retrieval.")] = None,
    json_out: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Ask a model what the bundled one was trained to do, on questions it has never seen, through the engine."""
    from abyssal.base.files import write_json
    from abyssal.cli.models import folder_of
    from abyssal.train.report import SCORES
    from abyssal.train.skills.grid import plot_grid
    from abyssal.train.skills.plan import PLANS
    from abyssal.train.skills.report import lines_of
    from abyssal.train.skills.score import SUITES
    from abyssal.train.skills.score import score as ask

    if plan not in PLANS:
        raise InputError(f"no plan {plan!r}: use {', '.join(PLANS)}")
    folder = data or _data_folder()
    known = folder if folder.is_dir() else None
    suites = suite or [name for name in SUITES if name != "bits" or known is not None]
    found = ask(folder_of(model), known, PLANS[plan], suites, journal=journal, seed=seed)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SCORES, found)
        if "retrieval" in found["suites"]:
            plot_grid(found["suites"]["retrieval"], out / "retrieval.svg")
    print(json.dumps(found) if json_out else "\n".join(lines_of(found["suites"])))


@train.command()
def plan(
    model: Annotated[str, typer.Argument(help="A preset, a config.json or a release folder.")],
    gpus: Annotated[int, typer.Option(help="How many.")],
    memory: Annotated[float, typer.Option(help="Of each, in GB.")] = 80.0,
    tflops: Annotated[float, typer.Option(help="Peak of each for float32 products with TF32 inputs.")] = 495.0,
    tokens: Annotated[int, typer.Option(help="Of a pass on one GPU.")] = 4096,
    length: Annotated[int, typer.Option(help="Of a sequence.")] = 4096,
    recompute: Annotated[bool, typer.Option(help="Run blocks again on the way back.")] = True,
    mfu: Annotated[float, typer.Option(help="Share of the peak to assume.")] = 0.3,
    json_out: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Compute what training would need on many GPUs: memory, mesh, tokens per second. Nothing is measured."""
    from dataclasses import asdict

    from abyssal.cli.models import config_of
    from abyssal.train.plan import Gpu
    from abyssal.train.plan import plan as compute

    gpu = Gpu(f"GPU of {memory:g} GB", memory * 1e9, tflops * 1e12)
    found = compute(config_of(model), gpus, gpu=gpu, tokens=tokens, length=length, recompute=recompute, mfu=mfu)
    made = {"computed": True, **asdict(found), "tokens_per_s": found.tokens_per_s}
    print(json.dumps(made) if json_out else found.text())


def _data_folder() -> Path:
    return home() / "train" / "data"


def _stage(
    recipe: str,
    stage: str,
    data: Path | None,
    run: Path | None,
    start: Path | None,
    changes: list[str] | None,
    threads: int | None,
    experts: int,
    track: list[str] | None,
) -> None:
    import torch

    from abyssal.train.recipe import read_recipe

    if threads is not None:
        torch.set_num_threads(threads)
    told = read_recipe(recipe, changes or ())
    runs = home() / "train" / "runs" / told.name
    folder, data = run or runs / stage, data or _data_folder()
    before = start or runs / told.stage(stage).start if told.stage(stage).start else None
    world = _world(experts)
    _train(told, stage, data, folder, before, world, track or ())
    world.end()


def _train(
    told: TrainRecipe, stage: str, data: Path, folder: Path, before: Path | None, world: World, track: Sequence[str]
) -> None:
    """On one of several processes, or alone; the first one talks."""
    from abyssal.train.export import keep_tokenizer
    from abyssal.train.recipe import trainer_of
    from abyssal.train.report import write_report
    from abyssal.train.run import run as train_on
    from abyssal.train.sinks import sink

    trainer = trainer_of(told, stage, data, before, world)
    if world.rank:
        train_on(trainer, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    keep_tokenizer(data, folder)
    if trainer.rules.bfloat16_muon:
        print(f"Muon orthogonalises in {trainer.muon_dtypes[-1][1]} on this processor", file=sys.stderr)
    with ExitStack() as open_sinks:
        shows = [open_sinks.enter_context(sink(name, folder, trainer.saved().state)) for name in track]
        shows.append(_Progress(trainer.rules.schedule.steps).show)

        def show(line: dict[str, Any]) -> None:
            for each in shows:
                each(line)

        ended = train_on(trainer, folder, show=show)
    page = write_report(folder)
    print(f"{'finished' if ended else 'stopped, and saved'}: step {trainer.step_number:,}; report: {page}")


def _world(experts: int) -> World:
    """The processes that torchrun has started, or this one alone.

    Raises:
        ConfigError: experts shall be shared, and there are no processes, or they do not share out.
    """
    if "WORLD_SIZE" in os.environ or experts > 1:
        from abyssal.train.parallel.processes import Processes

        return Processes(experts)
    from abyssal.train.world import World

    return World()


class _Progress:
    """A line about the newest step on stderr: in place on a terminal, else now and then."""

    def __init__(self, steps: int):
        self.steps = steps
        self._line = StatusLine()
        self._shown = 0.0
        self._rate = 0.0  # seconds of a step, of late

    def show(self, line: dict[str, Any]) -> None:
        seconds = sum(line["seconds"].values())
        self._rate = 0.9 * self._rate + 0.1 * seconds if self._rate else seconds
        now, last = time.monotonic(), line["step"] == self.steps
        if not (self._line.terminal or last or now - self._shown >= LINE_EVERY_S):
            return
        self._shown = now
        left = int((self.steps - line["step"]) * self._rate)
        text = (
            f"step {line['step']:,}/{self.steps:,}  {line['tokens']:,} tokens  loss {line['loss']:.4f}"
            f"  {line['tokens_per_s']:,.0f} tokens/s  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
        if line["verdict"] != "apply":
            text += f"  {line['verdict']}"
        self._line.show(text)
        if last:
            self._line.keep()
