"""Tile sizes: what a kernel may be launched with, and what it is launched with where nobody has measured.

`DEFAULTS` were chosen by compiling for Hopper (no register spills, shared memory within one multiprocessor) and are the
first candidate of the tuner; `tuning` replaces them by what is fastest on the GPU at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class TileConfig:
    """`block_q` queries and `block_k` keys in a tile; warps of a program; depth of the load pipeline."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


KERNELS = ("forward", "dq", "dkv")


def padded_head_dim(head_dim: int) -> int:
    """The power of two that holds `head_dim`; what lies between costs arithmetic, but no memory traffic."""
    return max(16, 1 << (head_dim - 1).bit_length())


def default(kernel: str, head_dim: int, itemsize: int) -> TileConfig:
    """A configuration that fits every GPU with 160 KiB of shared memory a multiprocessor (A100, H100, H200, B200)."""
    width = padded_head_dim(head_dim) * itemsize
    if width > 512:
        return TileConfig(32, 32, 4, 1)  # fp32 beyond 128
    if width > 256:
        return TileConfig(64, 32, 4, 1) if itemsize > 2 else TileConfig(64, 64, 8, 1)
    return {"forward": TileConfig(128, 64, 8, 3), "dq": TileConfig(128, 64, 8, 2), "dkv": TileConfig(64, 128, 8, 2)}[
        kernel
    ]


def candidates(kernel: str, head_dim: int, itemsize: int) -> list[TileConfig]:
    """What the tuner tries, the default first."""
    first = default(kernel, head_dim, itemsize)
    if padded_head_dim(head_dim) * itemsize > 256:
        return [first]
    own, other = ((64, 128), (32, 64, 128))
    tiles = [(a, b) for a, b in product(own, other)]
    shapes = [(b, a) if kernel == "dkv" else (a, b) for a, b in tiles]
    found = [TileConfig(*shape, 8 if max(shape) == 128 else 4, stages) for shape in shapes for stages in (2, 3)]
    return [first, *(config for config in found if config != first)]
