"""`run_ranks(fn, world_size, *args)`: run a function on several ranks, forked after import (0.2-0.6 s a call)."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from pathlib import Path

import psutil
import torch
import torch.distributed as dist


def run_ranks(fn, world_size: int, *args) -> list:
    """Calls `fn(init_kwargs, *args)` in `world_size` forked processes; returns their results in rank order.

    `init_kwargs` are for `parallel.distributed.process_groups`. A failing rank fails the call with its traceback. Only
    ranks that are given a CUDA device see one.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank_main, args=(fn, r, world_size, folder, args)) for r in range(world_size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=240)
        errors = []
        for rank, process in enumerate(ranks):
            error = Path(folder, f"error{rank}")
            if error.exists():
                errors.append(f"rank {rank}:\n{error.read_text()}")
            elif process.is_alive():
                process.kill()
                errors.append(f"rank {rank}: timed out")
            elif process.exitcode:
                errors.append(f"rank {rank}: exit code {process.exitcode}")
        assert not errors, "\n".join(errors)
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(world_size)]


def kill_when(condition, fn, *args) -> None:
    """Starts `fn(*args)` and, when `condition()` holds, kills all its processes at once, as a failing machine."""

    def session() -> None:
        os.setsid()
        fn(*args)

    process = multiprocessing.get_context("fork").Process(target=session)
    process.start()
    deadline = time.monotonic() + 120
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert time.monotonic() < deadline, "the moment to kill never came"


def _rank_main(fn, rank: int, world_size: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    if not any(isinstance(argument, torch.device) and argument.type == "cuda" for argument in args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        store = dist.FileStore(f"{folder}/store", world_size)
        result = fn({"store": store, "rank": rank, "world_size": world_size}, *args)
        Path(folder, f"result{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        Path(folder, f"error{rank}").write_text(traceback.format_exc())
    finally:
        # megatron-core's checkpoint writer leaves a manager process behind when its parent does not exit by the book.
        for child in psutil.Process().children(recursive=True):
            child.kill()
        failed = Path(folder, f"error{rank}").exists()
        os._exit(int(failed))
