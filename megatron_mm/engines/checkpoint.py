"""Checkpoints in megatron-core's distributed format: any layout saves them, any layout loads them.

    checkpoints/iter_0000100/                 the sharded weights, optimizer state and common.pt
    checkpoints/latest_checkpointed_iteration.txt   written last, atomically

A save touches neither the tracker nor an older checkpoint until the new one is complete, so a kill at any instant
leaves the previous one loadable.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.engines.reading import CheckpointError, read_common, read_shapes, read_tensors, reason
from megatron_mm.engines.writer import CheckpointWriter, without_signals
from megatron_mm.nn.lora import ADAPTERS

logger = logging.getLogger(__name__)

FORMAT = 2
"""Of checkpoints. 1, which has no number, is the same but for the order in which a document's choices are drawn: its
weights and place in the data are read, a resumed run draws anew."""

TRACKER = "latest_checkpointed_iteration.txt"
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,  # on the first rank of a group and in host memory only
    "non_homogeneous_layers": True,
}


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
    """What a checkpoint says of itself without its tensors: `iteration`, `config` (YAML), `data_state`, ...

    Raises:
        CheckpointError: it is missing or corrupt, or of a later format.
    """
    path = resolve(folder)
    common = read_common(path)
    if (version := common.get("format_version", 1)) > FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, of a later megatron_mm; this one reads up to {FORMAT}: update it."
        )
    return common


def load_weights(models: list, folder: str | Path) -> None:
    """Loads only the weights, under any layout. Adapters that the checkpoint does not have stay as they are.

    Raises:
        CheckpointError: the checkpoint is missing, corrupt or of another model.
    """
    path = resolve(folder)
    saved = set(read_shapes(path))
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
    state = read_tensors({"model": wanted}, path, _replicas())
    for number, model in enumerate(models):
        model.load_state_dict(state["model"][str(number)], strict=not new)


class Checkpointer:
    """Saves and restores one engine in one folder."""

    def __init__(self, engine: MegatronEngine, folder: str | Path, keep: int | None = None, use_async: bool = False):
        self.engine, self.folder, self.keep, self.use_async = engine, Path(folder), keep, use_async
        self._queue = AsyncCallsQueue(persistent=True)
        self._queue.persistent_caller = writer = CheckpointWriter()
        if use_async:
            writer.start()
        self._strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(), _replicas(), do_cache_distribution=True
        )

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
            with without_signals():
                request = dist_checkpointing.save(
                    state, str(path), self._strategy, async_sharded_save=self.use_async, content_metadata=_METADATA
                )
            if request is not None:
                request.add_finalize_fn(lambda: self._publish(iteration))
                self._queue.schedule_async_request(request)
        except (Exception, CheckpointException) as error:
            shutil.rmtree(path, ignore_errors=True)
            raise self._failure(path, error) from error
        if request is None:
            self._publish(iteration)

    def poll(self) -> None:
        """Completes an asynchronous save that has been written; call it once an iteration on every rank."""
        if self._queue.get_num_unfinalized_calls():
            self._finalize(blocking=False)

    def finish(self) -> None:
        """Waits for a save under way."""
        self._finalize(blocking=True)

    def close(self) -> None:
        """Ends the process that writes asynchronous saves; one that was not waited for is dropped."""
        self._queue.close(abort=True)

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
        state = read_tensors(self._state(is_loading=True), path, _replicas())
        for number, model in enumerate(self.engine.models):
            model.load_state_dict(state["model"][str(number)], strict=True)
        self.engine.optimizer.load_state_dict(state["optimizer"])
        self.engine.schedule.load_state_dict(state["schedule"])
        return common

    def _state(self, is_loading: bool) -> dict[str, Any]:
        if not is_loading and self.engine.chunks[0].ddp_config.overlap_param_gather:
            for chunk in self.engine.chunks:  # what the last step made of the weights still has to be gathered
                chunk.start_param_sync(force_sync=True)
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
            "format_version": FORMAT,
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
            f"could not save {path}: {reason(error)}. Free some space or change checkpoint.save; {kept}."
        )

    def _finalize(self, blocking: bool) -> None:
        try:
            self._queue.maybe_finalize_async_calls(blocking)
        except (Exception, CheckpointException) as error:
            raise self._failure(self.folder, error) from error

    def _publish(self, iteration: int) -> None:
        """Names the complete checkpoint in the tracker, then drops complete ones before it, but for the last `keep`."""
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
            complete = (file.parent.name[5:] for file in self.folder.glob("iter_*/metadata.json"))
            numbers = sorted(int(name) for name in complete if name.isdigit() and int(name) <= iteration)
            for number in numbers[: -self.keep]:
                old = self.folder / f"iter_{number:07d}"
                with contextlib.suppress(OSError):
                    (old / "metadata.json").unlink()  # first: what is left if we are killed is no checkpoint
                    shutil.rmtree(old)


def _keep_empty_groups_out(optimizer: dict[str, Any]) -> None:
    """Groups of master weights that are empty on this stage, since nothing of them trains here, are not stored.

    megatron-core would store rank 0's empty ones as common values, which then clash with another stage's.
    """
    for part in (optimizer, *(part for part in optimizer.values() if isinstance(part, dict))):
        if groups := part.get("fp32_from_fp16_params"):
            part["fp32_from_fp16_params"] = [group or LocalNonpersistentObject([]) for group in groups]


def _replicas() -> dist.ProcessGroup:
    """The ranks that hold the same weights: they share the work of writing and reading them."""
    return mpu.get_data_parallel_group(with_context_parallel=True)


def _model_state(models: list) -> dict[str, Any]:
    return {str(number): model.sharded_state_dict() for number, model in enumerate(models)}
