"""Process groups: one function to join a job, one to leave it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel

from megatron_mm.config.schema import ParallelConfig
from megatron_mm.parallel import cpu_device
from megatron_mm.parallel.layout import Layout
from megatron_mm.parallel.overlap import set_environment

T = TypeVar("T")


def pick_device(*layouts: ParallelConfig) -> torch.device:
    """This rank's CUDA device where there is one (ranks share devices when there are more ranks), else the CPU. Comes
    before all else that asks CUDA for anything, and prepares its environment for the layouts to come."""
    set_environment(layouts)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextlib.contextmanager
def process_groups(config: ParallelConfig, seed: int, device: torch.device, **init_kwargs) -> Iterator[Layout]:
    """`job` with one layout from beginning to end."""
    with job(device, **init_kwargs), model_parallel(config, seed) as layout:
        yield layout


@contextlib.contextmanager
def job(device: torch.device, **init_kwargs) -> Iterator[None]:
    """Joins the job that torchrun started (or makes one of a single process) and leaves it at the end.

    `init_kwargs` go to `torch.distributed.init_process_group` in place of torchrun's environment.
    """
    cpu_device.enable(device)
    if "RANK" not in os.environ and not init_kwargs:
        init_kwargs = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # Otherwise each of gloo's groups opens a socket to every other rank as it is made: three groups of all replicas
    # beside NCCL, ten groups on a CPU.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    backend = os.environ.get("MEGATRON_MM_BACKEND") or ("nccl" if device.type == "cuda" else "gloo")
    dist.init_process_group(backend, timeout=timedelta(minutes=10), **init_kwargs)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def model_parallel(config: ParallelConfig, seed: int) -> Iterator[Layout]:
    """Lays the ranks of the job out as `config` says; another layout may follow this one."""
    try:
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
            context_parallel_size=config.context_parallel_size,
            expert_model_parallel_size=config.expert_model_parallel_size,
            expert_tensor_parallel_size=1,
        )
        # Only megatron-core's bookkeeping draws from these generators: no value of the run depends on them.
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield Layout.current(config, dist.get_world_size(), dist.get_rank())
    finally:
        mpu.destroy_model_parallel()


def agree(flag: bool, device: torch.device) -> bool:
    """True on every rank when it is true on any: a signal need not reach all ranks in the same iteration."""
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def gather(value: float, device: torch.device) -> list[float]:
    """Every rank's value, in rank order, on every rank."""
    mine = torch.tensor(value, dtype=torch.float64, device=device)
    values = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(values, mine)
    return [float(each) for each in values]


def on_first_rank(task: Callable[[], T]) -> T:
    """Runs `task` on rank 0 alone and hands its (picklable) result to every rank.

    A ValueError of `task` is raised on rank 0; the others leave quietly with exit code 2, so that it is told once.
    """
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = task()
        except ValueError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    result, error = box
    if error is None:
        return result
    if dist.get_rank() == 0:
        raise error
    sys.exit(2)


def first_rank_first(task: Callable[[], T]) -> T:
    """Runs `task` on rank 0, and then on every other rank, which finds what it wrote. Raises as `on_first_rank`."""
    results: list[T] = []
    on_first_rank(lambda: results.append(task()))
    return results[0] if results else task()


@contextlib.contextmanager
def single_process(device: torch.device) -> Iterator[Layout]:
    """A job of this process alone, unless it is in a job already, whose model must then not be cut over ranks."""
    if dist.is_initialized():
        layout = Layout.current(ParallelConfig(), dist.get_world_size(), dist.get_rank())
        assert layout.tp_size == layout.pp_size == 1, layout.describe()
        yield layout
    else:
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        with process_groups(ParallelConfig(), 0, device, **alone) as layout:
            yield layout


def model_ranks(config: ParallelConfig, device: torch.device) -> AbstractContextManager:
    """A job of as many processes as one replica of the model takes; those of a job that is under way must be these.

    Raises:
        ValueError: there are fewer or more processes.
    """
    needed = config.model_parallel_size
    if needed == 1:
        return single_process(device)
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if world != needed:
        raise ValueError(
            f"tensor_model_parallel_size={config.tensor_model_parallel_size} x pipeline_model_parallel_size="
            f"{config.pipeline_model_parallel_size} takes {needed} processes, but there are {world}: start as many "
            "with torchrun --nproc-per-node, or change one of the two."
        )
    return contextlib.nullcontext() if dist.is_initialized() else process_groups(config, 0, device)


def is_first_rank() -> bool:
    return dist.get_rank() == 0
