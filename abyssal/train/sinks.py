"""Other places for the lines of `metrics.jsonl`: TensorBoard and Weights & Biases, extras of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abyssal.base.errors import InputError
from abyssal.train.leaves import leaves

Show = Callable[[dict[str, Any]], None]
SINKS = ("tensorboard", "wandb")


def flat(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics, those of inner tables under "table/name"."""
    return {
        name: float(value)
        for name, value in leaves(line, "/")
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


@contextmanager
def sink(name: str, run: Path, config: Mapping[str, Any]) -> Iterator[Show]:
    """Somewhere to show lines; what was shown is written at the end.

    Args:
        name: "tensorboard" (files in RUN/tensorboard) or "wandb" (its own settings say where; a resumed run
            continues under the same id).
        run: the folder of the run.
        config: what wandb stores beside the numbers.
    Raises:
        InputError: there is no such sink, or its package is not installed.
    """
    if name not in SINKS:
        raise InputError(f"no sink {name!r}: use {' or '.join(SINKS)}")
    try:
        with {"tensorboard": _tensorboard, "wandb": _wandb}[name](run, config) as show:
            yield show
    except ImportError as error:
        raise InputError(f"{name} is not installed ({error}): pip install 'abyssal[track]'") from None


@contextmanager
def _tensorboard(run: Path, config: Mapping[str, Any]) -> Iterator[Show]:
    from torch.utils.tensorboard import SummaryWriter

    del config
    writer = SummaryWriter(str(run / "tensorboard"))
    try:

        def show(line: dict[str, Any]) -> None:
            for key, value in flat(line).items():
                writer.add_scalar(key, value, line["step"])

        yield show
    finally:
        writer.close()


@contextmanager
def _wandb(run: Path, config: Mapping[str, Any]) -> Iterator[Show]:
    import wandb

    name = f"{run.parent.name}-{run.name}"
    with wandb.init(project="abyssal", name=name, id=name, resume="allow", dir=run, config=dict(config)) as session:
        yield lambda line: session.log(flat(line), step=line["step"])
