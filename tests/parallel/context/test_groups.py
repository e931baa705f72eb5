"""Process groups inside a context-parallel group."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from megatron.core import parallel_state as mpu
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mm.config.schema import ParallelConfig
from megatron_mm.parallel import cpu_device
from megatron_mm.parallel.context.groups import make_groups
from megatron_mm.parallel.distributed import process_groups

CPU = torch.device("cpu")


def members(init, sizes: list[int], parallel: dict) -> dict[int, tuple[list[int], list[int]]]:
    """(global ranks of the inner group, of the outer one) of each size, as messages in them show."""

    def ranks(group: dist.ProcessGroup) -> list[int]:
        seen = torch.zeros(dist.get_world_size(), dtype=torch.int64)
        seen[dist.get_rank()] = 1
        dist.all_reduce(seen, group=group)
        return seen.nonzero().flatten().tolist()

    with process_groups(ParallelConfig(**parallel), 0, CPU, **init):
        return {size: (ranks(made.inner), ranks(made.outer)) for size, made in make_groups(sizes).items()}


def test_inner_groups_are_neighbours_and_outer_ones_cross_them():
    found = run_ranks(members, 8, [1, 2, 4], {"tensor_model_parallel_size": 2, "context_parallel_size": 4})
    for rank, groups in enumerate(found):
        context = [rank % 2 + 2 * number for number in range(4)]
        mine = rank // 2
        assert groups == {
            1: ([rank], context),
            2: (context[mine // 2 * 2 :][:2], context[mine % 2 :: 2]),
            4: (context, [rank]),
        }


def counted(_init, monkeypatch) -> tuple[list[tuple[int, ...]], list[int]]:
    """Ranks of the groups that one of 1,024 ranks makes, and sizes of those that it connects."""
    cpu_device.enable(CPU)
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=1024)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=4, context_parallel_size=4, create_gloo_process_groups=False
    )
    made, connected, new_group, all_reduce = [], [], dist.new_group, dist.all_reduce
    monkeypatch.setattr(dist, "new_group", lambda ranks, **kw: made.append(tuple(ranks)) or new_group(ranks, **kw))
    monkeypatch.setattr(
        dist, "all_reduce", lambda *a, group, **kw: connected.append(group.size()) or all_reduce(*a, group=group, **kw)
    )
    make_groups([1, 4])
    return made, connected


def test_a_rank_makes_its_own_groups_alone(monkeypatch: pytest.MonkeyPatch):
    ((made, connected),) = run_ranks(counted, 1, monkeypatch)
    assert sorted(made) == [(1, 5, 9, 13), (1, 5, 9, 13), (5,), (5,)]
    assert connected == [4, 4], "a rank alone needs no communicator"
