"""Which layout is best: those that a closed formula lets pass are rehearsed, the most promising first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from mm_kernels.rows import Rows

from megatron_mm.config.compose import Config, ConfigError
from megatron_mm.config.validate import validate
from megatron_mm.families.base import Family
from megatron_mm.plan.memory import estimate, usable
from megatron_mm.rehearsal.clock import Rates
from megatron_mm.rehearsal.run import Rehearsal
from megatron_mm.rehearsal.stages import rehearse_ranks, stage_ranks
from megatron_mm.rehearsal.step import StepTime, step_time

TENSOR, PIPELINE, CHUNKS, MICRO = (1, 2, 4, 8), (1, 2, 4, 8, 16), (None, 2, 4), (1, 2, 4)
RECOMPUTE = (None, "full")
"""Not `selective`: of our attention nothing is kept that it could compute again."""
COLUMNS = ("run", "gpus", "layout", "step_s", "tokens_per_second", "mfu", "peak_gb", "fits", "torch")
MOST = 3
"""Rehearsals for each layout that is to fit."""
NEAR = 1.3
"""By how much the formula's memory may be over what fits: it leaves parts out, and counts others twice."""


@dataclass(frozen=True)
class Candidate:
    """A layout, by what it changes, and what came of its rehearsal."""

    config: Config
    step: StepTime
    peak_bytes: int
    estimate: float
    """Of the peak, by the formula."""
    fits: bool

    def describe(self) -> str:
        parallel, train = self.config.parallel, self.config.train
        chunks = parallel.virtual_pipeline_model_parallel_size
        return (
            f"TP{parallel.tensor_model_parallel_size}{'+SP' if parallel.sequence_parallel else ''} "
            f"PP{parallel.pipeline_model_parallel_size}{f'x{chunks}' if chunks else ''} "
            f"CP{parallel.context_parallel_size} micro-batch {train.micro_batch_size} "
            f"recompute {parallel.recompute_granularity or 'none'}"
        )


def search(
    config: Config,
    family: Family,
    world_size: int,
    rates: Rates,
    gpu_gigabytes: float,
    trials: int,
    text_vocab_size: int,
) -> list[Candidate]:
    """The rehearsed layouts, those that fit first, the fastest of them first. It goes on until `trials` of them fit, or
    MOST times as many were rehearsed. What rehearsals find beyond the formula's memory holds for the layouts to come.

    Raises:
        ConfigError: by the formula none comes near what a GPU has.
    """
    limit = usable(gpu_gigabytes)
    sizes = [(layout, estimate(layout, family.vocab.size, world_size).total) for layout in layouts(config, world_size)]
    near = [(layout, size) for layout, size in sizes if size < NEAR * limit]
    if not near:
        raise ConfigError(
            f"No layout over world_size={world_size} comes near {gpu_gigabytes:g} GB a GPU: give more GPUs, or a "
            "shorter data.seq_length."
        )
    near.sort(key=lambda pair: guess(pair[0], family, world_size, rates))
    found: list[Candidate] = []
    scale = 1 / NEAR  # of the formula's memory to the rehearsed one, at least
    for layout, size in near:
        if size * scale > limit:
            continue
        found.append(_try(layout, family, world_size, rates, limit, text_vocab_size))
        scale = min(each.peak_bytes / each.estimate for each in found)
        if sum(candidate.fits for candidate in found) == trials or len(found) == MOST * trials:
            break
    return sorted(found, key=lambda candidate: (not candidate.fits, candidate.step.total))


def rows(path: Path) -> Rows:
    """A CSV file of rehearsed layouts.

    Raises:
        ValueError: it has other columns.
    """
    return Rows(path, COLUMNS, COLUMNS[:3])


def row(name: str, world_size: int, found: Candidate) -> dict[str, object]:
    """What such a file says of a layout of the run `name`."""
    step = found.step
    figures = (step.total, step.tokens_per_second, step.mfu, found.peak_bytes / 1e9, found.fits)
    return dict(zip(COLUMNS, (name, world_size, found.describe(), *figures, torch.__version__), strict=True))


def layouts(config: Config, world_size: int) -> Iterator[Config]:
    """All that are valid for the run; its context and expert parallelism stay as they are."""
    for tp, pp, chunks, micro, again in itertools.product(TENSOR, PIPELINE, CHUNKS, MICRO, RECOMPUTE):
        parallel = replace(
            config.parallel,
            tensor_model_parallel_size=tp,
            sequence_parallel=tp > 1,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=chunks,
            recompute_granularity=again,
        )
        layout = replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=micro))
        try:
            validate(layout, world_size)
        except ConfigError:
            continue
        yield layout


def guess(config: Config, family: Family, world_size: int, rates: Rates) -> float:
    """Seconds of a step by a formula that ranks layouts: products, what tensor and data parallelism send, bubbles."""
    trunk, parallel, train = family.trunk, config.parallel, config.train
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = world_size // parallel.model_parallel_size
    micro_batches = train.global_batch_size / train.micro_batch_size / dp
    tokens = train.micro_batch_size * config.data.seq_length / parallel.context_parallel_size
    weights = (trunk.active_weights + trunk.hidden_size * family.vocab.size) / tp / pp
    passes = 4 if parallel.recompute_granularity == "full" else 3
    compute = 2 * passes * weights * tokens / (1e12 * rates.product_tflops)
    sent = 8 * tokens * trunk.hidden_size * train.dtype.itemsize * (tp - 1) / tp * trunk.num_layers / pp
    micro = compute * (1 + 0.1 * (train.micro_batch_size == 1)) + sent / (1e9 * rates.node_gigabytes)
    bubble = (pp - 1) / (parallel.virtual_pipeline_model_parallel_size or 1)
    ports = min(rates.network_gigabytes * max(rates.node_size / tp, 1.0), rates.node_gigabytes)
    reduced = 6 * weights * min(dp - 1, 1) / (1e9 * ports)
    return micro * (micro_batches + bubble) + max(reduced - micro, 0.0)  # behind the first and last micro-batch


def _try(
    config: Config, family: Family, world_size: int, rates: Rates, limit: float, text_vocab_size: int
) -> Candidate:
    ranks = stage_ranks(config, world_size, middle=False)
    rehearsals: dict[str, Rehearsal] = rehearse_ranks(config, world_size, ranks, rates, text_vocab_size)
    peak = max(rehearsal.peak.total for rehearsal in rehearsals.values())
    step = step_time(config, family, list(rehearsals.values()), rates)
    return Candidate(config, step, peak, estimate(config, family.vocab.size, world_size).total, peak < limit)
