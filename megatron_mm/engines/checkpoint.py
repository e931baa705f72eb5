"""Checkpoints in megatron-core's distributed format: any layout saves them, any layout loads them.

    checkpoints/iter_0000100/                 the sharded weights, optimizer state and common.pt
    checkpoints/latest_checkpointed_iteration.txt   written last, atomically

A save touches neither the tracker nor an older checkpoint until the new one is complete, so a kill at any instant
leaves the previous one loadable.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.nn.lora import ADAPTERS

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "non_homogeneous_layers": True}


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message says which, why, and what to do."""


def latest_iteration(folder: str | Path) -> int | None:
    """The iteration that the tracker file in `folder` names; None where there is no checkpoint."""
    tracker = Path(folder, TRACKER)
    if not tracker.exists():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise CheckpointError(f"{tracker} should hold an iteration number but holds {text!r}; write the number there.")
    return int(text)


def resolve(folder: str | Path) -> Path:
    """The iter_* folder meant by `folder`: itself, or the one its tracker names.

    Raises:
        CheckpointError: there is none, or it is incomplete.
    """
    folder = Path(folder)
    path = folder
    if not folder.name.startswith("iter_"):
        iteration = latest_iteration(folder)
        if iteration is None:
            raise CheckpointError(f"{folder} holds no checkpoint ({TRACKER} is missing): check the path.")
        path = folder / f"iter_{iteration:07d}"
    if not (path / "metadata.json").exists():
        others = sorted(p.parent.name for p in path.parent.glob("iter_*/metadata.json"))
        hint = f"complete ones there: {', '.join(others)}" if others else "there is no complete one beside it"
        raise CheckpointError(f"{path} is not a complete checkpoint (metadata.json is missing); {hint}.")
    return path


def common_state(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself without its tensors: `iteration`, `config` (YAML), `data_state`, ..."""
    path = resolve(folder)
    try:
        return dist_checkpointing.load_common_state_dict(str(path))
    except Exception as error:  # torch.load and megatron-core raise many kinds
        raise CheckpointError(f"{path} is corrupt: {_reason(error)}. Load an older iter_* folder.") from error


def load_weights(models: list, folder: str | Path) -> None:
    """Loads only the weights, under any layout. Adapters that the checkpoint does not have stay as they are.

    Raises:
        CheckpointError: the checkpoint is missing, corrupt or of another model.
    """
    path = resolve(folder)
    saved = set(dist_checkpointing.load_tensors_metadata(str(path)))
    model_state = _model_state(models)
    names = {entry.key for state in model_state.values() for entry in state.values()}
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
        for number, state in model_state.items()
    }
    state = _load({"model": wanted}, path)
    for number, model in enumerate(models):
        model.load_state_dict(state["model"][str(number)], strict=not new)


class Checkpointer:
    """Saves and restores one engine in one folder."""

    def __init__(self, engine: MegatronEngine, folder: str | Path, keep: int | None = None, use_async: bool = False):
        self.engine, self.folder, self.keep, self.use_async = engine, Path(folder), keep, use_async
        self._queue = AsyncCallsQueue()

    def save(self, iteration: int, extra: dict[str, Any]) -> None:
        """Saves weights, optimizer, schedule and `extra` (plain values) as `iter_<iteration>`; collective.

        Raises:
            CheckpointError: it could not be written; the previous checkpoint is still the latest.
        """
        self.finish()
        path = self.folder / f"iter_{iteration:07d}"
        problem = self._prepare(path) if dist.get_rank() == 0 else None
        self._fail_together(problem, path)
        state = self._state(is_loading=False) | {"iteration": iteration} | extra
        try:
            request = dist_checkpointing.save(
                state, str(path), async_sharded_save=self.use_async, content_metadata=_METADATA
            )
        except (Exception, CheckpointException) as error:
            shutil.rmtree(path, ignore_errors=True)
            raise self._failure(path, error) from error
        if request is None:
            self._publish(iteration)
        else:
            request.add_finalize_fn(lambda: self._publish(iteration))
            self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Completes an asynchronous save that has been written; call it once an iteration on every rank."""
        if self._queue.get_num_unfinalized_calls():
            self._finalize(blocking=False)

    def finish(self) -> None:
        """Waits for a save under way."""
        self._finalize(blocking=True)

    def load(self, folder: str | Path) -> dict[str, Any]:
        """Restores weights, optimizer and schedule from `folder` and returns the checkpoint's plain values."""
        path = resolve(folder)
        common = common_state(path)
        ours = self.engine.config.parallel.use_distributed_optimizer
        if common["distributed_optimizer"] != ours:
            raise CheckpointError(
                f"{path} was written with parallel.use_distributed_optimizer={str(not ours).lower()}, which cannot be "
                f"converted: set it to {str(not ours).lower()}."
            )
        state = _load(self._state(is_loading=True), path)
        for number, model in enumerate(self.engine.models):
            model.load_state_dict(state["model"][str(number)], strict=True)
        self.engine.optimizer.load_state_dict(state["optimizer"])
        self.engine.schedule.load_state_dict(state["schedule"])
        return common

    def _state(self, is_loading: bool) -> dict[str, Any]:
        model = _model_state(self.engine.models)
        for part in self.engine.optimizer.chained_optimizers:
            part.init_state_fn(part.optimizer, part.config)  # before the first step there are no moments to save
        optimizer = self.engine.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_METADATA)
        _keep_empty_groups_out(optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": self.engine.schedule.state_dict(),
            "distributed_optimizer": self.engine.config.parallel.use_distributed_optimizer,
        }

    def _prepare(self, path: Path) -> str | None:
        """Clears the place and looks for room before anything is written. Returns what is wrong, if anything."""
        # Weights, fp32 master weights and two moments, counted for this rank's share times the world.
        need = sum(p.numel() * (p.element_size() + 12) for m in self.engine.models for p in m.parameters())
        need *= self.engine.layout.tp_size * self.engine.layout.pp_size
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(path, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free
            if free < need:
                return f"No space left on device: about {need / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free"
            path.mkdir()
        except OSError as error:
            return f"{error.strerror} ({error.filename})"
        return None

    def _fail_together(self, problem: str | None, path: Path) -> None:
        box = [problem]
        dist.broadcast_object_list(box, src=0)
        if box[0] is not None:
            raise self._failure(path, OSError(box[0]))

    def _failure(self, path: Path, error: Exception) -> CheckpointError:
        latest = latest_iteration(self.folder)
        kept = "no earlier checkpoint exists" if latest is None else f"iter_{latest:07d} is still the latest checkpoint"
        return CheckpointError(
            f"could not save {path}: {_reason(error)}. Free some space or change checkpoint.save; {kept}."
        )

    def _finalize(self, blocking: bool) -> None:
        try:
            self._queue.maybe_finalize_async_calls(blocking)
        except (Exception, CheckpointException) as error:
            raise self._failure(self.folder, error) from error

    def _publish(self, iteration: int) -> None:
        """Names the complete checkpoint in the tracker, then drops the oldest beyond `keep`."""
        dist.barrier()
        if dist.get_rank() != 0:
            return
        temporary = self.folder / f".{TRACKER}"
        with open(temporary, "w") as file:
            file.write(str(iteration))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / TRACKER)
        logger.info("saved checkpoint %s/iter_%07d", self.folder, iteration)
        if self.keep:
            for old in sorted(self.folder.glob("iter_*"))[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)


def _keep_empty_groups_out(optimizer: dict[str, Any]) -> None:
    """Groups of master weights that are empty on this stage, since nothing of them trains here, are not stored.

    megatron-core would store rank 0's empty ones as common values, which then clash with another stage's.
    """
    for part in (optimizer, *(part for part in optimizer.values() if isinstance(part, dict))):
        if groups := part.get("fp32_from_fp16_params"):
            part["fp32_from_fp16_params"] = [group or LocalNonpersistentObject([]) for group in groups]


def _model_state(models: list) -> dict[str, Any]:
    return {str(number): model.sharded_state_dict() for number, model in enumerate(models)}


def _load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(path))
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"cannot load {path}: {_reason(error)}. It is corrupt or of another model: compare its config with "
            f"yours, or load an older iter_* folder."
        ) from error


def _reason(error: BaseException) -> str:
    """The line of `error` that says what happened: the last one of a worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")
