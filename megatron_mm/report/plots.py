"""Pictures of a run: the loss curves, and one real pack's mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from megatron_mm.mask import dense

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402

TEXT, IMAGE = "tab:blue", "tab:orange"


def plot_losses(rows: list[dict[str, Any]], path: Path) -> None:
    """loss.png: each loss term over the iterations, raw and smoothed (mean over 1/40 of the run), and on held-out data
    where it was evaluated."""
    names = [key for key in rows[0] if key.startswith("loss/")]
    iterations = [row["iteration"] for row in rows]
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 3.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        values = np.array([row[name] for row in rows], dtype=float)
        axis.plot(iterations, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        axis.plot(iterations, _smooth(values, len(values) // 80), color="tab:blue", linewidth=1.6)
        held_out = [(row["iteration"], row[f"validation/{name}"]) for row in rows if f"validation/{name}" in row]
        if held_out:
            axis.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", markersize=3, label="validation")
            axis.legend()
        axis.set(title=name, xlabel="iteration", yscale="log" if (values > 0).all() else "linear")
        if axis.get_yscale() == "log":
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_mask(mask: np.ndarray, images: np.ndarray, path: Path) -> None:
    """mask.png: which key (column) each query (row) of one pack sees; image spans in their own colour.

    mask int32 [3, S]; images int32 [m, 3] of (first position, grid height, grid width).
    """
    picture = dense(mask).astype(np.int8)
    for first, height, width in images:
        span = slice(first, first + height * width)
        picture[span, span] *= 2
    figure, axis = plt.subplots(figsize=(7, 7), layout="constrained")
    axis.imshow(picture, cmap=ListedColormap(["white", TEXT, IMAGE]), vmin=0, vmax=2, interpolation="nearest")
    axis.set(xlabel="key", ylabel="query", title="which keys the queries of one pack see")
    axis.legend(
        handles=[
            Patch(color=IMAGE, label="an image, within itself"),
            Patch(color=TEXT, label="all else"),
        ],
        loc="upper right",
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each value and the `reach` before and after it, or as many as there are."""
    total = np.concatenate([[0.0], values.cumsum()])
    place = np.arange(len(values))
    first, end = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    mean: np.ndarray = (total[end] - total[first]) / (end - first)
    return mean
