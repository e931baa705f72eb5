"""The benchmark's picture: what a step takes, and what of it goes where."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from megatron_mm.benchmark.profiling import GROUPS
from megatron_mm.benchmark.result import Result

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

COLORS = dict(zip(GROUPS, ("tab:orange", "tab:blue", "tab:green", "tab:red", "tab:purple", "tab:gray"), strict=True))

Panels = dict[str, list[tuple[Result, dict[str, float]]]]
"""experiment -> its measured variants, each with the milliseconds of every group (none where it was not profiled)."""


def draw(panels: Panels, path: Path) -> None:
    """A panel for each experiment, a framed bar for each variant's step, and in it the groups of its profile."""
    heights = [len(panel) for panel in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 1 + 0.4 * sum(heights) + len(panels)), squeeze=False,
        layout="constrained", height_ratios=heights,
    )  # fmt: skip
    for axis, (experiment, panel) in zip(axes[:, 0], panels.items(), strict=True):
        ends = []
        for result, profile in panel:
            left = 0.0
            for group, milliseconds in profile.items():
                axis.barh(result.variant, milliseconds, left=left, color=COLORS[group])
                left += milliseconds
            axis.barh(result.variant, result.ms_per_step, color="none", edgecolor="black", linewidth=0.8)
            ends.append(max(left, result.ms_per_step))
            mfu = f", MFU {result.mfu:.1%}" if result.mfu else ""
            axis.text(ends[-1], result.variant, f" {result.ms_per_step:.0f} ms{mfu}", va="center")
        axis.set(title=f"{experiment}, {panel[0][0].device}", xlabel="ms a step (frame: timed, colours: kernels)")
        axis.set_xlim(0, 1.25 * max(ends))
        axis.invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    figure.legend(handles, COLORS, loc="outside lower center", ncols=len(COLORS))
    figure.savefig(path, dpi=120)
    plt.close(figure)
