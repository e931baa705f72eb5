"""One row of results.csv, and the parts of it that are known before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from mm_kernels.rows import around, package_version

from megatron_mm.benchmark.arguments import Run

KEY = (
    "experiment", "variant", "layers", "hidden_size", "precision", "seq_length", "rows", "micro_batch_size",
    "recompute", "device", "driver", "cuda", "torch", "triton", "megatron_core", "commit",
)  # fmt: skip
"""Columns by which a row is known again."""


@dataclass(frozen=True)
class Result:
    """What was measured, how, and where. Figures are None where `note` says why there are none."""

    experiment: str
    variant: str
    says: str
    family: str
    layers: int
    hidden_size: int
    precision: str
    seq_length: int
    rows: int
    """Packs in a step."""
    micro_batch_size: int
    recompute: str
    attention: str = ""
    elementwise: str = ""
    rms_norm: str = ""
    parameters: int | None = None
    ms_per_step: float | None = None
    """Median."""
    ms_fastest: float | None = None
    ms_slowest: float | None = None
    tokens_per_second: float | None = None
    """Real tokens, not padding."""
    tflops: float | None = None
    """TFLOP/s of the model's own work; see `measure.with_figures`."""
    mfu: float | None = None
    """Of the data sheet's rate."""
    mfu_of_matrix_rate: float | None = None
    """Of matrix_tflops."""
    peak_gib: float | None = None
    loss: float | None = None
    pairs_of_causal: float | None = None
    """Allowed pairs, as a share of those of one causal document a row."""
    tokens: float | None = None
    documents: float | None = None
    note: str = ""
    matrix_tflops: float | None = None
    """Measured here: the product of two bf16 matrices of 8192 x 8192."""
    device: str = ""
    driver: str = ""
    cuda: str = ""
    torch: str = ""
    triton: str = ""
    megatron_core: str = ""
    commit: str = ""


def blank(run: Run, around: dict) -> Result:
    """A run's row before it is measured; `around` from `environment`."""
    train, trunk = run.config.train, run.config.model.trunk
    return Result(
        experiment=run.experiment,
        variant=run.variant.name,
        says=run.variant.says,
        family=run.config.model.family,
        layers=trunk.num_layers,
        hidden_size=trunk.hidden_size,
        precision=train.precision,
        seq_length=run.config.data.seq_length,
        rows=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        recompute=run.config.parallel.recompute_granularity or "none",
        **around,
    )


def environment(device: torch.device) -> dict[str, str]:
    """The columns that say where and with what was measured."""
    return around(device) | {"megatron_core": package_version("megatron-core")}


def parsed(row: Mapping[str, str]) -> Result:
    """A result from its row in the file."""
    read = {"str": str, "int": int, "float": float}
    values = {}
    for field in fields(Result):
        kind, _, optional = str(field.type).partition(" | ")
        values[field.name] = None if optional and not row[field.name] else read[kind](row[field.name])
    return Result(**values)
