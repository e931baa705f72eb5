"""The benchmark's command line: its own keys, and Hydra overrides as everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mm.benchmark.variants import VARIANTS, Variant
from megatron_mm.config.arguments import parse_own
from megatron_mm.config.compose import Config, ConfigError, compose
from megatron_mm.config.validate import validate


@dataclass(frozen=True)
class BenchmarkConfig:
    out: str = "benchmarks/step"
    """Folder for results.csv, profile.csv and step.png."""
    experiment: str = "benchmark_transfusion,benchmark_chameleon"
    """One or more of configs/experiment, with commas; its data and run are not looked at."""
    variants: str = "all"
    """`all`, or names with commas."""
    warmup: int = 3
    """Steps before the clock starts: kernels are compiled and tuned in the first."""
    steps: int = 10
    """Timed steps, of which the median counts."""
    profile: bool = True
    trace: bool = False
    """Whether to keep the profiled steps as Chrome traces."""
    text_vocab_size: int = 32000
    """Entries of the text tokenizer that documents are drawn from."""


@dataclass(frozen=True)
class Run:
    """One row of the results to be: a variant of an experiment."""

    experiment: str
    variant: Variant
    config: Config


def parse(arguments: Sequence[str], world_size: int) -> tuple[BenchmarkConfig, list[Run]]:
    """What to measure, checked as far as it can be before anything is built.

    Raises:
        ConfigError: an unknown variant or key, a value that its key does not take, or more than one process.
    """
    benchmark, overrides = parse_own(BenchmarkConfig(), arguments)
    if world_size > 1:
        raise ConfigError(f"The benchmark measures one process, but the world size is {world_size}: start it alone.")
    names = list(VARIANTS) if benchmark.variants == "all" else benchmark.variants.split(",")
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"variants={name} is unknown; variants: {', '.join(VARIANTS)}.")
    runs = []
    for experiment in benchmark.experiment.split(","):
        for name in names:
            config = compose([f"experiment={experiment}", *overrides, *VARIANTS[name].overrides])
            validate(config, world_size)
            runs.append(Run(experiment, VARIANTS[name], config))
    return benchmark, runs
