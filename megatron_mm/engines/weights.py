"""The weights of a model in checkpoints, under any layout."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_mm.engines.format import EMA, resolve
from megatron_mm.engines.reading import CheckpointError, read_shapes, read_tensors
from megatron_mm.nn.lora import ADAPTERS

logger = logging.getLogger(__name__)


def load_weights(models: list, folder: str | Path, averaged: bool = False) -> None:
    """Loads only the weights, under any layout. Adapters that the checkpoint does not have stay as they are.

    Args:
        averaged: takes the moving average of each weight that has one.

    Raises:
        CheckpointError: the checkpoint is missing, corrupt or of another model.
    """
    path = resolve(folder)
    saved = read_shapes(path)
    states = model_state(models)
    names = {entry.key for state in states.values() for entry in state.values()}
    if not any(name.endswith(ADAPTERS) for name in names) and any(name.endswith(ADAPTERS) for name in saved):
        raise CheckpointError(
            f"{path} holds adapters, but lora.rank=0 has none to load them into: set lora.* as there, or merge them "
            f"into the weights (python -m megatron_mm.convert merge_lora)."
        )
    new = sorted(name for name in names - saved.keys() if name.endswith(ADAPTERS))
    if new:
        logger.info("%s has no adapters for %d weights, which start new: %s", path, len(new) // 2, ", ".join(new))
    wanted = {
        number: {path: entry for path, entry in state.items() if entry.key not in new}
        for number, state in states.items()
    }
    if averaged:
        for state in wanted.values():
            for entry in state.values():
                average_in_place(path, entry, saved)
    state = read_tensors({"model": wanted}, path, replicas())
    for number, model in enumerate(models):
        model.load_state_dict(state["model"][str(number)], strict=not new)


def average_in_place(path: Path, entry: ShardedTensor | ShardedTensorFactory, saved: Mapping[str, Any]) -> None:
    """Makes an entry of a model's state read the moving average of its weight, in the precision of that.

    Raises:
        CheckpointError: there are no averages.
    """
    if not any(name.startswith(EMA) for name in saved):
        raise CheckpointError(
            f"{path} holds no moving average: it was written without optim.ema_decay; leave weights=ema out."
        )
    if (name := EMA + entry.key) not in saved:
        return  # what did not train has none
    entry.key, entry.data = name, torch.empty_like(entry.data, dtype=saved[name].dtype)
    if isinstance(entry, ShardedTensor):
        entry.dtype = saved[name].dtype


def replicas() -> dist.ProcessGroup:
    """The ranks that hold the same weights: they share the work of writing and reading them."""
    return mpu.get_data_parallel_group(with_context_parallel=True)


def model_state(models: list) -> dict[str, Any]:
    """The sharded tensors of a rank's chunks, by their number."""
    return {str(number): model.sharded_state_dict() for number, model in enumerate(models)}
