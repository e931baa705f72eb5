"""How fast attention kernels are, and how context parallelism scales elsewhere: published, or measured and read here.

TFLOP/s count allowed pairs: forward 4 * pairs * heads * head size, backward 2.5 times that; bf16, head size 128.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from math import log
from pathlib import Path

from megatron_mm.config.compose import ConfigError
from megatron_mm.parallel.context.predict import BACKWARD

KERNEL = "span"
"""Ours, in the kernel benchmark's column `peer`."""


@dataclass(frozen=True)
class Rates:
    """TFLOP/s of attention on one GPU, and where they are from."""

    forward: float
    backward: float
    source: str

    @property
    def both(self) -> float:
        """Of a forward and a backward pass together."""
        return (1 + BACKWARD) / (1 / self.forward + BACKWARD / self.backward)


ASSUMED = {
    "H100": Rates(572, 363, "assumed: MagiAttention's FFA kernel, H100, block-causal documents, 32k"),
    "H100-flex": Rates(391, 271, "assumed: FlexAttention, H100, causal, 32k"),
    "H200": Rates(688, 581, "assumed: cuDNN 9.19, H200, causal, 32k"),
}
"""Published, for whatever mask. A kernel that is slower than this hides its transfers better."""

PUBLISHED = {8: (459, 360), 16: (426, 371), 32: (315, 333), 64: (237, 264)}
"""MagiAttention, context-parallel ranks -> TFLOP/s of a GPU forward and backward: H100, causal documents of many
lengths, 8192 tokens a GPU."""


def published_share(ranks: int) -> float:
    """MagiAttention's TFLOP/s of a GPU, forward and backward together, over those at 8 ranks."""
    here, first = (Rates(*PUBLISHED[count], "").both for count in (ranks, 8))
    return here / first


class KernelSpeeds:
    """Rates by GPU and mask: measured where `path` has them, else assumed.

    Raises:
        ConfigError: the file lacks a column.
    """

    def __init__(self, path: str):
        self._rows: list[dict[str, str]] = []
        if not path:
            return
        with Path(path).open(newline="") as file:
            self._rows = [row for row in csv.DictReader(file) if row.get("peer") == KERNEL and row["forward_tflops"]]
        if not self._rows:
            raise ConfigError(
                f"kernel_csv={path} has no speed of the kernel (peer {KERNEL}); give the attention.csv of "
                "`python -m mm_kernels.span_attention.benchmark`."
            )

    def rates(self, gpu: str, distribution: str, tokens: int, heads: tuple[int, int]) -> Rates:
        """Of rows of about `tokens` positions: the measured length next to it, of the same heads if there are such."""
        device = gpu.partition("-")[0]
        rows = [
            row
            for row in self._rows
            if device in row["device"] and row["distribution"] == distribution and row["head_dim"] == "128"
        ]
        if not rows:
            return ASSUMED[gpu]

        def distance(row: dict[str, str]) -> tuple[bool, float]:
            return (int(row["heads"]), int(row["kv_heads"])) != heads, abs(log(int(row["length"]) / tokens))

        row = min(rows, key=distance)
        source = f"measured: {row['device']}, {row['distribution']}, {row['length']}, {row['heads']}:{row['kv_heads']}"
        return Rates(float(row["forward_tflops"]), float(row["backward_tflops"]), source)
