"""`python -m megatron_mm.benchmark.context [out=DIR] [distributions=NAME,...] [lengths=N,...] [key=value ...]`

Context parallelism on the host, without a GPU or ranks: table.csv and table.png say how well rows of packed documents
are balanced and what has to travel, counted exactly; simulation.csv and simulation.png how attention would scale over
nodes, predicted. `data=FOLDER experiment=NAME` adds the documents of prepared shards as that run's family lays them
out; further keys are then the run's. `kernel_csv=FILE` takes measured kernel speeds instead of published ones.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_mm.benchmark.context.arguments import parse
from megatron_mm.benchmark.context.masks import Masks
from megatron_mm.benchmark.context.picture import draw_simulation, draw_table
from megatron_mm.benchmark.context.report import show_simulation, show_table, write
from megatron_mm.benchmark.context.simulation import simulate
from megatron_mm.benchmark.context.table import measure
from megatron_mm.config.cli import user_errors

WIDTH = 120
"""Of the tables, in characters."""


def main(arguments: Sequence[str]) -> None:
    study = parse(arguments)
    masks = Masks(study)
    folder = Path(study.config.out)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(soft_wrap=True, highlight=False, width=WIDTH)
    counted = list(measure(study, masks))
    write(folder / "table.csv", counted)
    draw_table(counted, folder / "table.png")
    show_table(console, counted)
    simulated = list(simulate(study, masks))
    if simulated:
        write(folder / "simulation.csv", simulated)
        draw_simulation(simulated, folder / "simulation.png")
        show_simulation(console, simulated)
    console.print(f"written to {folder}", markup=False)


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
