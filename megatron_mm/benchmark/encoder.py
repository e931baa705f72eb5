"""`python -m megatron_mm.benchmark.encoder experiment=NAME data.path=DIR ranks=8,64`: how evenly images lie on ranks.

Counts, step by step, the images that a vision encoder (or a U-Net) reads on each data-parallel rank: packs in the
plan's order, as Megatron-LM deals them out, and dealt out by their images (`megatron_mm.data.balance`). The slowest
rank over the mean; nothing is timed.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_mm.config.arguments import parse_own
from megatron_mm.config.cli import user_errors
from megatron_mm.config.compose import ConfigError, compose
from megatron_mm.data.balance import deal
from megatron_mm.data.dataset import open_data
from megatron_mm.data.plan import Plan, Position
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.documents.builder import Builder
from megatron_mm.families.registry import build_family


@dataclass(frozen=True)
class EncoderConfig:
    ranks: str = "8,64"
    """Data-parallel sizes."""
    packs: int = 4
    """Packs of a rank in one step."""
    steps: int = 50
    out: str | None = None
    """CSV file."""


@dataclass(frozen=True)
class Line:
    """Means over steps of the most images on a rank over the mean, and the worst step's."""

    ranks: int
    packs: int
    steps: int
    images: float
    """Of a rank in one step."""
    in_order: float
    in_order_worst: float
    dealt: float
    dealt_worst: float


def main(arguments: Sequence[str]) -> None:
    benchmark, overrides = parse_own(EncoderConfig(), arguments)
    config = compose(["run.name=encoder", *overrides])
    tokenizer = load_tokenizer(config.data.tokenizer)
    family = build_family(config.model, tokenizer.size)
    plan, _, _ = open_data(config.data, config.model, Builder(family), tokenizer, config.train.seed)
    if plan.images is None:
        raise ConfigError(f"model.family={config.model.family} has no encoder that reads these documents' images.")
    lines = list(measure(plan, [int(size) for size in benchmark.ranks.split(",")], benchmark.packs, benchmark.steps))
    table = Table(
        "ranks", "images a rank", "in order", "dealt out", title="most images on a rank over the mean (worst)"
    )
    for line in lines:
        table.add_row(
            str(line.ranks),
            f"{line.images:.1f}",
            f"{line.in_order:.3f} ({line.in_order_worst:.3f})",
            f"{line.dealt:.3f} ({line.dealt_worst:.3f})",
        )
    Console().print(table)
    if benchmark.out:
        with Path(benchmark.out).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(lines[0])), lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(line) for line in lines)


def measure(plan: Plan, sizes: Sequence[int], packs: int, steps: int) -> Iterator[Line]:
    assert plan.images is not None
    for ranks in sizes:
        walk = plan.walk(Position())
        order, dealt, means = [], [], []
        for _ in range(steps):
            images = np.array([plan.images[list(uids)].sum() for uids, _, _ in islice(walk, ranks * packs)])
            means.append(images.sum() / ranks)
            order.append(images.reshape(packs, ranks).sum(0).max() / means[-1])
            dealt.append(max(images[mine].sum() for mine in deal(images.tolist(), ranks)) / means[-1])
        yield Line(
            ranks, packs, steps, *(float(value) for value in (np.mean(means), np.mean(order), np.max(order))),
            float(np.mean(dealt)), float(np.max(dealt)),
        )  # fmt: skip


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
