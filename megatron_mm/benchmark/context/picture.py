"""The study's pictures: balance and bytes of each way, and simulated efficiency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from megatron_mm.benchmark.context import simulation, table
from megatron_mm.benchmark.context.rates import PUBLISHED, published_share
from megatron_mm.benchmark.context.report import PEERS, best_of_ours, speed

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.ticker import PercentFormatter  # noqa: E402

COLUMNS = 4
"""Panels side by side."""
STYLES: dict[str, dict[str, Any]] = {
    "ours": {"color": "tab:blue", "marker": "o"},
    "ours, ring": {"color": "tab:cyan", "marker": "s", "markersize": 3},
    "contiguous": {"color": "tab:green", "marker": "v"},
    "zigzag": {"color": "tab:orange", "marker": "^"},
    "zigzag ring": {"color": "tab:red", "marker": "x"},
    "all-gather": {"color": "tab:purple", "marker": "+"},
}
DASHES = ("-", "--", ":", "-.")


def draw_table(lines: Sequence[table.Line], path: Path) -> None:
    """For each distribution, at the middle length: received keys above, imbalance below."""
    lengths = sorted({line.length for line in lines})
    length = lengths[len(lengths) // 2]
    at_length = [line for line in lines if line.length == length]
    names = list(dict.fromkeys(line.distribution for line in lines))
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        2 * rows, columns, figsize=(3 * columns, 4.4 * rows + 0.8), squeeze=False, sharex=True, layout="constrained"
    )
    for number, name in enumerate(names):
        row, column = divmod(number, columns)
        above, below = axes[2 * row, column], axes[2 * row + 1, column]
        for way in ("zigzag ring", "zigzag", "contiguous", "ours, ring", "ours"):
            some = [line for line in at_length if (line.distribution, line.way) == (name, way)]
            ranks = [line.ranks for line in some]
            above.plot(ranks, [line.received for line in some], **STYLES[way])
            if way in ("zigzag", "contiguous", "ours"):
                below.plot(ranks, [line.imbalance for line in some], **STYLES[way])
            if way == "ours":
                above.plot(ranks, [line.least for line in some], color="black", ls=":", lw=1)
        above.set(yscale="log", title=name, ylim=(0.7 * min(line.least for line in at_length if line.least), 1.3))
        above.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        above.grid(alpha=0.3)
        below.set_ylim(0.95, max(1.2, 1.05 * below.get_ylim()[1]))
        below.axhline(table.IMBALANCE, color="black", ls=":", lw=1)
        _ranks_axis(below, sorted({line.ranks for line in lines}))
        if column == 0:
            above.set_ylabel("received / positions")
            below.set_ylabel("largest load / mean")
    for axis in axes.flat[2 * columns * rows - columns :]:
        axis.set_xlabel("context-parallel ranks")
    _hide_empty(axes, 2 * rows, columns, len(names))
    shown = {
        "ours": "ours", "ours, ring": "ours, relayed", "contiguous": "contiguous, needed keys",
        "zigzag": "zigzag, needed keys", "zigzag ring": "zigzag ring and all-gather: all keys",
    }  # fmt: skip
    handles = [plt.Line2D([], [], label=label, **STYLES[way]) for way, label in shown.items()]
    handles.append(plt.Line2D([], [], color="black", ls=":", lw=1, label="least possible for ours; goal of balance"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle(f"Rows of {length} positions: keys from other ranks (above), balance (below)")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_simulation(lines: Sequence[simulation.Line], path: Path) -> None:
    """Efficiency against ranks for each distribution, on the first GPU with the first heads."""
    gpu, heads = lines[0].gpu, lines[0].heads
    shown = [line for line in lines if (line.gpu, line.heads) == (gpu, heads)]
    names = list(dict.fromkeys(line.distribution for line in shown))
    dashes = dict(zip(sorted({line.tokens for line in shown}, reverse=True), DASHES * len(shown), strict=False))
    sizes = sorted({line.ranks for line in shown})
    best = best_of_ours(shown)
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3 * columns, 2.8 * rows + 1), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for number, name in enumerate(names):
        axis = axes.flat[number]
        for tokens, dash in dashes.items():
            for way in PEERS:
                some = [line for line in shown if (line.distribution, line.tokens, line.way) == (name, tokens, way)]
                axis.plot([line.ranks for line in some], [line.efficiency for line in some], ls=dash, **STYLES[way])
            axis.plot(sizes, [best[name, tokens, ranks].efficiency for ranks in sizes], ls=dash, **STYLES["ours"])
        if name == "docs":
            axis.plot(list(PUBLISHED), [published_share(ranks) for ranks in PUBLISHED], color="black", lw=1, marker=".")
        axis.set(title=name, ylim=(0, 1.05))
        _ranks_axis(axis, sizes)
        if number % columns == 0:
            axis.set_ylabel("simulated efficiency")
        if number + columns >= len(names):
            axis.set_xlabel("context-parallel ranks")
    _hide_empty(axes, rows, columns, len(names))
    handles = [plt.Line2D([], [], label=way, **STYLES[way]) for way in ("ours", *PEERS)]
    handles += [plt.Line2D([], [], color="gray", ls=dash, label=f"{n} tokens a GPU") for n, dash in dashes.items()]
    if "docs" in names:
        label = "published: MagiAttention over its CP 8 (other masks and nodes)"
        handles.append(plt.Line2D([], [], color="black", lw=1, marker=".", label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle(f"Simulation: nodes of 8 {gpu}, {heads} heads of 128, {speed(shown)} kernel speed")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _ranks_axis(axis: plt.Axes, sizes: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(ranks) for ranks in sizes])
    axis.grid(alpha=0.3)


def _hide_empty(axes: np.ndarray, rows: int, columns: int, panels: int) -> None:
    per_panel = rows // -(-panels // columns)
    for number in range(panels, rows // per_panel * columns):
        row, column = divmod(number, columns)
        for line in range(per_panel):
            axes[row * per_panel + line, column].set_visible(False)
