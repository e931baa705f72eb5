"""`python -m megatron_mm.rehearsal.table [out=FILE] [families=NAME,...]`: counts of a layer of every family, as CSV.

A test holds the checked-in table against the code, so a kernel, a byte or a tensor kept more or less shows in a change.
The models are of the papers' sizes but for their number of layers.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from megatron_mm.config.arguments import parse_arguments
from megatron_mm.config.cli import user_errors
from megatron_mm.config.compose import ConfigError, compose
from megatron_mm.rehearsal.clock import Rates
from megatron_mm.rehearsal.record import AGAIN, BACKWARD, FORWARD
from megatron_mm.rehearsal.run import Rehearsal
from megatron_mm.rehearsal.stages import rehearse_ranks

TORCH = "2.13"
"""The version of torch whose operations the table counts."""
COMMON = [
    "run.name=table", "data.path=none", "data.seq_length=4096", "logging.wandb=disabled", "train.precision=bf16",
    "train.global_batch_size=4", "model.trunk.num_layers=4", "checkpoint.save=null",
]  # fmt: skip
FAMILIES = {
    "transfusion": ["model=transfusion_7b"],
    "chameleon": ["model=chameleon_7b"],
    "janus": ["model=janus_pro_7b"],
    "showo": ["model=showo_1.3b"],
    "showo_flow": ["model=showo_flow_7b"],
    "mmada": ["model=mmada_8b"],
    "unimoe": ["model=unimoe_7b"],
}
TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
LAYOUTS = {
    "dp2": [],
    "tp2_sp": [TP, "parallel.sequence_parallel=true"],
    "pp2_interleaved": [PP, "parallel.virtual_pipeline_model_parallel_size=2"],
    "cp2": ["parallel.context_parallel_size=2"],
    "recompute_full": ["parallel.recompute_granularity=full"],
}
PARTS = ("front", "layer 1", "layer 2", "further", "back")
"""The first layer also makes what all share; of Uni-MoE's layers every other one has experts."""
DIRECTIONS = (FORWARD, AGAIN, BACKWARD)


@dataclass(frozen=True)
class TableConfig:
    out: str = "docs/rehearsal/layers.csv"
    families: str = ",".join(FAMILIES)


@dataclass(frozen=True)
class Row:
    """One part of a model in one pass of a micro-batch, on average over the step's."""

    family: str
    layout: str
    part: str
    direction: str
    launches: float
    gflop: float
    mib_moved: float
    mib_kept: float
    mib_peak: float


def rows(family: str, layout: str) -> list[Row]:
    """Of a rank of the first and one of the last stage, on two GPUs."""
    config = compose([*COMMON, *FAMILIES[family], *LAYOUTS[layout]])
    pipelined = config.parallel.pipeline_model_parallel_size > 1
    ranks = {"first": 0, "last": 1} if pipelined else {"first": 0}
    rehearsals = rehearse_ranks(config, 2, ranks, Rates(), 32000)
    found = [row for rehearsal in rehearsals.values() for row in _rows(family, layout, rehearsal)]
    unique = {(row.part, row.direction): row for row in reversed(found)}
    return sorted(unique.values(), key=lambda row: (PARTS.index(row.part), DIRECTIONS.index(row.direction)))


def _rows(family: str, layout: str, rehearsal: Rehearsal) -> Iterator[Row]:
    count = rehearsal.micro_batches
    for part in PARTS:
        for direction in DIRECTIONS:
            if (sums := rehearsal.record.parts.get((part, direction))) is not None:
                yield Row(
                    family, layout, part, direction,
                    launches=round(sums.launches / count, 2),
                    gflop=round(sums.flops / count / 1e9, 1),
                    mib_moved=round(sums.bytes / count / 2**20, 1),
                    mib_kept=round(sums.kept / count / 2**20, 1),
                    mib_peak=round(sums.peak / 2**20, 1),
                )  # fmt: skip


def to_csv(table: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in table)
    return text.getvalue()


def main(arguments: Sequence[str]) -> None:
    config = parse_arguments(TableConfig(), arguments)
    if not torch.__version__.startswith(TORCH):
        raise ConfigError(f"The table is torch {TORCH}'s, this is {torch.__version__}: its operations are others.")
    families = config.families.split(",")
    if unknown := next((name for name in families if name not in FAMILIES), None):
        raise ConfigError(f"families={unknown} is unknown; families: {', '.join(FAMILIES)}.")
    table = [row for family in families for layout in LAYOUTS for row in rows(family, layout)]
    path = Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_csv(table))
    print(f"{path}: {len(table)} rows")


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
