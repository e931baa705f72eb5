"""`torchrun --nproc-per-node N -m megatron_mm.stages experiment=NAME stages=[FAMILY/STAGE,...]`: stage after stage.

A stage is a file of the group `stage`, whose keys go over the experiment's and under the command line's. It trains into
<run.dir>/<STAGE>, from the weights of the stage before. The same command again goes on: a finished stage is skipped, an
interrupted one resumes.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import partial

import torch

from megatron_mm.config.cli import overrides, run
from megatron_mm.config.compose import Config, ConfigError, compose
from megatron_mm.config.validate import validate
from megatron_mm.engines.base import StepMetrics
from megatron_mm.engines.format import latest_iteration
from megatron_mm.parallel.distributed import agree, job, model_parallel, on_first_rank
from megatron_mm.run_folder import continues
from megatron_mm.train import StopSignal, open_run, start_device, train


def main(config: Config) -> None:
    stop = StopSignal()
    stages = compose_stages(config, overrides())
    for stage in stages:
        validate(stage, int(os.environ.get("WORLD_SIZE", "1")))
    device = start_device(*(stage.parallel for stage in stages))
    with job(device):
        run_stages(stages, device, stop)


def compose_stages(config: Config, given: list[str]) -> list[Config]:
    """The run of each of `config.stages`, in order; `given` are the overrides that `config` was composed from.

    Raises:
        ConfigError: there are no stages, two have one name, one does not compose or has no checkpoints of its own.
    """
    if not config.stages:
        raise ConfigError(
            "stages is empty: add stages=[FAMILY/STAGE,...], or choose an experiment=NAME that lists them."
        )
    if chosen := next((each for each in given if each.startswith("stage=")), None):
        raise ConfigError(f"{chosen} names one stage alone: train it by megatron_mm.train, or list it in stages=[...].")
    if_exists = "restart" if config.run.if_exists == "restart" else "resume"
    stages: list[Config] = []
    for path in config.stages:
        name = path.rpartition("/")[2]
        own = {
            "run.name": f"{config.run.name}-{name}",
            "run.dir": f"{config.run.dir}/{name}",
            "run.if_exists": if_exists,
        }
        if stages:
            own["checkpoint.load"] = str(stages[-1].checkpoint.save)
        stage = compose([*given, f"stage={path}", *(f"{key}={_quoted(value)}" for key, value in own.items())])
        if stage.run.dir in [earlier.run.dir for earlier in stages]:
            raise ConfigError(f"stages lists two named {name}, which would share {stage.run.dir}; rename one.")
        if stage.checkpoint.save in [None, *(earlier.checkpoint.save for earlier in stages)]:
            raise ConfigError(
                f"checkpoint.save={stage.checkpoint.save or 'null'} gives stage {path} no folder of its own for the "
                "next one to start from: leave it as it is, or put ${run.name} in it."
            )
        stages.append(stage)
    return stages


def run_stages(
    stages: list[Config],
    device: torch.device,
    stop: StopSignal,
    report: Callable[[Config, StepMetrics], None] = lambda stage, metrics: None,
) -> None:
    """Trains what is left of `stages` until all are done or a signal stops them; each rank is told its stages' steps.

    Raises:
        ValueError: anything that a user can mend; what the data and the run folders show, before the first iteration.
    """
    left = [stage for stage in stages if not on_first_rank(partial(_was_finished, stage))]
    for stage in left:
        on_first_rank(lambda stage=stage: bool(open_run(stage)))
    for stage in left:
        if agree(stop.received, device):
            break
        with model_parallel(stage.parallel, stage.train.seed) as layout:
            train(stage, layout, device, stop, partial(report, stage))
        gc.collect()  # the engine's hooks hold one another
        if not on_first_rank(partial(_is_finished, stage)):
            break


def _was_finished(stage: Config) -> bool:
    return continues(stage) and _is_finished(stage)


def _is_finished(stage: Config) -> bool:
    return (latest_iteration(str(stage.checkpoint.save)) or 0) >= stage.train.train_iters


def _quoted(value: str) -> str:
    """`value` as text in Hydra's grammar, whatever is in it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


if __name__ == "__main__":
    run(main)
