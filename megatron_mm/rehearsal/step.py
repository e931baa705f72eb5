"""A step's time, from what some of a layout's ranks did in their rehearsals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mm.config.compose import Config
from megatron_mm.families.base import Family
from megatron_mm.rehearsal.clock import Rates
from megatron_mm.rehearsal.run import Rehearsal
from megatron_mm.report.mfu import DENSE_BF16_PEAKS, trunk_flops


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, each of the slowest of the ranks."""

    kernels: float
    """Of all micro-batches."""
    host: float
    """By which launching the micro-batches' kernels takes longer than running them."""
    communication: float
    """That is not hidden behind kernels, of all micro-batches."""
    bubble: float
    """In which a pipeline stage has nothing to do."""
    once: float
    """Gradients, optimizer, and what is not hidden of their communication."""
    tokens_per_second: float
    """Of one GPU: positions of rows, padding among them, so that layouts whose ranks draw other rows compare."""
    mfu: float
    """Of the same positions, and of allowed pairs."""

    @property
    def total(self) -> float:
        return self.kernels + self.host + self.communication + self.bubble + self.once


def step_time(config: Config, family: Family, rehearsals: Sequence[Rehearsal], rates: Rates) -> StepTime:
    slowest = max(rehearsals, key=_micro_batch_seconds)
    micro, count = slowest.record.total(once=False), slowest.micro_batches
    of = slowest.of
    kernels, waited = (of * seconds / count for seconds in (micro.seconds, micro.waited))
    launching = 1e-6 * rates.launch_microseconds * micro.launches * of / count
    host = max(launching - kernels - waited, 0.0)
    parallel = config.parallel
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    bubble = (kernels + host + waited) / of * (parallel.pipeline_model_parallel_size - 1) / chunks
    once = max(_once_seconds(rehearsal) for rehearsal in rehearsals)
    seconds = kernels + host + waited + bubble + once
    world, replicas = slowest.layout.world_size, slowest.layout.dp_size
    tokens = config.train.global_batch_size * config.data.seq_length
    flops = trunk_flops(family.trunk, family.vocab.size, tokens, slowest.pairs * of * replicas // count)
    return StepTime(
        kernels,
        host,
        waited,
        bubble,
        once,
        tokens / seconds / world,
        flops / seconds / world / DENSE_BF16_PEAKS["H100"],
    )


def _micro_batch_seconds(rehearsal: Rehearsal) -> float:
    sums = rehearsal.record.total(once=False)
    return (sums.seconds + sums.waited) / rehearsal.micro_batches


def _once_seconds(rehearsal: Rehearsal) -> float:
    sums = rehearsal.record.total(once=True)
    return sums.seconds + sums.waited
