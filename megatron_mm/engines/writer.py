"""A rank's checkpoint writer: a process of its own that writes while the rank goes on training.

It does what megatron-core's persistent worker does, which waits for ever when either side dies, needs a CUDA device
and reads a CPU's weights while training changes them. Here both sides hold one end of a pipe, so that each notices when
the other is gone, and the trainer copies its tensors into memory that both share before it goes on.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncRequest
from torch import multiprocessing

_ALIGNMENT = 64
"""Bytes at whose multiples tensors lie in the shared memory."""


class CheckpointWriter(AsyncCaller):
    """The writer of one rank, ended by `close` or with its trainer. It takes one request at a time.

    A request that it dies of counts as done, but has no results, which megatron-core reports as a failed save.
    """

    def __init__(self) -> None:
        self._process: multiprocessing.Process | None = None
        self._memory: int | None = None
        self._requests: Connection | None = None
        self._busy = False

    def start(self) -> None:
        """Starts the process; its imports take seconds, during which the rank can go on."""
        self._memory = os.memfd_create("checkpoint")
        context = multiprocessing.get_context("spawn")
        self._requests, theirs = context.Pipe()
        with without_signals():
            self._process = context.Process(target=_serve, args=(theirs,), name="checkpoint writer")
            self._process.start()
        theirs.close()  # or this end would never see that the process is gone
        send_handle(self._requests, self._memory, self._process.pid)

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        """Copies what is to be written and hands it to the process. `async_fn` is None where a rank writes nothing."""
        if async_req.async_fn is None:
            return
        rank, buckets, results = async_req.async_fn_args
        self._requests.send((async_req.async_fn, rank, _stage(buckets, self._memory), results))
        self._busy = True

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        """Whether every rank's writer is done; collective unless `no_dist`."""
        while True:
            self._busy = self._busy and not self._is_done()
            done = not self._busy if no_dist else bool(self.sync_all_async_calls(self._busy))
            if done or not blocking:
                return done
            time.sleep(0.01)

    def close(self, abort: bool = False) -> None:
        """Ends the process: after what it is writing, or at once."""
        if self._process is None:
            return
        if abort:
            self._process.kill()
        self._requests.close()
        self._process.join()
        os.close(self._memory)
        self._process = self._memory = None

    def __del__(self) -> None:
        self.close(abort=True)

    def _is_done(self) -> bool:
        if not self._requests.poll():
            return False
        with contextlib.suppress(EOFError, ConnectionError):  # it died, and its results will be missed
            self._requests.recv()
        os.ftruncate(self._memory, 0)
        return True


@contextlib.contextmanager
def without_signals() -> Iterator[None]:
    """A process that starts in here never receives the signals by which a job is told to save and stop."""
    resource_tracker.ensure_running()  # multiprocessing starts it with the first process, and then lets SIGTERM through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stage(buckets: list, memory: int) -> list:
    """Moves the tensors of megatron-core's write buckets into the file `memory`.

    Returns: the buckets with (offset, dtype, shape) in each tensor's place.
    """
    sizes = [_aligned(tensor.nbytes) for _, _, (_, entries) in buckets for _, tensor in entries]
    os.ftruncate(memory, max(sum(sizes), _ALIGNMENT))
    shared, offset, staged = mmap.mmap(memory, 0), 0, []
    for path, name, (objects, entries) in buckets:
        places = []
        for item, tensor in entries:
            place = (offset, tensor.dtype, tensor.shape)
            _at(shared, *place).copy_(tensor)
            places.append((item, place))
            offset += _aligned(tensor.nbytes)
        staged.append((path, name, (objects, places)))
        entries.clear()  # megatron-core holds the buckets until all is written
    return staged


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _at(shared: mmap.mmap, offset: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """The tensor at `offset` of the shared memory, with a storage of its own, since torch saves whole storages."""
    if not shape.numel():
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(shared, dtype=dtype, count=shape.numel(), offset=offset).view(shape)


def _serve(requests: Connection) -> None:
    """The process: writes request after request until its trainer closes the pipe or is gone."""
    memory = recv_handle(requests)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            write, rank, staged, results = requests.recv()
            shared = mmap.mmap(memory, 0)
            buckets = [
                (path, name, (objects, [(item, _at(shared, *place)) for item, place in places]))
                for path, name, (objects, places) in staged
            ]
            write(rank, buckets, results)
            requests.send("written")
