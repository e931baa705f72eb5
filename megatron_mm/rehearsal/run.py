"""Rehearses one optimizer step of one rank: the engine's own, on the meta device, in process groups of nobody else."""

from __future__ import annotations

from dataclasses import dataclass

from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mm.benchmark.synthetic import rank_steps
from megatron_mm.config.compose import Config
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.families.base import Family
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.parallel.layout import Layout
from megatron_mm.parallel.optimizer import clip_and_step, squared_grad_norm
from megatron_mm.rehearsal.by_device import cpu_functions, cuda_functions
from megatron_mm.rehearsal.clock import Clock, Rates
from megatron_mm.rehearsal.fused import counted_chains
from megatron_mm.rehearsal.group import groups_of_one_rank
from megatron_mm.rehearsal.kernels import counted_kernels, cpu_operators
from megatron_mm.rehearsal.memory import Peak
from megatron_mm.rehearsal.meta import META, in_place_of_cuda
from megatron_mm.rehearsal.record import ENGINE, OPTIMIZER, Record
from megatron_mm.rehearsal.recorder import Recorder
from megatron_mm.rehearsal.scopes import scopes


@dataclass(frozen=True)
class Rehearsal:
    """One rank's step. micro_batches: how many were rehearsed, of so many in the step.

    start: bytes on the device before the step.
    pairs: allowed query-key pairs of the rehearsed micro-batches, of whole rows.
    """

    layout: Layout
    micro_batches: int
    of: int
    record: Record
    peak: Peak
    start: int
    pairs: int


def rehearse(
    config: Config,
    world_size: int,
    rank: int,
    rates: Rates | None = None,
    most: int | None = None,
    text_vocab_size: int = 32000,
    path: str = "cuda",
) -> Rehearsal:
    """One step of `rank`, with documents as `benchmark.synthetic` draws them.

    Args:
        most: micro-batches to rehearse of a step that has more; `enough` says how many show all that a step does.
        path: the code that runs, `cuda`'s or `cpu`'s: then its memory can be held against a CPU's own record.

    Raises:
        RehearsalError: the step does what a GPU would refuse, or wait for in the middle of a micro-batch.
    """
    with in_place_of_cuda() as pins:
        recorder = Recorder(pins, Clock(rates or Rates()), gpu=path == "cuda")
        pins.replaced |= cuda_functions(recorder) if path == "cuda" else cpu_functions()
        kernels = counted_kernels(recorder) if path == "cuda" else cpu_operators(recorder)
        groups = process_groups(config.parallel, 0, META, store=FakeStore(), rank=rank, world_size=world_size)
        with groups_of_one_rank(recorder.collective), kernels, counted_chains(recorder), groups as layout:
            family = build_family(config.model, text_vocab_size)
            with recorder:
                engine = _engine(config, family, layout, recorder)
            batches = rank_steps(config, family, text_vocab_size, layout.dp_size, most)
            with recorder, scopes(recorder, engine):
                prepared = [engine.prepare(batch) for batch in batches]
                engine.context.compare([batch.part for batch in prepared])  # as before a run's first step
                if path == "cpu":
                    engine.step(prepared)  # the reference attention keeps its plan of a mask
                recorder.restart()
                start = recorder.ledger.total
                engine.step(prepared)
                recorder.enter(ENGINE)
    pairs = sum(batch.pairs for batch in prepared)
    of = config.train.global_batch_size // config.train.micro_batch_size // layout.dp_size
    return Rehearsal(layout, len(batches), of, recorder.record, recorder.ledger.peak, start, pairs)


def enough(config: Config) -> int:
    """Micro-batches after which a step does nothing new: those that a pipeline fills with, and one more than that."""
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    return 2 * stages if parallel.virtual_pipeline_model_parallel_size else stages + 1


def _engine(config: Config, family: Family, layout: Layout, recorder: Recorder) -> MegatronEngine:
    """The engine as it is after its first step: the optimizer has its states. Weights are not drawn."""
    engine = MegatronEngine(config, family, layout, META, fresh="none")
    recorder.enter(OPTIMIZER)
    squared_grad_norm(engine.optimizer)
    clip_and_step(engine.optimizer, 1.0)
    recorder.enter(ENGINE)
    for chunk in engine.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            if buffer.param_data is not None:
                recorder.ledger.give(buffer.param_data, "weights")
            recorder.ledger.give(buffer.grad_data, "gradients")
        for parameter in chunk.parameters():
            recorder.ledger.give(parameter, "weights")
    return engine
