"""The process that writes checkpoints: it writes what it was handed, and neither side outlives or awaits the other."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from distributed import run_ranks
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from slow_writes import write_when_told

from megatron_mm.config.schema import ParallelConfig
from megatron_mm.engines.writer import CheckpointWriter
from megatron_mm.parallel.distributed import process_groups

pytestmark = pytest.mark.slow


def request(path: Path, tensors: list[torch.Tensor]) -> AsyncRequest:
    entries = [(None, tensor) for tensor in tensors]
    return AsyncRequest(write_when_told, (0, [(str(path), path.name, ([], entries))], None), [])


def scheduled(path: Path, tensors: list[torch.Tensor]) -> tuple[CheckpointWriter, psutil.Process]:
    """A writer that waits to write `tensors` to `path`, and its process."""
    writer = CheckpointWriter()
    writer.start()
    writer.schedule_async_call(request(path, tensors))
    (child,) = multiprocessing.active_children()
    return writer, psutil.Process(child.pid)


def in_a_job(fn, folder: Path):
    (result,) = run_ranks(_in_a_job, 1, fn, folder)
    return result


def _in_a_job(init_kwargs, fn, folder: Path):
    with process_groups(ParallelConfig(), 0, torch.device("cpu"), **init_kwargs):
        return fn(folder)


def _train_on(folder: Path) -> None:
    weights = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    writer, process = scheduled(folder / "weights", [weights, weights[1:], torch.empty(0), torch.tensor(7)])
    weights.add_(100)
    assert not writer.is_current_async_call_done()
    for stop in (signal.SIGTERM, signal.SIGUSR1):  # as a job's end reaches every process of it
        process.send_signal(stop)
    (folder / "go").touch()
    assert writer.is_current_async_call_done(blocking=True)
    assert writer.is_current_async_call_done(), "nothing is left to wait for"
    writer.schedule_async_call(request(folder / "again", [weights]))
    assert writer.is_current_async_call_done(blocking=True)
    writer.close()
    assert not process.is_running()


def test_what_is_written_is_what_was_handed_over(tmp_path):
    """Training goes on meanwhile, and signals that tell the job to stop do not stop the writer."""
    in_a_job(_train_on, tmp_path)
    whole, part, empty, number = torch.load(tmp_path / "weights")
    assert whole.tolist() == [[0, 1, 2], [3, 4, 5]] and whole.dtype == torch.bfloat16
    assert part.tolist() == [[3, 4, 5]] and empty.shape == (0,) and number == 7
    assert (tmp_path / "weights").stat().st_size < 4096
    assert torch.load(tmp_path / "again")[0].tolist() == [[100, 101, 102], [103, 104, 105]]


def _lose_the_writer(folder: Path) -> None:
    writer, process = scheduled(folder / "weights", [torch.ones(3)])
    process.kill()
    assert writer.is_current_async_call_done(blocking=True)
    writer.close()


def test_a_writer_that_dies_is_not_awaited(tmp_path):
    in_a_job(_lose_the_writer, tmp_path)
    assert not (tmp_path / "weights").exists()


def _die(folder: Path, pid) -> None:
    _, process = scheduled(folder / "weights", [torch.ones(3)])
    pid.value = process.pid
    os._exit(0)


def test_a_writer_ends_with_its_trainer(tmp_path):
    context = multiprocessing.get_context("fork")
    pid = context.Value("i", 0)
    trainer = context.Process(target=_die, args=(tmp_path, pid))
    trainer.start()
    trainer.join()
    (tmp_path / "go").touch()
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid.value) and psutil.Process(pid.value).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
