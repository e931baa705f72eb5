"""`torchrun --nproc-per-node N -m megatron_mm.train experiment=NAME key=value ...`: the training loop.

This file only assembles: data, family, engine, checkpoints and metrics live in their own rooms.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
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
from megatron_mm.engines.base import Engine, Evaluation, StepMetrics
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
from megatron_mm.profiling import ProfileWindow
from megatron_mm.report.metrics import MetricsWriter, read_metrics
from megatron_mm.report.mfu import peak_flops, trunk_flops
from megatron_mm.run_folder import continues, open_run_folder
from megatron_mm.run_lock import RunLock
from megatron_mm.validation import Validation


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


def unreported(metrics: StepMetrics) -> None:
    """What becomes of a step's metrics where metrics.jsonl is enough."""


def train(
    config: Config,
    layout: Layout,
    device: torch.device,
    stop: StopSignal,
    report: Callable[[StepMetrics], None] = unreported,
) -> None:
    """Runs (or resumes) the run that `config` describes, on every rank, each of which is told its steps.

    Raises:
        ValueError: anything that a user can mend, before the first iteration.
    """
    folder = Path(config.run.dir)
    logging.basicConfig(level=logging.INFO if layout.rank == 0 else logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)

    family, plan, reader, ledger = first_rank_first(lambda: open_run(config))  # the first one writes the index
    validation = first_rank_first(lambda: Validation(config, family)) if config.data.validation.given else None
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
            _train(engine, checkpoint, plan, reader, ledger, validation, resumes, stop, report)
    finally:
        lock.release()


def _train(
    engine: Engine,
    checkpoint: Checkpointer,
    plan: Plan,
    reader: SampleReader,
    ledger: list[LedgerEntry],
    validation: Validation | None,
    resumes: bool,
    stop: StopSignal,
    report: Callable[[StepMetrics], None],
) -> None:
    """The iterations that are left of the run in run.dir, whose lock rank 0 holds."""
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
        _announce(writer, engine, plan, ledger, validation, iteration)
    extra = {"config": to_yaml(config)}
    saved = first = iteration
    skipped, window = 0, ProfileWindow(config.profile, folder / "profile", layout.rank)
    last = min(config.train.train_iters, config.train.exit_interval or config.train.train_iters)
    try:
        while iteration < last:
            window.before(iteration + 1)
            began = time.perf_counter()
            step = next(loader)
            metrics = engine.step(step.batches, lambda: stop.received)
            iteration, state = iteration + 1, step.state
            seconds = time.perf_counter() - began
            checkpoint.poll()
            report(metrics)
            if (trace := window.after(iteration)) and writer:
                writer.say(f"wrote the trace {trace}")
            due = validation and not metrics.stopping and validation.due(iteration, iteration == last)
            evaluation = validation.run(engine) if validation and due else None
            if writer:
                writer.write(_row(engine, iteration, step, metrics, evaluation, seconds), 1000 * seconds)
            skipped = skipped + 1 if metrics.skipped else 0
            if skipped == config.train.max_skipped:
                raise _diverged(config, skipped)
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
        window.close()
        if writer:
            writer.close()
    if writer and iteration > first:
        from megatron_mm.report.plots import plot_losses  # slow to import

        plot_losses(read_metrics(folder / "metrics.jsonl"), folder / "loss.png")


def _diverged(config: Config, skipped: int) -> ValueError:
    last = latest_iteration(config.checkpoint.save) if config.checkpoint.save else None
    remedy = "lower optim.lr or mend the data, and start anew"
    if last is not None:
        remedy = f"iter_{last:07d} is the latest checkpoint; go on from there or an earlier one with a lower optim.lr"
    return ValueError(
        f"The gradients of {skipped} steps in a row were not finite (train.max_skipped): the run diverged; {remedy}."
    )


def _has_checkpoint(config: Config) -> bool:
    return config.checkpoint.save is not None and latest_iteration(config.checkpoint.save) is not None


def _announce(
    writer: MetricsWriter, engine: Engine, plan: Plan, ledger: list, validation: Validation | None, iteration: int
) -> None:
    config = engine.config
    writer.say(f"> {config.run.name}: {config.model.family} on {engine.device.type}, {engine.layout.describe()}")
    writer.say(f"> {len(plan.lengths)} documents in {_sources(config.data)}, {_told(ledger)}")
    if validation:
        writer.say(f"> {validation.description}")
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


def _row(
    engine: Engine, iteration: int, step: Step, metrics: StepMetrics, evaluation: Evaluation | None, seconds: float
) -> dict:
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
        **(_validation(evaluation) if evaluation else {}),
    }


def _validation(evaluation: Evaluation) -> dict[str, float]:
    """What an evaluation adds to the line of its iteration; a term without labels says nothing."""
    found = {f"validation/loss/{name}": loss for name, loss in evaluation.losses.items() if evaluation.counts[name]}
    return {"validation/loss": evaluation.loss, **found}


if __name__ == "__main__":
    run(main)
