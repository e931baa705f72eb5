"""Which checkpoint of a folder is the latest, and which older ones stay."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from megatron_mm.engines.format import TRACKER


def publish(folder: Path, iteration: int) -> None:
    """Names the complete checkpoint of this iteration in the folder's tracker, at once or not at all."""
    temporary = folder / f".{TRACKER}"
    with open(temporary, "w") as file:
        file.write(str(iteration))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / TRACKER)


def drop_old(folder: Path, iteration: int, keep: int) -> None:
    """Removes complete checkpoints up to this iteration, but for the last `keep`."""
    complete = (file.parent.name[5:] for file in folder.glob("iter_*/metadata.json"))
    numbers = sorted(int(name) for name in complete if name.isdigit() and int(name) <= iteration)
    for number in numbers[:-keep]:
        old = folder / f"iter_{number:07d}"
        with contextlib.suppress(OSError):
            (old / "metadata.json").unlink()  # first: what is left if we are killed is no checkpoint
            shutil.rmtree(old)
