"""`torchrun --nproc-per-node N -m megatron_mm.benchmark.memory out=FILE.csv [tokens=2048] [key=value ...]`

Peak memory of a rank in a training step whose context grows with the ranks: N context-parallel ranks, one causal
document of N x tokens, of which every rank needs all keys in the end. Appends a row to the CSV file. What counts is
what tensors take above what is there before the step, by CUDA's allocator or the profiler's record of the CPU's.
"""

from __future__ import annotations

import csv
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_mm.benchmark.result import environment
from megatron_mm.config.arguments import parse_own
from megatron_mm.config.cli import user_errors
from megatron_mm.config.compose import Config, compose
from megatron_mm.config.validate import validate
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.pack import pack
from megatron_mm.data.shape import Shape, TextPart
from megatron_mm.documents.builder import Builder
from megatron_mm.engines.base import MicroBatch
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.families.base import Family
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.distributed import gather, pick_device, process_groups
from megatron_mm.types import PackedBatch, Sample, TextSegment

MODEL = [
    "model=chameleon_tiny", "run.name=memory", "data.path=none", "train.global_batch_size=1", "logging.wandb=disabled",
    "model.trunk.num_layers=4", "model.trunk.hidden_size=256", "model.trunk.num_attention_heads=8",
]  # fmt: skip
TEXT_VOCABULARY = 1000


@dataclass(frozen=True)
class MemoryConfig:
    out: str = "benchmarks/memory.csv"
    tokens: int = 2048
    """On each rank."""


@dataclass(frozen=True)
class MemoryResult:
    ranks: int
    comm: str
    tokens_per_rank: int
    seq_length: int
    feed_forward_block: int | None
    recompute: str
    peak_mib: float
    """Of the rank with most."""
    mean_mib: float
    device: str
    torch: str
    commit: str


def main(arguments: Sequence[str]) -> None:
    benchmark, further = parse_own(MemoryConfig(), arguments)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    length = benchmark.tokens * ranks
    config = compose([*MODEL, f"data.seq_length={length}", f"parallel.context_parallel_size={ranks}", *further])
    validate(config, ranks)
    device = pick_device(config.parallel)
    if device.type == "cpu":
        torch.set_num_threads(1)
    family = build_family(config.model, TEXT_VOCABULARY)
    with process_groups(config.parallel, config.train.seed, device) as layout:
        engine = MegatronEngine(config, family, layout, device)
        batch = engine.prepare(one_document(family, length))
        engine.step([batch])  # optimizer states, buffers of the process groups
        peaks = [peak / 2**20 for peak in gather(_peak_of(engine, batch, device), device)]
        if layout.rank == 0:
            _append(Path(benchmark.out), _result(config, benchmark, peaks, device))


def one_document(family: Family, length: int) -> PackedBatch:
    """A row of `length` positions, all of them one document of random text."""
    streams, builder = Streams(0, 0, 0), Builder(family)
    beside = builder.length(Shape((TextPart(0, 0),)))
    words = np.random.default_rng(0).integers(TEXT_VOCABULARY, size=length - beside)
    document = builder.lay_out(Sample(0, "text", (TextSegment(words),)), streams)
    return pack([[document]], length, family.fields, family.vocab.pad, [[streams.dropout_key]])


def _peak_of(engine: MegatronEngine, batch: MicroBatch, device: torch.device) -> int:
    """Bytes that a step takes at most, above what is there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        engine.step([batch])
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine.step([batch])
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def _result(config: Config, benchmark: MemoryConfig, peaks: list[float], device: torch.device) -> MemoryResult:
    around, parallel = environment(device), config.parallel
    return MemoryResult(
        ranks=len(peaks),
        comm=parallel.context_parallel_comm,
        tokens_per_rank=benchmark.tokens,
        seq_length=config.data.seq_length,
        feed_forward_block=parallel.feed_forward_block,
        recompute=parallel.recompute_granularity or "none",
        peak_mib=round(max(peaks), 1),
        mean_mib=round(sum(peaks) / len(peaks), 1),
        device=around["device"],
        torch=around["torch"],
        commit=around["commit"],
    )


def _append(path: Path, result: MemoryResult) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(result)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(result))
    print(
        f"{result.ranks} ranks, {result.seq_length} positions, {result.comm}: peak {result.peak_mib} MiB a rank "
        f"(mean {result.mean_mib})"
    )


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
