"""What the benchmark leaves behind: rows of CSV files as it goes, then tables on the console and a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from mm_kernels.rows import Rows
from rich.console import Console
from rich.table import Table

from megatron_mm.benchmark.picture import Panels, draw
from megatron_mm.benchmark.profiling import GROUPS, Share
from megatron_mm.benchmark.result import KEY, Result, parsed

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
    """The results in a folder, this run's and those of runs before it. A row is on disk as soon as it is measured."""

    def __init__(self, folder: Path):
        self._folder, self._console = folder, Console(soft_wrap=True, highlight=False)
        self._results = Rows(folder / "results.csv", [field.name for field in fields(Result)], KEY)
        self._shares = Rows(folder / "profile.csv", [*KEY, *(field.name for field in fields(Share)), "share"], KEY)

    def __contains__(self, blank: Result) -> bool:
        """Whether the folder holds this row already; `blank` from `result.blank`."""
        return asdict(blank) in self._results

    def add(self, result: Result, shares: list[Share]) -> None:
        total, row = sum(share.ms_per_step for share in shares), asdict(result)
        for share in shares:
            self._shares.append(row | asdict(share) | {"share": share.ms_per_step / total})
        self._results.append(row)
        self._console.print(line(result), markup=False)

    def finish(self) -> None:
        """Prints the tables and draws the picture, of all rows.

        Raises:
            ValueError: nothing was measured.
        """
        results = [parsed(row) for row in self._results.read()]
        panels: Panels = defaultdict(list)
        for result in results:
            if not result.note:
                profile = {row["group"]: float(row["ms_per_step"]) for row in self._shares.read(like=asdict(result))}
                panels[result.experiment].append((result, profile))
        if not panels:
            raise ValueError(f"Nothing was measured. {line(results[0])}")
        for experiment, panel in panels.items():
            names = [name.replace("_", " ") for name in COLUMNS]
            rows = [[result.variant, *_texts(result)] for result, _ in panel]
            self._console.print(_table(experiment, names, rows))
            rows = [[result.variant, *(f"{ms:.1f}" for ms in profile.values())] for result, profile in panel if profile]
            if rows:
                self._console.print(_table("kernels of a step, ms", GROUPS, rows))
        draw(panels, self._folder / "step.png")
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
