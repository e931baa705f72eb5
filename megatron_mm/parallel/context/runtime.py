"""Context parallelism of one run, as its engine uses it: from a batch to this rank's part, and attention over all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_mm.config.schema import ParallelConfig
from megatron_mm.families.base import Family
from megatron_mm.parallel.context.assignment import Assignment, assign
from megatron_mm.parallel.context.groups import Groups, make_groups
from megatron_mm.parallel.context.plan import AttentionPlan, plan_attention
from megatron_mm.parallel.context.ring import PartialAttention, ring_attention
from megatron_mm.parallel.context.schedule import Needs, needs
from megatron_mm.parallel.context.shard import Shard, shard, whole
from megatron_mm.parallel.context.ulysses import gather_heads, gather_positions
from megatron_mm.types import PackedBatch


@dataclass(frozen=True)
class SpreadAttention:
    """Attention of one micro-batch whose positions are spread over ranks. Travels as megatron-core's
    `packed_seq_params`, the one argument of a layer that need not be a tensor."""

    plan: AttentionPlan
    groups: Groups
    qkv_format: str = "sbhd"

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attend: PartialAttention) -> torch.Tensor:
        """q [n, B, H, D], k and v [n, B, G, D] of this rank's positions -> out [n, B, H, D]."""
        q, k, v = (gather_positions(side, self.groups.inner) for side in (q, k, v))
        out = ring_attention(q, k, v, self.plan, self.groups.outer, attend)
        return gather_heads(out, self.groups.inner)


@dataclass(frozen=True)
class Part:
    """What a model chunk computes: a part of a micro-batch, and attention over all of its parts (None: it is whole)."""

    shard: Shard
    attention: SpreadAttention | None = None
    group: dist.ProcessGroup | None = None
    """All ranks that have parts of the same rows."""

    @staticmethod
    def of(batch: PackedBatch) -> Part:
        return Part(whole(batch))


@dataclass(frozen=True)
class HostPart:
    """A part that is still on the host, with the plan of how it meets the others."""

    shard: Shard
    mask: np.ndarray
    needs: Needs | None = None
    relays: bool = False
    inner: int = 1


class ContextParallel:
    """Cuts batches for this rank, by `parallel.context_parallel_comm`."""

    def __init__(self, parallel: ParallelConfig, family: Family):
        self._size = parallel.context_parallel_size
        self._family = family
        if self._size == 1:
            return
        self._rank = mpu.get_context_parallel_rank()
        self._group = mpu.get_context_parallel_group()
        self._comm = parallel.context_parallel_comm
        self._inner = {"ulysses": self._size, "hybrid": parallel.ulysses_size}.get(self._comm) or 1
        self._groups = make_groups([self._inner])

    def part(self, batch: PackedBatch) -> HostPart:
        """This rank's part of a batch, on the host."""
        mask = batch.mask.numpy()
        if self._size == 1:
            return HostPart(whole(batch), mask)
        assignment = assign(mask if self._family.hides_keys else mask[:, :2], self._size // self._inner)
        mine = shard(
            batch, positions(assignment, self._inner), self._rank, self._family.fields, self._family.vocab.pad,
            self._family.whole_images,
        )  # fmt: skip
        return HostPart(mine, mask, needs(mask, assignment), self._comm in ("ring", "hybrid"), self._inner)

    def to(self, part: HostPart, device: torch.device, dtype: torch.dtype) -> Part:
        """The part on its device, floating-point fields in `dtype`."""
        here = part.shard.to(device, dtype)
        if part.needs is None:
            return Part(here)
        groups = self._groups[part.inner]
        plan = plan_attention(part.mask, part.needs, groups.outer.rank(), part.relays, self._family.hides_keys, device)
        return Part(here, SpreadAttention(plan, groups), self._group)


def positions(assignment: Assignment, inner: int) -> list[np.ndarray]:
    """Positions of every context rank, ascending: an inner group has one part of the assignment, cut in a row."""
    return [share for rank in range(assignment.ranks) for share in np.split(assignment.positions(rank), inner)]
