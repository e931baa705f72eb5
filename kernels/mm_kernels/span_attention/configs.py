"""Tile sizes: what a kernel may be launched with, and what it is launched with where nobody has measured.

All were chosen by compiling for Hopper (`resources`): none spills more than a few scalars, and each fits the shared
memory of one multiprocessor. `tuning` picks the fastest of them on the GPU at hand.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TileConfig:
    """`block_q` queries and `block_k` keys in a tile; warps of a program; depth of the load pipeline."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


KERNELS = ("forward", "dq", "dkv")

# The first of each list is the default: it fits an A100's 163 KiB as well.
HALF_UP_TO_128 = {
    "forward": [
        TileConfig(128, 64, 8, 3), TileConfig(128, 64, 8, 2), TileConfig(128, 128, 8, 2), TileConfig(128, 32, 8, 3),
        TileConfig(64, 64, 4, 3), TileConfig(64, 64, 4, 2), TileConfig(64, 32, 4, 3), TileConfig(64, 128, 4, 2),
    ],
    "dq": [
        TileConfig(128, 64, 8, 2), TileConfig(128, 64, 8, 3), TileConfig(128, 32, 8, 3), TileConfig(128, 128, 8, 2),
        TileConfig(64, 64, 4, 2), TileConfig(64, 64, 4, 3), TileConfig(64, 32, 4, 3),
    ],
    "dkv": [
        TileConfig(64, 128, 8, 2), TileConfig(64, 128, 8, 3), TileConfig(32, 128, 8, 2), TileConfig(32, 128, 8, 3),
        TileConfig(64, 64, 4, 2), TileConfig(64, 64, 4, 3), TileConfig(32, 64, 4, 2), TileConfig(32, 64, 4, 3),
    ],
}  # fmt: skip
HALF_256 = {
    "forward": [
        TileConfig(64, 64, 4, 2),
        TileConfig(128, 64, 8, 2),
        TileConfig(128, 32, 8, 2),
        TileConfig(64, 32, 4, 2),
    ],
    "dq": [TileConfig(64, 32, 4, 2), TileConfig(128, 32, 8, 2), TileConfig(64, 32, 8, 2)],
    "dkv": [TileConfig(32, 64, 8, 2), TileConfig(16, 64, 8, 2)],
}
# fp32 is for checking results, not for training: products in three passes of tf32, much of it spilled.
SINGLE = {
    "forward": [TileConfig(64, 32, 4, 1)],
    "dq": [TileConfig(64, 32, 4, 1)],
    "dkv": [TileConfig(32, 64, 4, 1)],
}


def padded_head_dim(head_dim: int) -> int:
    """The power of two that holds `head_dim`; what lies between costs arithmetic, but no memory traffic."""
    return max(16, 1 << (head_dim - 1).bit_length())


def candidates(kernel: str, head_dim: int, itemsize: int) -> list[TileConfig]:
    """What the tuner tries for one of `KERNELS`; the first is the default."""
    if itemsize > 2:
        return SINGLE[kernel]
    return (HALF_UP_TO_128 if padded_head_dim(head_dim) <= 128 else HALF_256)[kernel]
