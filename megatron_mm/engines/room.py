"""Room for a checkpoint, before anything of it is written."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from megatron_mm.parallel.layout import Layout


def bytes_needed(models: Sequence[nn.Module], layout: Layout, averaged: bool) -> int:
    """Of weights, fp32 master weights, two moments and moving averages, if there are any: by this rank's share times
    the ranks that share them."""
    states = 16 if averaged else 12
    mine = sum(p.numel() * (p.element_size() + states) for model in models for p in model.parameters())
    return mine * layout.tp_size * layout.pp_size


def clear(path: Path, need: int) -> str | None:
    """Makes `path` an empty folder with room for so many bytes. Returns what is wrong, if anything."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        free = shutil.disk_usage(path.parent).free
        if free < need:
            return f"No space left on device: about {need / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free"
        path.mkdir()
    except OSError as error:
        return f"{error.strerror} ({error.filename})"
    return None
