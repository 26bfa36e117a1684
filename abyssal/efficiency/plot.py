"""The report's figure: operations and cache of one token against the context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abyssal.arch.config import ModelConfig
from abyssal.base.files import write_aside
from abyssal.efficiency.baselines import v32_flops, v32_kv_per_token
from abyssal.efficiency.flops import decode_flops
from abyssal.efficiency.kv import kv_cost

LONGEST = 2**20
_POINTS = [LONGEST * i // 64 for i in range(65)]


def plot(models: dict[str, ModelConfig], path: Path) -> None:
    """Draw FLOPs and cache bytes up to 1M tokens, with the factors against V3.2, into a PNG or SVG file.

    Args:
        models: label -> configuration.
        path: where to; the suffix chooses the format.
    Raises:
        SaveError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    flops: dict[str, list[float]] = {"V3.2": [v32_flops(n).total / 1e12 for n in _POINTS]}
    cache: dict[str, list[float]] = {"V3.2": [v32_kv_per_token() * n / 1e9 for n in _POINTS]}
    for label, config in models.items():
        kv = kv_cost(config)
        flops[label] = [decode_flops(config, n).total / 1e12 for n in _POINTS]
        cache[label] = [(kv.at(n) + kv.fixed) / 1e9 for n in _POINTS]
    _panel(left, flops, "FLOPs of one decoded token (10¹², FP8-equivalent)")
    _panel(right, cache, "KV cache of one sequence (GB)")
    figure.suptitle("Cost of context, counted by the formulas of the report", fontsize=11)
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=150, format=path.suffix.lstrip(".") or "png")
    pyplot.close(figure)


def _panel(axes: Any, series: dict[str, list[float]], title: str) -> None:
    top = series["V3.2"][-1]
    ticks = [n / 1024 for n in _POINTS]
    free = 0.0  # lowest height at which a label does not touch the one below
    for label, values in sorted(series.items(), key=lambda item: item[1][-1]):
        (line,) = axes.plot(ticks, values, label=label, linewidth=2)
        note = label if label == "V3.2" else f"{label}: {top / values[-1]:.1f}x lower"
        axes.annotate(
            note,
            (ticks[-1], max(values[-1] + 0.02 * top, free)),
            ha="right",
            color=line.get_color(),
        )
        free = max(values[-1] + 0.02 * top, free) + 0.06 * top
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("context (K tokens)")
    axes.set_xlim(0, LONGEST / 1024)
    axes.set_ylim(0, top * 1.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
