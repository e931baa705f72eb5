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
    """This rank's groups for each inner size, a divisor of the context-parallel size. Every rank of the job calls this
    with the same sizes."""
    mine = tuple(mpu.get_context_parallel_global_ranks())
    everyone: list[tuple[int, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    contexts = sorted(set(everyone))
    return {
        size: Groups(
            _split([ranks[first : first + size] for ranks in contexts for first in range(0, len(ranks), size)]),
            _split([ranks[number::size] for ranks in contexts for number in range(size)]),
        )
        for size in inner_sizes
    }


def _split(all_ranks: list[tuple[int, ...]]) -> dist.ProcessGroup:
    """Makes every group, and returns the one that this rank is in."""
    groups = [dist.new_group(list(ranks)) for ranks in all_ranks]
    rank = dist.get_rank()
    mine = next(group for ranks, group in zip(all_ranks, groups, strict=True) if rank in ranks)
    connect(mine)
    return mine


def connect(group: dist.ProcessGroup) -> None:
    """Makes a group's connections while all of its ranks are here: NCCL forbids a first message among only some."""
    dist.all_reduce(torch.zeros(1, device=torch.cuda.current_device()), group=group)
