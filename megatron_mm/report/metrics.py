"""Where a run's numbers go: metrics.jsonl (every iteration, full precision), the console, and wandb if asked."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_mm.config.schema import LoggingConfig
from megatron_mm.data.files import replacing


class MetricsWriter:
    """Writes on one rank; every other rank has `None` in its place."""

    def __init__(self, folder: Path, config: LoggingConfig, run_config: dict, name: str, start: int, total: int):
        self._config, self._total = config, total
        path = folder / "metrics.jsonl"
        _cut_after(path, start)
        self._file = path.open("a", buffering=1)
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._progress = Progress(
            TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task(name, completed=start, total=total)
        self._progress.start()
        self._wandb = _start_wandb(config, run_config, name, folder)

    def say(self, line: str) -> None:
        """A line on the console, above the progress bar."""
        self._console.print(line, markup=False)

    def write(self, metrics: dict[str, Any], milliseconds: float) -> None:
        """One iteration's metrics, under the names that README lists."""
        self._file.write(json.dumps(metrics) + "\n")
        iteration = metrics["iteration"]
        self._progress.update(self._task, completed=iteration)
        if iteration % self._config.log_interval == 0 or iteration == self._total:
            self.say(console_line(metrics, milliseconds, self._total))
        if "validation/loss" in metrics:
            self.say(validation_line(metrics))
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in metrics.items() if v is not None}, step=iteration)

    def close(self) -> None:
        self._progress.stop()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def console_line(metrics: dict[str, Any], milliseconds: float, total: int) -> str:
    """One line in Megatron-LM's manner."""
    parts = [
        f"iteration {metrics['iteration']:8d}/{total:8d}",
        f"consumed samples: {metrics['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {milliseconds:.1f}",
        f"learning rate: {metrics['learning_rate']:.6E}",
        f"loss: {metrics['loss']:.6E}",
        *(f"{key[5:]} loss: {value:.6E}" for key, value in metrics.items() if key.startswith("loss/")),
        f"grad norm: {metrics['grad_norm']:.3f}",
        f"tokens/s/gpu: {metrics['tokens_per_second_per_gpu']:.0f}",
    ]
    if metrics["mfu"] is not None:
        parts.append(f"MFU: {100 * metrics['mfu']:.1f}%")
    if metrics["skipped"]:
        parts.append("skipped: the gradient norm is not finite")
    return " " + " | ".join(parts) + " |"


def validation_line(metrics: dict[str, Any]) -> str:
    """One line in Megatron-LM's manner."""
    terms = (f"{key[16:]} loss: {value:.6E}" for key, value in metrics.items() if key.startswith("validation/loss/"))
    losses = " | ".join([f"loss: {metrics['validation/loss']:.6E}", *terms])
    return f" validation loss at iteration {metrics['iteration']} | {losses} |"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every iteration's metrics; a last line that a kill cut short is left out.

    Raises:
        ValueError: another line is damaged.
    """
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is not JSON: mend or remove the line.") from None
    return rows


def _cut_after(path: Path, iteration: int) -> None:
    """Drops what a killed run logged after the checkpoint that this one starts from."""
    if not path.exists():
        return
    rows = [row for row in read_metrics(path) if row["iteration"] <= iteration]
    with replacing(path) as temporary, temporary.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _start_wandb(config: LoggingConfig, run_config: dict, name: str, folder: Path):
    if config.wandb == "disabled":
        return None
    if importlib.util.find_spec("wandb") is None:
        if config.wandb == "offline":
            return None
        raise ValueError(
            "logging.wandb=online needs the wandb package: pip install megatron_mm[wandb], or use wandb=offline."
        )
    import wandb  # optional, and slow to import

    return wandb.init(
        project=config.wandb_project, name=name, dir=str(folder), mode=config.wandb, config=run_config, resume="allow"
    )
