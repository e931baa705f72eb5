"""How much of a kernel's work is wasted on pairs that the mask forbids: counted, not timed, and so without a GPU.

    python -m mm_kernels.span_attention.benchmark.work --lengths 8192 32768 [--picture tiles.png]

For each distribution and tile size: allowed pairs over the pairs of all tiles that are multiplied (1 is perfect), and
the share of those tiles that need mask code. Beside it the same for block masks of 128 x 128 on a fixed grid, which is
what FlexAttention walks.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mm_kernels.span_attention.benchmark.distributions import DISTRIBUTIONS, area, mask

COLUMNS = ("distribution", "length", "tiles", "useful", "masked")
GRID = 128


def span_tiles(intervals: np.ndarray, block_q: int, block_k: int) -> tuple[int, int]:
    """(tiles, tiles with mask code) of the forward kernel: what `tiles.split_range` says, for every tile of queries."""
    lo, hi = intervals.astype(np.int64)
    starts = np.arange(0, len(lo), block_q)
    sees = lo < hi
    start = np.minimum.reduceat(np.where(sees, lo, len(lo)), starts)
    end = np.maximum.reduceat(np.where(sees, hi, 0), starts)
    left = -(np.minimum(start - np.maximum.reduceat(lo, starts), 0) // block_k)
    full = np.maximum(np.minimum.reduceat(hi, starts) - start - left * block_k, 0) // block_k
    left = np.where(full > 0, left, 0)
    masked = left - np.minimum(start + (left + full) * block_k - end, 0) // block_k
    return int((full + masked).sum()), int(masked.sum())


def grid_tiles(intervals: np.ndarray) -> tuple[int, int]:
    """(tiles, tiles with mask code) of a block mask on a grid."""
    lo, hi = intervals.astype(np.int64)
    starts = np.arange(0, len(lo), GRID)
    # Interval masks with rising ends: a block is needed where its corner nearest to the diagonal band is.
    key = np.arange(0, len(lo), GRID)[None, :]
    low, high = (np.minimum.reduceat(lo, starts), np.maximum.reduceat(hi, starts))
    needed = (low[:, None] < key + GRID) & (key < high[:, None])
    full = (np.maximum.reduceat(lo, starts)[:, None] <= key) & (key + GRID <= np.minimum.reduceat(hi, starts)[:, None])
    return int(needed.sum()), int((needed & ~full).sum())


def table(lengths: list[int], rows: int = 4) -> Iterator[dict[str, object]]:
    """Rows of `COLUMNS`, each the mean over `rows` draws of the mask."""
    for length in lengths:
        for name in DISTRIBUTIONS:
            masks = [mask(name, length, row) for row in range(rows)]
            pairs = sum(map(area, masks))
            counts = {
                f"{q} x {k}": (q * k, [span_tiles(m, q, k) for m in masks])
                for q, k in ((128, 128), (128, 64), (64, 64), (64, 32))
            }
            counts[f"grid {GRID} x {GRID}"] = (GRID * GRID, [grid_tiles(m) for m in masks])
            for tiles, (size, found) in counts.items():
                total, masked = np.sum(found, axis=0)
                useful, share = pairs / (total * size), masked / total
                yield dict(zip(COLUMNS, (name, length, tiles, f"{useful:.3f}", f"{share:.3f}"), strict=True))


def walked_blocks(intervals: np.ndarray, block_q: int, block_k: int) -> Iterator[tuple[int, int, bool]]:
    """(first query, first key, whether mask code runs) of every tile that the forward kernel multiplies."""
    lo, hi = intervals.astype(np.int64)
    for query in range(0, len(lo), block_q):
        rows = slice(query, query + block_q)
        start, end = lo[rows].min(), hi[rows].max()
        for key in range(start, end, block_k):
            yield query, key, bool(key < lo[rows].max() or key + block_k > hi[rows].min())


def picture(path: Path, names: Sequence[str] = ("docs", "interleaved", "t2i", "mmada"), length: int = 4096) -> None:
    """What is allowed (dark), and the tiles that are walked: with mask code (orange frame) and without (blue)."""
    import matplotlib  # counting does not need it

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.9), layout="constrained")
    for ax, name in zip(axes, names, strict=True):
        intervals = mask(name, length)
        key = np.arange(length)
        allowed = (intervals[0][:, None] <= key) & (key < intervals[1][:, None])
        ax.imshow(allowed, cmap="Greys", vmax=2.5, interpolation="nearest")
        for query, first, masked in walked_blocks(intervals, 128, 128):
            color = "tab:orange" if masked else "tab:blue"
            ax.add_patch(plt.Rectangle((first, query), 128, 128, fill=False, lw=0.5, ec=color))
        ax.set(title=name, xlim=(0, length), ylim=(length, 0), xlabel="key", xticks=(), yticks=())
    axes[0].set_ylabel("query")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--picture", type=Path, help="also draw some masks with the tiles that are walked")
    args = parser.parse_args()
    if args.picture is not None:
        picture(args.picture)
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table(args.lengths))


if __name__ == "__main__":
    main()
