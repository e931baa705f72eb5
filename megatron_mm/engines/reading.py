"""Reading checkpoints in megatron-core's distributed format as data alone: nothing that they name is ever run.

The format's index (`.metadata`) is a pickle, which torch would run whatever it calls, and entries that the index says
are objects would be unpickled likewise. So the index is read here, by an unpickler that knows the format's own classes,
and an object in place of a tensor is refused. Plain values and tensors are read by torch's `weights_only`, which knows
plain types only. Whatever reads a checkpoint goes through the three functions below.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing.strategies.torch as torch_dist
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.api import CheckpointException


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message says which, why, and what to do."""


def read_common(path: Path) -> dict[str, Any]:
    """The plain values of the checkpoint in `path`, an iter_* folder.

    Raises:
        CheckpointError: they are missing or corrupt, or are more than values.
    """
    try:
        return _Common().load_common(path)
    except Exception as error:  # torch.load raises many kinds
        raise _failure(f"{path} is corrupt", path, error, "Load an older iter_* folder.") from error


def read_shapes(path: Path) -> dict[str, ShardedTensor]:
    """The tensors in `path` by name, without their data.

    Raises:
        CheckpointError: the index is missing or corrupt, or names what is no part of one.
    """
    try:
        return dist_checkpointing.load_tensors_metadata(str(path))
    except Exception as error:
        raise _failure(f"{path} is corrupt", path, error, "Load an older iter_* folder.") from error


def read_tensors(state: dict[str, Any], path: Path, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """`state` with its sharded tensors read from `path`, and the checkpoint's plain values; collective.

    Args:
        group: ranks that ask for much the same; each then reads a part and hands it to the others.

    Raises:
        CheckpointError: they are missing, of another shape or corrupt, or are more than tensors.
    """
    tensors = torch_dist.TorchDistLoadShardedStrategy()
    if group is not None:
        tensors = FullyParallelLoadStrategyWrapper(tensors, group)
    try:
        return dist_checkpointing.load(state, str(path), tensors, _Common())
    except (Exception, CheckpointException) as error:
        advice = "It is corrupt or of another model: compare its config with yours, or load an older iter_* folder."
        raise _failure(f"cannot load {path}", path, error, advice) from error


def reason(error: BaseException) -> str:
    """The line of `error` that says what happened: the last one of a worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")


def _failure(what: str, path: Path, error: BaseException, advice: str) -> CheckpointError:
    if named := _REFUSED.search(str(error)):
        return CheckpointError(
            f"{path} is refused: reading {named[1]} in it may run code, which no checkpoint needs. Load one whose "
            "origin you trust."
        )
    return CheckpointError(f"{what}: {reason(error)}. {advice}")


_REFUSED = re.compile(r"GLOBAL ([\w.]+)")
"""How torch's unpickler, and ours, name what they refuse."""


class _Common(TorchCommonLoadStrategy):
    """Plain values as such, whatever TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD says."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return torch.load(Path(checkpoint_dir, COMMON_STATE_FNAME), map_location="cpu", weights_only=True)


class _Reader(CachedMetadataFileSystemReader):
    """torch's reader of a folder, over an index that was read as data."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        with open(Path(path, ".metadata"), "rb") as file:
            self._cached_metadata = _IndexUnpickler(file).load()
        self._cached_metadata.storage_meta = metadata.StorageMeta(load_id=self.load_id)

    def prepare_local_plan(self, plan: planner.LoadPlan) -> planner.LoadPlan:
        """Refuses what torch would unpickle without any care.

        Raises:
            pickle.UnpicklingError: the index says that something which is wanted is an object, not a tensor.
        """
        for item in plan.items:
            if item.type is not planner.LoadItemType.TENSOR:
                raise pickle.UnpicklingError(f"GLOBAL {item.dest_index.fqn} is a pickled object in place of a tensor")
        return super().prepare_local_plan(plan)


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes that an index is made of, which hold values and call nothing."""

    def find_class(self, module: str, name: str) -> Any:
        known = _PARTS.get((module, name))
        if known is None and module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            known = vars(torch)[name]
        if known is None:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is no part of an index")
        return known


_PARTS = {
    (part.__module__, part.__qualname__): part
    for part in (
        metadata.Metadata, metadata.TensorStorageMetadata, metadata.TensorProperties, metadata._MEM_FORMAT_ENCODING,
        metadata.ChunkStorageMetadata, metadata.BytesStorageMetadata, metadata.MetadataIndex, metadata.StorageMeta,
        filesystem._StorageInfo, planner.SavePlan, planner.WriteItem, planner.WriteItemType, planner.TensorWriteData,
        torch.serialization._get_layout, torch.Size,
    )
}  # fmt: skip

# megatron-core's strategy makes its reader by this function alone, and takes none.
torch_dist._get_filesystem_reader = lambda folder, cache_metadata=False: _Reader(folder)
