"""The report card of a run: what was trained on what, curves, scores (training.md 7).

RUN/report.md     the card
RUN/report.html   the same as one page, with the curves in it
RUN/curves.svg    the curves
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abyssal.base.errors import CheckpointError
from abyssal.base.files import write_bytes
from abyssal.train import checkpoint
from abyssal.train.leaves import leaves
from abyssal.train.run import METRICS

SCORES = "scores.json"
SMOOTH = 50  # steps of a running mean
STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
td + td { font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; background: #fff; border-radius: .4rem; }
"""
Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Card:
    """What a report says.

    Attributes:
        title: of the run.
        sections: heading and rows of name and value.
        lines: the metrics of its steps.
        marks: steps at which something changed, and what.
    """

    title: str
    sections: Sequence[tuple[str, Rows]]
    lines: Sequence[dict[str, Any]]
    marks: Sequence[tuple[int, str]]


def write_report(run: Path) -> Path:
    """Write the card of a run, finished or not; the page's path.

    Raises:
        CheckpointError: the folder holds no run.
        SaveError: the file system refused.
    """
    card = card_of(run)
    svg = curves(card)
    write_bytes(run / "curves.svg", svg.encode())
    write_bytes(run / "report.md", as_markdown(card).encode())
    page = run / "report.html"
    write_bytes(page, as_html(card, svg).encode())
    return page


def card_of(run: Path) -> Card:
    """Read a run's last checkpoint, metrics and scores.

    Raises:
        CheckpointError: the folder holds no run.
    """
    folder = checkpoint.latest(run)
    try:
        lines = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run} holds no run ({error}): give the folder of one") from None
    if folder is None or not lines:
        raise CheckpointError(f"{run} holds no finished step: give the folder of a run")
    state = json.loads((folder / checkpoint.STATE).read_bytes())
    schedule = state["rules"]["schedule"]
    steps = schedule["steps"]
    last = lines[-1]
    seconds = sum(sum(line["seconds"].values()) for line in lines)
    tail = lines[-SMOOTH:]
    results: list[tuple[str, str]] = [
        ("steps", f"{last['step']:,} of {steps:,}"),
        ("tokens", f"{last['tokens']:,}"),
        ("wall time of the steps", _duration(seconds)),
        ("tokens per second", f"{last['tokens'] / seconds:,.0f}"),
        ("largest memory", f"{max(line['memory'] for line in lines) / 1e9:.2f} GB"),
    ]
    for key in ("loss", "mtp_loss", "index_loss", "balance_loss", "index_recall", "sink_mass"):
        values = [line[key] for line in tail if line.get(key) is not None]
        if values:
            results.append((f"{key}, mean of the last {len(values)}", f"{np.mean(values):.4f}"))
    not_applied = [line for line in lines if line["verdict"] != "apply"]
    results.append(("steps skipped or taken back", str(len(not_applied))))
    sections: list[tuple[str, Rows]] = [("Results", results)]
    if (run / SCORES).is_file():
        sections.append(("Scores", _flat(json.loads((run / SCORES).read_bytes()))))
    sections += [
        ("Data", [(name, _told(source)) for name, source in state["sources"].items()]),
        ("Rules", _flat(state["rules"])),
        ("Model", _flat(state["config"])),
        ("Made with", _made_with(state)),
    ]
    marks = [
        (round(share * steps), name)
        for name, share in (
            ("sparse", schedule["dense_until"]),
            ("rate falls", schedule["decay_from"]),
            ("FP4", schedule["fp4_from"]),
            ("FP8", schedule["fp8_from"]),
        )
        if 0 < share < 1
    ]
    return Card(f"{run.parent.name}/{run.name}", sections, lines, marks)


def _told(source: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in _flat(source) if value)


def _made_with(state: dict[str, Any]) -> Rows:
    dtypes = [f"{name} from step {step:,} on" for step, name in state.get("muon_dtypes", ())]
    return [*_flat(state["made_with"]), ("Muon orthogonalised in", ", ".join(dtypes) or "unknown")]


def _flat(table: dict[str, Any]) -> Rows:
    return [(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in leaves(table, ".")]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{seconds / 60:.1f} min"


def as_markdown(card: Card) -> str:
    """The card as Markdown; it shows curves.svg."""
    parts = [f"# {card.title}", "![curves](curves.svg)"]
    for heading, rows in card.sections:
        table = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)
        parts.append(f"## {heading}\n\n| | |\n|---|---|\n{table}")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def as_html(card: Card, svg: str) -> str:
    """The card as one page without anything from elsewhere."""
    title = html.escape(card.title)
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>",
        svg[svg.index("<svg") :],
    ]
    for heading, rows in card.sections:
        body = "".join(
            f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>\n' for name, value in rows
        )
        parts.append(f"<h2>{html.escape(heading)}</h2>\n<table>\n{body}</table>")
    return "\n".join(parts) + "\n</body></html>\n"


def curves(card: Card) -> str:
    """The metrics over the steps, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = card.lines
    steps = np.array([line["step"] for line in lines])
    plots: list[tuple[str, dict[str, NDArray[np.float64]], bool]] = [
        ("loss (nats)", {"next token": _column(lines, "loss"), "MTP": _column(lines, "mtp_loss")}, False),
        ("indexer", {"divergence": _column(lines, "index_loss"), "recall": _column(lines, "index_recall")}, False),
        ("sink's share of attention", {"mean": _column(lines, "sink_mass")}, False),
        ("gradient norm before clipping", {"model": _column(lines, "grad_norm")}, True),
        (
            "experts: most over mean, less 1",
            {name.split(".")[1]: _column(lines, "max_violation", name) for name in lines[-1]["max_violation"]},
            False,
        ),
        ("tokens per second", {"": _column(lines, "tokens_per_s")}, False),
    ]
    with pyplot.rc_context({"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "abyssal"}):
        figure, axes = pyplot.subplots(2, 3, figsize=(11, 5.6), layout="constrained")
        for axis, (title, columns, logarithmic) in zip(axes.flat, plots, strict=True):
            shown = False
            for label, values in columns.items():
                if np.isfinite(values).any():
                    axis.plot(*_smooth(steps, values), label=label, linewidth=1)
                    shown = True
            axis.set_title(title)
            axis.grid(alpha=0.3)
            if logarithmic and shown:
                axis.set_yscale("log")
            if shown and any(columns):
                axis.legend(fontsize=7)
            for step, _ in card.marks:
                if steps[0] <= step <= steps[-1]:
                    axis.axvline(step, color="0.6", linewidth=0.7, linestyle=":")
        for step, name in card.marks:
            if steps[0] <= step <= steps[-1]:
                place = {"xycoords": ("data", "axes fraction"), "rotation": 90, "va": "top", "ha": "right"}
                axes.flat[0].annotate(name, (step, 0.98), fontsize=6, **place)
        for axis in axes[1]:
            axis.set_xlabel("step")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return out.getvalue()


def _column(lines: Sequence[dict[str, Any]], *path: str) -> NDArray[np.float64]:
    values = []
    for line in lines:
        value: Any = line
        for key in path:
            value = value.get(key) if value is not None else None
        values.append(np.nan if value is None else float(value))
    return np.array(values)


def _smooth(steps: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A running mean over what is finite."""
    good = np.isfinite(values)
    steps, values = steps[good], values[good]
    width = max(min(SMOOTH, len(values) // 10), 1)
    means = np.convolve(values, np.ones(width) / width, mode="valid")
    return steps[width - 1 :], means
