"""The figure of retrieval: share of right answers by length and depth, a panel for each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abyssal.base.errors import InputError
from abyssal.base.files import write_aside

KILO = 1024
DARK = 0.35  # distance of a rate from one half beyond which its colour is dark


def plot_grid(results: dict[str, Any], path: Path, mode: str = "non-think") -> None:
    """Draw the grid of one thinking mode into a PNG or SVG file; a cell says how many of its items were right.

    Args:
        results: of `retrieval.score_retrieval`.
        path: where to; the suffix chooses the format.
        mode: one of the modes that were asked.
    Raises:
        InputError: there are no results in this mode.
        SaveError: the file cannot be written.
    """
    grid: dict[str, dict[str, dict[str, Any]]] = results["grid"].get(mode, {})
    if not grid:
        raise InputError(f"there are no retrieval results in mode {mode!r}: there are {', '.join(results['grid'])}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    depths = sorted({depth for lengths in grid.values() for cells in lengths.values() for depth in cells}, key=float)
    wide = max(len(lengths) for lengths in grid.values())
    figure, panels = pyplot.subplots(
        1, len(grid), figsize=(2.2 + len(grid) * max(1.9, 0.75 * wide), 4.8), layout="constrained", squeeze=False,
        sharey=True,
    )  # fmt: skip
    image = None
    for axes, (kind, lengths) in zip(panels[0], grid.items(), strict=True):
        rates = [
            [cells[depth]["rate"] if depth in cells else float("nan") for cells in lengths.values()] for depth in depths
        ]
        image = axes.imshow(rates, vmin=0, vmax=1, cmap="RdYlBu", aspect="auto")
        for column, cells in enumerate(lengths.values()):
            for row, depth in enumerate(depths):
                if depth in cells:
                    text = f"{cells[depth]['passed']}/{cells[depth]['n']}"
                    light = abs(cells[depth]["rate"] - 0.5) > DARK  # on a dark cell
                    axes.text(column, row, text, ha="center", va="center", color="w" if light else "k", fontsize=8)
        whole = results["by_length"][mode][kind]
        axes.set_xticks(range(len(lengths)), [f"{_short(int(n))}\n{whole[n]['rate']:.0%}" for n in lengths])
        axes.set_title(kind.replace("_", " "), fontsize=10)
        axes.set_xlabel("tokens, and right in all")
    panels[0][0].set_yticks(range(len(depths)), [f"{float(depth):.0%}" for depth in depths])
    panels[0][0].set_ylabel("depth of the fact (0% is the beginning)")
    assert image is not None  # a grid has a panel
    figure.colorbar(image, ax=panels[0].tolist(), label="right answers", format=lambda value, _: f"{value:.0%}")
    figure.suptitle(f"Retrieval among confusable keys, held-out facts, {mode}", fontsize=11)
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=150, format=path.suffix.lstrip(".") or "png")
    pyplot.close(figure)


def _short(length: int) -> str:
    if length < KILO:
        return str(length)
    return f"{length / KILO:g}K" if length < KILO * KILO else f"{length / KILO / KILO:g}M"
