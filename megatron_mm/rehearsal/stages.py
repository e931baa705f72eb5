"""Rehearses a rank of the first, a middle and the last pipeline stage, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from megatron_mm.config.compose import Config
from megatron_mm.rehearsal.clock import Rates
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
    """Name -> rehearsal, one after the other: what a rank leaves behind does not reach the next."""
    found = {}
    for name, rank in ranks.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            task = pool.submit(rehearse, config, world_size, rank, rates, enough(config), text_vocab_size)
            found[name] = task.result()
    return found
