"""Rows of measurements in a CSV file: each is on disk as soon as it is measured, and none is measured twice."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

AROUND = ("device", "driver", "cuda", "torch", "triton", "commit")
"""Columns that say where and with what a row was measured; see `around`."""

DESCRIBE = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*")


def around(device: torch.device) -> dict[str, str]:
    """`AROUND` for this machine; what is not there is empty. MM_COMMIT names the commit where there is no checkout."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU ({torch.get_num_threads()} threads)",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "commit": os.environ.get("MM_COMMIT") or _output(*DESCRIBE),
    }


def package_version(package: str) -> str:
    """Empty where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """What a command prints; empty where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


class Rows:
    """The rows of a CSV file, which later runs of a benchmark add to; a row is known by what its `key` columns hold.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(self, path: Path, columns: Iterable[str], key: Iterable[str]):
        self.path, self._columns, self._key = path, list(columns), list(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known = {self._name(row) for row in self.read()}

    def __contains__(self, row: Mapping[str, object]) -> bool:
        return self._name(row) in self._known

    def append(self, row: Mapping[str, object]) -> None:
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow({name: _text(row[name]) for name in self._columns})
        self._known.add(self._name(row))

    def read(self, like: Mapping[str, object] | None = None) -> list[dict[str, str]]:
        """All rows, as text, or those with the key of `like`. Takes a last line that was cut short out of the file."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        if whole := text[: text.rfind(b"\n") + 1]:
            if len(whole) < len(text):
                self.path.write_bytes(whole)
        else:
            self.path.unlink()
            return []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != self._columns:
                raise ValueError(f"{self.path} has other columns, of an older version: move it away, or name another.")
            return [row for row in reader if like is None or self._name(row) == self._name(like)]

    def _name(self, row: Mapping[str, object]) -> tuple[str, ...]:
        return tuple(_text(row[name]) for name in self._key)


def _text(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
