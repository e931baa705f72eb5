"""`torchrun --nproc-per-node N -m megatron_mm.train experiment=NAME key=value ...`: the training loop.

This file only assembles: data, family, engine, checkpoints and metrics live in their own rooms.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import closing
from pathlib import Path

import torch
from omegaconf import OmegaConf

from megatron_mm.config.cli import run
from megatron_mm.config.compose import Config, to_yaml
from megatron_mm.config.schema import DataConfig, ParallelConfig
from megatron_mm.config.validate import validate
from megatron_mm.data.dataset import LedgerEntry, open_data, write_ledger
from megatron_mm.data.loader import DataState, Step, StepLoader
from megatron_mm.data.plan import Plan
from megatron_mm.data.sample import SampleReader
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.documents.builder import Builder
from megatron_mm.engines.base import StepMetrics
from megatron_mm.engines.checkpoint import Checkpointer
from megatron_mm.engines.format import latest_iteration
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.engines.weights import load_weights
from megatron_mm.families.base import Family
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.build import select_parts
from megatron_mm.parallel.distributed import first_rank_first, on_first_rank, pick_device, process_groups
from megatron_mm.parallel.init import Fresh
from megatron_mm.parallel.layout import Layout
from megatron_mm.report.metrics import MetricsWriter, read_metrics
from megatron_mm.report.mfu import peak_flops, trunk_flops
from megatron_mm.run_folder import continues, open_run_folder
from megatron_mm.run_lock import RunLock


class StopSignal:
    """Set by SIGUSR1 (a job's time limit is near) or SIGTERM: save after the current iteration and exit with 0."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        self.received = True


def main(config: Config) -> None:
    stop = StopSignal()
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    device = start_device(config.parallel)
    with process_groups(config.parallel, config.train.seed, device) as layout:
        train(config, layout, device, stop)


def start_device(*layouts: ParallelConfig) -> torch.device:
    """This rank's device for these layouts, its threads set."""
    device = pick_device(*layouts)
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return device


def open_run(config: Config) -> tuple[Family, Plan, SampleReader, list[LedgerEntry]]:
    """The run's family and its data.

    Raises:
        ValueError: see `build_family` and `open_data`.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    family = build_family(config.model, tokenizer.size)
    return family, *open_data(config.data, config.model, Builder(family), tokenizer, config.train.seed)


def train(config: Config, layout: Layout, device: torch.device, stop: StopSignal) -> list[StepMetrics]:
    """Runs (or resumes) the run that `config` describes, on every rank. Returns this process's steps.

    Raises:
        ValueError: anything that a user can mend, before the first iteration.
    """
    folder = Path(config.run.dir)
    logging.basicConfig(level=logging.INFO if layout.rank == 0 else logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)

    family, plan, reader, ledger = first_rank_first(lambda: open_run(config))  # the first one writes the index
    on_first_rank(lambda: bool(select_parts(config, family, device)))  # refuses before there is a folder
    resumes = on_first_rank(lambda: continues(config) and _has_checkpoint(config))
    lock = RunLock(folder)
    on_first_rank(lock.acquire)
    try:
        # A checkpoint to start from brings every weight but new adapters.
        fresh: Fresh = "none" if resumes else "adapters" if config.checkpoint.load else "all"
        engine = MegatronEngine(config, family, layout, device, fresh)
        on_first_rank(lambda: open_run_folder(config, lock))
        saves = config.checkpoint
        with closing(Checkpointer(engine, saves.save or folder, saves.keep, saves.async_save)) as checkpoint:
            return _train(engine, checkpoint, plan, reader, ledger, resumes, stop)
    finally:
        lock.release()


def _train(
    engine: MegatronEngine,
    checkpoint: Checkpointer,
    plan: Plan,
    reader: SampleReader,
    ledger: list[LedgerEntry],
    resumes: bool,
    stop: StopSignal,
) -> list[StepMetrics]:
    """The iterations that are left of the run in run.dir, whose lock rank 0 holds. Returns this process's steps."""
    config, layout, folder = engine.config, engine.layout, Path(engine.config.run.dir)
    iteration, state = 0, DataState()
    if resumes:
        common = checkpoint.load(config.checkpoint.save)
        iteration, state = common["iteration"], DataState.from_dict(common["data_state"])
    elif config.checkpoint.load:
        load_weights(engine.models, config.checkpoint.load)
        engine.take_weights()

    loader = StepLoader(
        plan, reader, Builder(engine.family), config.data, config.train.seed, config.train.global_batch_size,
        config.train.micro_batch_size, layout.dp_rank, layout.dp_size, state, engine.prepare,
    )  # fmt: skip
    writer = None
    if layout.rank == 0:
        write_ledger(folder / "ledger.jsonl", ledger)
        run_config = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
        writer = MetricsWriter(folder, config.logging, run_config, config.run.name, iteration, config.train.train_iters)
        _announce(writer, engine, plan, ledger, iteration)
    extra = {"config": to_yaml(config)}
    steps, saved = [], iteration
    last = min(config.train.train_iters, config.train.exit_interval or config.train.train_iters)
    try:
        while iteration < last:
            began = time.perf_counter()
            step = next(loader)
            metrics = engine.step(step.batches, lambda: stop.received)
            iteration, state = iteration + 1, step.state
            checkpoint.poll()
            steps.append(metrics)
            if writer:
                seconds = time.perf_counter() - began
                writer.write(_row(engine, iteration, step, metrics, seconds), 1000 * seconds)
            if config.checkpoint.save and (metrics.stopping or iteration % config.checkpoint.save_interval == 0):
                checkpoint.save(iteration, extra | {"data_state": state.to_dict()})
                saved = iteration
            if metrics.stopping:
                break
        if config.checkpoint.save and saved < iteration:
            checkpoint.save(iteration, extra | {"data_state": state.to_dict()})
        checkpoint.finish()
    finally:
        loader.close()
        if writer:
            writer.close()
    if writer and steps:
        from megatron_mm.report.plots import plot_losses  # slow to import

        plot_losses(read_metrics(folder / "metrics.jsonl"), folder / "loss.png")
    return steps


def _has_checkpoint(config: Config) -> bool:
    return config.checkpoint.save is not None and latest_iteration(config.checkpoint.save) is not None


def _announce(writer: MetricsWriter, engine: MegatronEngine, plan: Plan, ledger: list, iteration: int) -> None:
    config = engine.config
    writer.say(f"> {config.run.name}: {config.model.family} on {engine.device.type}, {engine.layout.describe()}")
    writer.say(f"> {len(plan.lengths)} documents in {_sources(config.data)}, {_told(ledger)}")
    writer.say("> trainable: {:,} of {:,} parameters".format(*engine.trained_of))
    if iteration:
        writer.say(f"> resuming after iteration {iteration}")


def _told(ledger: list[LedgerEntry]) -> str:
    split = sum("split" in entry.reason for entry in ledger)
    return f"{len(ledger) - split} left out{f', {split} split' if split else ''} (ledger.jsonl)"


def _sources(data: DataConfig) -> str:
    """Where the documents come from, with each source's share in percent."""
    whole = sum(source.weight for source in data.sources)
    shares = [f"{source.path} ({source.task}, {source.weight / whole:.1%})" for source in data.sources]
    return f"{', '.join(shares)} of {data.blend_by}" if shares else str(data.path)


def _row(engine: MegatronEngine, iteration: int, step: Step, metrics: StepMetrics, seconds: float) -> dict:
    """The iteration's line of metrics.jsonl."""
    world_size, family = engine.layout.world_size, engine.family
    mfu, peak = None, peak_flops(engine.device)
    if peak and metrics.pairs is not None:
        trained, of = engine.trained_of
        flops = trunk_flops(family.trunk, family.vocab.size, metrics.tokens, metrics.pairs, trained / of)
        mfu = flops / seconds / world_size / peak
    return {
        "iteration": iteration,
        "consumed_samples": step.state.consumed_samples,
        "consumed_tokens": step.state.consumed_tokens,
        "loss": metrics.loss,
        **{f"loss/{name}": value for name, value in metrics.losses.items()},
        **{f"count/{name}": value for name, value in metrics.counts.items()},
        **{f"router/{name}": share for name, share in metrics.router.items()},
        "grad_norm": metrics.grad_norm,
        "learning_rate": metrics.learning_rate,
        "iteration_seconds": seconds,
        "tokens_per_second_per_gpu": metrics.tokens / seconds / world_size,
        "mfu": mfu,
        "skipped": int(metrics.skipped),
    }


if __name__ == "__main__":
    run(main)
