"""`python -m megatron_mm.benchmark.plain [threads=1,2] [steps=60] [out=plain.csv] [key=value ...]`

What the engine adds to a step on a CPU: the demo's Transfusion in the real engine, and in plain torch from the same
weights on the same batches (`benchmark.plain_model`), a step of one after a step of the other. Prints medians, and
writes one CSV row for each number of threads. Further keys are those of a run.
"""

from __future__ import annotations

import csv
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_mm.benchmark.plain_model import PlainTrainer
from megatron_mm.benchmark.result import environment
from megatron_mm.benchmark.synthetic import synthetic_steps
from megatron_mm.config.arguments import parse_own
from megatron_mm.config.cli import user_errors
from megatron_mm.config.compose import Config, compose
from megatron_mm.config.validate import validate
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.cpu_device import direct
from megatron_mm.parallel.distributed import single_process

DISTINCT_STEPS = 4
TEXT_VOCAB = 256
"""Of the demo's tokenizer, bytes."""


@dataclass(frozen=True)
class PlainConfig:
    experiment: str = "demo"
    """Of configs/experiment, a Transfusion; its data and run are not looked at."""
    threads: str = "1,2"
    steps: int = 60
    """Timed steps of each, of which the median counts."""
    warmup: int = 6
    out: str | None = None
    """CSV file; null writes none."""


@dataclass(frozen=True)
class Row:
    """Medians over steps. CPU seconds are those of all threads of the process: other processes disturb them less."""

    experiment: str
    threads: int
    steps: int
    engine_ms: float
    plain_ms: float
    engine_tenth_ms: float
    """A tenth of the steps took less."""
    plain_tenth_ms: float
    engine_cpu_ms: float
    plain_cpu_ms: float
    loss_difference: float
    """Relative, of the last step's loss."""
    cpu: str
    cores: int
    device: str
    driver: str
    cuda: str
    torch: str
    triton: str
    megatron_core: str
    commit: str

    def __str__(self) -> str:
        return (
            f"{self.experiment}, {self.threads} threads: engine {self.engine_ms:.1f} ms a step, plain torch "
            f"{self.plain_ms:.1f} (a tenth below {self.engine_tenth_ms:.1f} and {self.plain_tenth_ms:.1f}; CPU "
            f"{self.engine_cpu_ms:.1f} and {self.plain_cpu_ms:.1f}); losses differ by {self.loss_difference:.0e}"
        )


def main(arguments: Sequence[str]) -> list[Row]:
    benchmark, overrides = parse_own(PlainConfig(), arguments)
    config = compose([f"experiment={benchmark.experiment}", *overrides])
    validate(config, 1)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    rows = []
    for threads in benchmark.threads.split(","):
        torch.set_num_threads(int(threads))
        rows.append(measure(benchmark, config))
        print(rows[-1], flush=True)
    if benchmark.out:
        with Path(benchmark.out).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    return rows


def measure(benchmark: PlainConfig, config: Config) -> Row:
    """Both on a CPU, from the first step on."""
    device, family = torch.device("cpu"), build_family(config.model, TEXT_VOCAB)
    steps = synthetic_steps(config, family, TEXT_VOCAB, DISTINCT_STEPS)
    with single_process(device) as layout:
        engine = MegatronEngine(config, family, layout, device)
        prepared = [[engine.prepare(batch) for batch in batches] for batches in steps]
        ours, theirs = Clock(), Clock()
        with direct(device):
            plain = PlainTrainer(config, family.vocab.size)
            plain.model.load_engine(dict(engine.models[0].named_parameters()))
            for number in range(benchmark.warmup + benchmark.steps):
                loss = ours.time(lambda at=number % DISTINCT_STEPS: engine.step(prepared[at]).loss)
                plain_loss = theirs.time(lambda at=number % DISTINCT_STEPS: plain.step(steps[at])[0])
    engine_ms, engine_tenth, engine_cpu = ours.figures(benchmark.warmup)
    plain_ms, plain_tenth, plain_cpu = theirs.figures(benchmark.warmup)
    return Row(
        benchmark.experiment, torch.get_num_threads(), benchmark.steps, engine_ms, plain_ms, engine_tenth,
        plain_tenth, engine_cpu, plain_cpu, abs(loss / plain_loss - 1), _cpu(), os.cpu_count() or 0,
        **environment(device),
    )  # fmt: skip


class Clock:
    """Wall and CPU times of calls."""

    def __init__(self) -> None:
        self._times: list[tuple[float, float]] = []

    def time(self, call: Callable[[], float]) -> float:
        began = time.perf_counter(), time.process_time()
        result = call()
        self._times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        return result

    def figures(self, warmup: int) -> tuple[float, float, float]:
        """Milliseconds of the calls behind the first `warmup`: the median, what a tenth is below, and the median of CPU
        time."""
        wall, cpu = ([1e3 * value for value in column] for column in zip(*self._times[warmup:], strict=True))
        return statistics.median(wall), sorted(wall)[len(wall) // 10], statistics.median(cpu)


def _cpu() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
