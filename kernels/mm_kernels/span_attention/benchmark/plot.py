"""The benchmark's picture: TFLOP/s of forward and backward together against length, one panel a distribution."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Draws rows of the CSV file, those with figures. One row of panels for each device, head count and head size."""
    import matplotlib  # the kernels themselves do not need it

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["forward_ms"]:
            setting = (row["device"], f"{row['heads']}:{row['kv_heads']} heads of {row['head_dim']}")
            panels[(setting, row["distribution"])][row["peer"]].append(row)
    if not panels:
        return
    settings = list(dict.fromkeys(setting for setting, _ in panels))
    names = list(dict.fromkeys(name for _, name in panels))
    peers = list(dict.fromkeys(peer for panel in panels.values() for peer in panel))
    colors = {peer: f"C{i}" for i, peer in enumerate(peers)}
    figure, axes = plt.subplots(
        len(settings), len(names), figsize=(3.2 * len(names), 2.8 * len(settings)), squeeze=False, layout="constrained"
    )
    for (setting, name), panel in panels.items():
        ax = axes[settings.index(setting)][names.index(name)]
        for peer, measured in panel.items():
            points = sorted((int(row["length"]), _tflops(row)) for row in measured)
            ax.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colors[peer], label=peer)
        ax.set(xscale="log", title=f"{name}\n{setting[1]}", xlabel="positions", ylim=(0, None))
        ax.set_xscale("log", base=2)
        ax.title.set_fontsize(9)
        ax.grid(alpha=0.3)
    for ax in axes[:, 0]:
        ax.set_ylabel("TFLOP/s, forward + backward")
    handles = [plt.Line2D([], [], color=color, label=peer) for peer, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(" | ".join(dict.fromkeys(device for device, _ in settings)))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _tflops(row: dict[str, str]) -> float:
    forward, backward = float(row["forward_ms"]), float(row["backward_ms"])
    work = float(row["forward_tflops"]) * forward + float(row["backward_tflops"]) * backward
    return work / (forward + backward)
