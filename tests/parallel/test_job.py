"""What it takes to join a job."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from distributed import run_ranks

from megatron_mm.config.schema import ParallelConfig
from megatron_mm.parallel.distributed import process_groups


def open_files(init) -> tuple[int, float]:
    """Files and sockets that joining opens, and a sum over the ranks."""
    before = len(os.listdir("/proc/self/fd"))
    with process_groups(ParallelConfig(), 0, torch.device("cpu"), **init):
        opened = len(os.listdir("/proc/self/fd")) - before
        total = torch.ones(())
        dist.all_reduce(total)
        return opened, total.item()


def test_sockets_do_not_grow_with_the_number_of_ranks():
    assert Path("/proc/self/fd").is_dir(), "this test reads Linux's list of open files"
    few, many = run_ranks(open_files, 2), run_ranks(open_files, 6)
    assert {total for _, total in few} == {2.0} and {total for _, total in many} == {6.0}
    assert max(opened for opened, _ in many) <= max(opened for opened, _ in few) + 2
