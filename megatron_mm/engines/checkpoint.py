"""Checkpoints in megatron-core's distributed format: any layout saves them, any layout loads them.

A save touches neither the tracker nor an older checkpoint until the new one is complete, so a kill at any instant
leaves the previous one loadable.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mm.engines.base import Engine
from megatron_mm.engines.format import FORMAT, METADATA, common_state, latest_iteration, resolve
from megatron_mm.engines.reading import CheckpointError, read_shapes, read_tensors, reason
from megatron_mm.engines.retention import drop_old, publish
from megatron_mm.engines.room import bytes_needed, clear
from megatron_mm.engines.weights import replicas
from megatron_mm.engines.writer import CheckpointWriter, without_signals

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores one engine in one folder."""

    def __init__(self, engine: Engine, folder: str | Path, keep: int | None = None, use_async: bool = False):
        self.engine, self.folder, self.keep, self.use_async = engine, Path(folder), keep, use_async
        self._queue = AsyncCallsQueue(persistent=True)
        self._queue.persistent_caller = writer = CheckpointWriter()
        if use_async:
            writer.start()
        self._strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(), replicas(), do_cache_distribution=True
        )

    def save(self, iteration: int, extra: dict[str, Any]) -> None:
        """Saves weights, optimizer, schedule and `extra` (plain values) as `iter_<iteration>`; collective.

        Raises:
            CheckpointError: it could not be written; the previous checkpoint is still the latest.
        """
        self.finish()
        path = self.folder / f"iter_{iteration:07d}"
        averaged = self.engine.config.optim.ema_decay is not None
        need = bytes_needed(self.engine.models, self.engine.layout, averaged)
        problem = clear(path, need) if dist.get_rank() == 0 else None
        self._fail_together(problem, path)
        state = self.engine.state(is_loading=False) | {"format_version": FORMAT, "iteration": iteration} | extra
        try:
            with without_signals():
                request = dist_checkpointing.save(
                    state, str(path), self._strategy, async_sharded_save=self.use_async, content_metadata=METADATA
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
        if obstacle := self.engine.obstacle(common):
            raise CheckpointError(f"{path} {obstacle}")
        state = self.engine.state(is_loading=True, saved=read_shapes(path).keys())
        self.engine.load_state(read_tensors(state, path, replicas()))
        return common

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
        """Makes the complete checkpoint the latest, then drops complete ones before it, but for the last `keep`."""
        dist.barrier()
        if dist.get_rank() != 0:
            return
        publish(self.folder, iteration)
        logger.info("saved checkpoint %s/iter_%07d", self.folder, iteration)
        if self.keep:
            drop_old(self.folder, iteration, self.keep)
