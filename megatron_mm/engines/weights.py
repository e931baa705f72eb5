"""The weights of a model in checkpoints, under any layout."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_mm.engines.format import resolve
from megatron_mm.engines.reading import CheckpointError, read_shapes, read_tensors
from megatron_mm.nn.lora import ADAPTERS

logger = logging.getLogger(__name__)


def load_weights(models: list, folder: str | Path) -> None:
    """Loads only the weights, under any layout. Adapters that the checkpoint does not have stay as they are.

    Raises:
        CheckpointError: the checkpoint is missing, corrupt or of another model.
    """
    path = resolve(folder)
    saved = set(read_shapes(path))
    states = model_state(models)
    names = {entry.key for state in states.values() for entry in state.values()}
    if not any(name.endswith(ADAPTERS) for name in names) and any(name.endswith(ADAPTERS) for name in saved):
        raise CheckpointError(
            f"{path} holds adapters, but lora.rank=0 has none to load them into: set lora.* as there, or merge them "
            f"into the weights (python -m megatron_mm.convert merge_lora)."
        )
    new = sorted(name for name in names - saved if name.endswith(ADAPTERS))
    if new:
        logger.info("%s has no adapters for %d weights, which start new: %s", path, len(new) // 2, ", ".join(new))
    wanted = {
        number: {path: entry for path, entry in state.items() if entry.key not in new}
        for number, state in states.items()
    }
    state = read_tensors({"model": wanted}, path, replicas())
    for number, model in enumerate(models):
        model.load_state_dict(state["model"][str(number)], strict=not new)


def replicas() -> dist.ProcessGroup:
    """The ranks that hold the same weights: they share the work of writing and reading them."""
    return mpu.get_data_parallel_group(with_context_parallel=True)


def model_state(models: list) -> dict[str, Any]:
    """The sharded tensors of a rank's chunks, by their number."""
    return {str(number): model.sharded_state_dict() for number, model in enumerate(models)}
