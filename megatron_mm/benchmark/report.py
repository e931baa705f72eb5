"""What the benchmark leaves behind: CSV files as it goes, then tables on the console and a picture."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_mm.benchmark.picture import Panels, draw
from megatron_mm.benchmark.profiling import GROUPS, Share
from megatron_mm.benchmark.result import Result

COLUMNS = {
    "ms_per_step": "{:.1f}",
    "tokens_per_second": "{:.0f}",
    "mfu": "{:.1%}",
    "mfu_of_matrix_rate": "{:.1%}",
    "peak_gib": "{:.1f}",
    "loss": "{:.4f}",
}
"""Of the console's table, and how they are written there; results.csv has all."""


class Report:
    """Collects results in a folder. The CSV files are on disk after each, whatever becomes of the next."""

    def __init__(self, folder: Path):
        self._folder, self._console = folder, Console(soft_wrap=True, highlight=False)
        self._results: list[Result] = []
        self._shares: list[dict] = []
        self._panels: Panels = {}

    def add(self, result: Result, shares: list[Share]) -> None:
        total = sum(share.ms_per_step for share in shares)
        of = {"experiment": result.experiment, "variant": result.variant}
        self._shares += [of | asdict(share) | {"share": share.ms_per_step / total} for share in shares]
        self._results.append(result)
        _write(self._folder / "results.csv", [asdict(row) for row in self._results])
        _write(self._folder / "profile.csv", self._shares)
        if not result.note:
            profile = {share.group: share.ms_per_step for share in shares}
            self._panels.setdefault(result.experiment, []).append((result, profile))
        self._console.print(line(result), markup=False)

    def finish(self) -> None:
        """Prints the tables and draws the picture.

        Raises:
            ValueError: nothing was measured.
        """
        if not self._panels:
            raise ValueError(f"Nothing was measured. {line(self._results[0])}")
        for experiment, panel in self._panels.items():
            names = [name.replace("_", " ") for name in COLUMNS]
            rows = [[result.variant, *_texts(result)] for result, _ in panel]
            self._console.print(_table(experiment, names, rows))
            rows = [[result.variant, *(f"{ms:.1f}" for ms in profile.values())] for result, profile in panel if profile]
            if rows:
                self._console.print(_table("kernels of a step, ms", GROUPS, rows))
        draw(self._panels, self._folder / "step.png")
        self._console.print(f"written to {self._folder}", markup=False)


def line(result: Result) -> str:
    """A result in one line."""
    if result.note:
        return f"{result.experiment} {result.variant}: not measured: {result.note}"
    units = ("{} ms/step", "{} tokens/s", "MFU {}", "{} of the matrix rate", "peak {} GiB", "loss {}")
    parts = [unit.format(text) for text, unit in zip(_texts(result), units, strict=True) if text]
    return f"{result.experiment} {result.variant}: {', '.join(parts)}"


def _texts(result: Result) -> list[str]:
    values = [getattr(result, name) for name in COLUMNS]
    return ["" if value is None else form.format(value) for value, form in zip(values, COLUMNS.values(), strict=True)]


def _table(title: str, names: Iterable[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table("variant", title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _write(path: Path, rows: list[dict]) -> None:
    if not rows:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{cell:.6g}" if isinstance(cell, float) else cell for name, cell in row.items()})
