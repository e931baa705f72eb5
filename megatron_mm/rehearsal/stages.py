"""Rehearses a rank of the first, a middle and the last pipeline stage, each in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from megatron_mm.config.compose import Config
from megatron_mm.rehearsal.clock import Rates
from megatron_mm.rehearsal.errors import RehearsalError
from megatron_mm.rehearsal.run import Rehearsal, enough, rehearse


def stage_ranks(config: Config, world_size: int, middle: bool = True) -> dict[str, int]:
    """Name of a stage -> the first of its ranks."""
    stages = config.parallel.pipeline_model_parallel_size
    chosen = {"only stage": 0} if stages == 1 else {"first stage": 0, "last stage": stages - 1}
    if middle and stages > 2:
        chosen = {"first stage": 0, "middle stage": stages // 2, "last stage": stages - 1}
    return {name: stage * (world_size // stages) for name, stage in chosen.items()}


def rehearse_ranks(
    config: Config, world_size: int, ranks: dict[str, int], rates: Rates, text_vocab_size: int
) -> dict[str, Rehearsal]:
    """Name -> rehearsal. Each rank has a process of its own, so that what it leaves behind does not reach the next.

    Raises:
        RehearsalError: see `rehearse`; or a process was killed.
    """
    context = multiprocessing.get_context("fork")
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in ranks]
        given = [
            pool.submit(rehearse, config, world_size, rank, rates, enough(config), text_vocab_size)
            for pool, rank in zip(pools, ranks.values(), strict=True)
        ]
        try:
            return {name: task.result() for name, task in zip(ranks, given, strict=True)}
        except BrokenProcessPool as error:
            raise RehearsalError(
                "A process that rehearsed a rank was killed, perhaps for want of memory: rehearse one rank with rank=N."
            ) from error
