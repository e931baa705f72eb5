"""`python -m megatron_mm.benchmark out=benchmarks/step [experiment=NAME,...] [variants=NAME,...] [key=value ...]`

Whole training steps of one device through the real engine: forward, backward, clipping and Adam, on packed batches
that are drawn instead of read. Appends to results.csv and profile.csv in one folder as it goes, and draws step.png.
What they hold for this machine and commit is not measured again. Further keys are those of a run, and hold for every
experiment. Weights do not move (the learning rate is 0), so that variants which compute the same have the same loss but
for rounding.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mm_kernels.span_attention.benchmark.measure import matrix_rate

from megatron_mm.benchmark.arguments import parse
from megatron_mm.benchmark.measure import Bench
from megatron_mm.benchmark.report import Report, line
from megatron_mm.benchmark.result import blank, environment
from megatron_mm.benchmark.synthetic import synthetic_steps
from megatron_mm.config.cli import user_errors
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.distributed import pick_device, single_process

DISTINCT_STEPS = 4
"""Steps with batches of their own; further ones begin anew."""


def main(arguments: Sequence[str]) -> None:
    benchmark, runs = parse(arguments, int(os.environ.get("WORLD_SIZE", "1")))
    folder = Path(benchmark.out)
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    device = pick_device()
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    configs = {run.experiment: run.config for run in runs}
    families = {name: build_family(config.model, benchmark.text_vocab_size) for name, config in configs.items()}
    steps = {
        name: synthetic_steps(config, families[name], benchmark.text_vocab_size, DISTINCT_STEPS)
        for name, config in configs.items()
    }
    with single_process(device) as layout:
        bench, report = Bench(benchmark, layout, device), Report(folder)
        around = environment(device) | {"matrix_tflops": matrix_rate(device)}
        for run in runs:
            result = blank(run, around)
            if result in report:
                continue
            result, shares = bench.measure(run, families[run.experiment], steps[run.experiment], result)
            report.add(result, shares)
            if result.note.startswith(torch.AcceleratorError.__name__):
                raise ValueError(
                    f"{line(result)} It took the device with it: start the command again to go on behind it."
                )
    report.finish()


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
