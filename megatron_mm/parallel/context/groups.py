"""Process groups inside a context-parallel group: small inner ones that exchange heads, and outer ones across them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu


@dataclass(frozen=True)
class Groups:
    """Context rank r is number r % inner size of its inner group, and r // inner size of its outer one."""

    inner: dist.ProcessGroup
    outer: dist.ProcessGroup


def make_groups(inner_sizes: Iterable[int]) -> dict[int, Groups]:
    """This rank's groups for each inner size, a divisor of the context-parallel size. Every rank of a context-parallel
    group calls this with the same sizes."""
    ranks, mine = mpu.get_context_parallel_global_ranks(), mpu.get_context_parallel_rank()
    return {
        size: Groups(
            _make(ranks[mine - mine % size :][:size], "CONTEXT_INNER"),
            _make(ranks[mine % size :: size], "CONTEXT_OUTER"),
        )
        for size in inner_sizes
    }


def _make(ranks: list[int], name: str) -> dist.ProcessGroup:
    """A group of this rank's, which only its members make. One rank alone needs no connection."""
    group = dist.new_group(ranks, use_local_synchronization=True, group_desc=name)
    if len(ranks) > 1:
        connect(group)
    return group


def connect(group: dist.ProcessGroup) -> None:
    """Makes a group's connections while all of its ranks are here: NCCL forbids a first message among only some."""
    dist.all_reduce(torch.zeros(1, device=torch.cuda.current_device()), group=group)
