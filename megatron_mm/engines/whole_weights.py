"""Checkpoints of whole weights by name, written and read without a model: what conversion needs.

They have the names and shapes of `StageModel.sharded_state_dict`, so `checkpoint.load_weights` takes them under any
layout. Both functions need a process group of one process.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_mm.data.files import replacing
from megatron_mm.engines.format import TRACKER, resolve
from megatron_mm.engines.reading import CheckpointError, read_shapes, read_tensors
from megatron_mm.engines.weights import average_in_place

_PARTS = ("front.", "decoder.", "back.")


def save_whole_weights(folder: Path, weights: Iterable[tuple[str, torch.Tensor]], config: str) -> None:
    """Writes `weights` and `config` (YAML) as `iter_0000000` of `folder`, and the tracker when all is written.

    Raises:
        CheckpointError: `folder` holds a checkpoint already, or it could not be written.
    """
    if (folder / TRACKER).exists():
        raise CheckpointError(f"{folder} already holds a checkpoint: choose another folder, or remove it.")
    path = folder / "iter_0000000"
    state = {name: ShardedTensor.from_rank_offsets(name, weight) for name, weight in weights}
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        dist_checkpointing.save({"model": state, "iteration": 0, "config": config}, str(path))
        with replacing(folder / TRACKER) as temporary:
            temporary.write_text("0")
    except Exception as error:  # megatron-core and torch raise many kinds
        raise CheckpointError(f"could not save {path}: {error}. Free some space or choose another folder.") from error


def load_whole_weights(folder: Path, averaged: bool = False) -> dict[str, torch.Tensor]:
    """Every weight of the model in `folder`, in the dtype it was saved in; optimizer state is not read.

    Args:
        averaged: takes the moving average of each weight that has one.

    Raises:
        CheckpointError: the checkpoint is missing or corrupt, or has no averages.
    """
    path = resolve(folder)
    saved = read_shapes(path)
    dtypes = {name: entry.dtype for name, entry in saved.items() if name.startswith(_PARTS)}
    wanted = {
        name: ShardedTensor.from_rank_offsets(name, torch.empty(saved[name].global_shape, dtype=dtype))
        for name, dtype in dtypes.items()
    }
    if averaged:
        for entry in wanted.values():
            average_in_place(path, entry, saved)
    return {name: w.to(dtypes[name]) for name, w in read_tensors({"model": wanted}, path)["model"].items()}
