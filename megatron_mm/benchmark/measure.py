"""Measures one variant after the other: builds the engine, times its steps, profiles two of them."""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron_mm.benchmark.arguments import BenchmarkConfig, Run
from megatron_mm.benchmark.profiling import Share, profile_steps
from megatron_mm.benchmark.result import Result
from megatron_mm.benchmark.variants import attending
from megatron_mm.config.compose import Config
from megatron_mm.config.schema import AttentionConfig
from megatron_mm.documents.traits import MaskTraits
from megatron_mm.engines.base import StepMetrics
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.families.base import Family
from megatron_mm.mask import area
from megatron_mm.nn.attention import BACKENDS
from megatron_mm.parallel.build import select_parts
from megatron_mm.parallel.layout import Layout
from megatron_mm.report.mfu import peak_flops, trunk_flops
from megatron_mm.types import PackedBatch

logger = logging.getLogger(__name__)

Steps = list[list[PackedBatch]]
"""The micro-batches of each step; a benchmark of more steps begins anew."""


class Bench:
    """Measures runs in one process. An engine stays as long as nothing but attention changes."""

    def __init__(self, benchmark: BenchmarkConfig, layout: Layout, device: torch.device):
        self._benchmark, self._layout, self._device = benchmark, layout, device
        self._engine: MegatronEngine | None = None

    def measure(self, run: Run, family: Family, steps: Steps, blank: Result) -> tuple[Result, list[Share]]:
        """`blank` with what was measured, or with a note that says why nothing was; and the profile, if any."""
        try:
            return self._measure(run, family, steps, blank)
        except (ValueError, NotImplementedError) as error:  # it cannot run here, or not under this mask
            return replace(blank, note=str(error)), []
        except torch.AcceleratorError as error:  # nothing runs in this process any more
            return replace(blank, note=_named(error)), []
        except torch.OutOfMemoryError:
            note = "out of memory"
        except RuntimeError as error:  # a peer's compiler gave up: the other variants still count
            logger.warning("%s %s failed", run.experiment, run.variant.name, exc_info=error)
            note = _named(error)
        self._release()
        return replace(blank, note=note), []

    def _release(self) -> None:
        """Lets go of the engine and its memory."""
        self._engine = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _measure(self, run: Run, family: Family, steps: Steps, blank: Result) -> tuple[Result, list[Share]]:
        config, benchmark, device = run.config, self._benchmark, self._device
        parts = select_parts(config, family, device)
        engine = self._engine_for(config, family)
        peer = run.variant.peer
        attend = peer(mask_rows=3 if MaskTraits.of(family).hides_keys else 2) if peer else BACKENDS[parts.attention]
        prepared = [[engine.prepare(batch) for batch in batches] for batches in steps]
        step = lambda number: engine.step(prepared[number % len(prepared)])  # noqa: E731
        shares: list[Share] = []
        with attending(engine.models[0], attend):
            seconds, metrics, peak_bytes = time_steps(step, benchmark.warmup, benchmark.steps, device)
            if benchmark.profile:
                name = f"trace_{run.experiment}_{run.variant.name}.json.gz"
                trace = Path(benchmark.out) / name if benchmark.trace else None
                shares = profile_steps(step, engine.models[0], device, trace)
        result = replace(
            blank,
            attention=run.variant.name if peer else parts.attention,
            elementwise=parts.fusion.elementwise,
            rms_norm=parts.fusion.rms_norm,
            parameters=sum(parameter.numel() for parameter in engine.models[0].parameters()),
            peak_gib=peak_bytes / 2**30 if peak_bytes else None,
        )
        timed = [steps[number % len(steps)] for number in range(benchmark.steps)]
        return with_figures(result, run, family, timed, seconds, metrics, peak_flops(device)), shares

    def _engine_for(self, config: Config, family: Family) -> MegatronEngine:
        config = replace(config, attention=AttentionConfig())
        if self._engine is None or self._engine.config != config:
            self._release()
            self._engine = MegatronEngine(config, family, self._layout, self._device)
        return self._engine


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def time_steps(
    step: Callable[[int], StepMetrics], warmup: int, count: int, device: torch.device
) -> tuple[list[float], list[StepMetrics], int | None]:
    """Seconds and metrics of `step(0)` .. `step(count - 1)` after `warmup` others, each until the device is idle, and
    the most bytes allocated (CUDA)."""
    cuda = device.type == "cuda"
    synchronize = partial(torch.cuda.synchronize, device) if cuda else lambda: None
    for number in range(warmup):
        step(number)
    synchronize()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds, metrics = [], []
    for number in range(count):
        began = time.perf_counter()
        metrics.append(step(number))
        synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds, metrics, torch.cuda.max_memory_allocated(device) if cuda else None


def with_figures(
    result: Result,
    run: Run,
    family: Family,
    timed: Steps,
    seconds: list[float],
    metrics: list[StepMetrics],
    peak: float | None,
) -> Result:
    """`result` with times and utilisation. FLOPs are those of allowed pairs and real tokens, in trunk and head;
    recomputation and the patch codec count nothing."""
    count, median = len(seconds), statistics.median(seconds)
    masks = [mask for step in timed for batch in step for mask in batch.mask.numpy()]
    causal = len(masks) * masks[0].shape[1] * (masks[0].shape[1] + 1) // 2
    pairs = causal if run.variant.whole_rows else sum(map(area, masks))
    tokens = sum(step.tokens for step in metrics)
    rate = trunk_flops(family.trunk, family.vocab.size, tokens, pairs) / count / median
    return replace(
        result,
        ms_per_step=1e3 * median,
        ms_fastest=1e3 * min(seconds),
        ms_slowest=1e3 * max(seconds),
        tokens_per_second=tokens / count / median,
        tflops=rate / 1e12,
        mfu=rate / peak if peak else None,
        mfu_of_matrix_rate=rate / 1e12 / result.matrix_tflops if result.matrix_tflops else None,
        loss=statistics.fmean(step.loss for step in metrics),
        pairs_of_causal=pairs / causal,
        tokens=tokens / count,
        documents=sum(batch.documents for step in timed for batch in step) / count,
    )
