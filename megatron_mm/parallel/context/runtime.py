"""Context parallelism of one run, as its engine uses it: from a batch to this rank's part, and attention over all."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_mm.config.compose import Config
from megatron_mm.families.base import Family
from megatron_mm.parallel.context.assignment import Assignment
from megatron_mm.parallel.context.groups import Groups, connect, make_groups
from megatron_mm.parallel.context.plan import AttentionPlan, plan_attention
from megatron_mm.parallel.context.predict import Hardware, Work
from megatron_mm.parallel.context.ring import PartialAttention, ring_attention
from megatron_mm.parallel.context.schedule import Stage
from megatron_mm.parallel.context.shard import Shard, shard, whole
from megatron_mm.parallel.context.ulysses import gather_heads, gather_positions
from megatron_mm.parallel.context.ways import Ways, positions
from megatron_mm.parallel.layout import Layout
from megatron_mm.types import PackedBatch

logger = logging.getLogger(__name__)


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
    """A part that is still on the host, with what this rank does to meet the others (None: there are none)."""

    shard: Shard
    mask: np.ndarray
    route: Route | None = None


@dataclass(frozen=True)
class Route:
    """inner: size of the groups that swap heads. rank: this one's among them. stages: how keys come from the others."""

    inner: int
    rank: int
    assignment: Assignment
    stages: list[Stage]


class ContextParallel:
    """Cuts batches for this rank, by `parallel.context_parallel_comm`. Every rank of the job makes one."""

    def __init__(self, config: Config, family: Family, layout: Layout):
        self._family, self._layout = family, layout
        if layout.cp_size > 1:
            near = int(os.environ.get("LOCAL_WORLD_SIZE", Hardware.node_size)) // layout.tp_size
            work = Work.of(family.trunk, config.train, layout.tp_size)
            self._ways = Ways.of(config.parallel, work, Hardware(node_size=max(near, 1)))
            self._groups = make_groups(self._ways.inner_sizes)
            connect(mpu.get_context_parallel_group())
            if layout.rank == 0:
                logger.info("context parallelism over %d ranks: %s", layout.cp_size, self._ways.describe())

    def part(self, batch: PackedBatch) -> HostPart:
        """This rank's part of a batch, on the host; may run in a thread."""
        mask = batch.mask.numpy()
        if self._layout.cp_size == 1:
            return HostPart(whole(batch), mask)
        meeting = self._ways.best(mask if self._family.hides_keys else mask[:, :2])
        assignment, rank = meeting.needs.assignment, self._layout.cp_rank // meeting.inner
        owners = positions(assignment, meeting.inner)
        fields, pad = self._family.fields, self._family.vocab.pad
        mine = shard(batch, owners, self._layout.cp_rank, fields, pad, self._family.whole_images)
        return HostPart(mine, mask, Route(meeting.inner, rank, assignment, meeting.stages(rank)))

    def to(self, part: HostPart, device: torch.device, dtype: torch.dtype) -> Part:
        """The part on its device, floating-point fields in `dtype`."""
        here, route = part.shard.to(device, dtype), part.route
        if route is None:
            return Part(here)
        plan = plan_attention(part.mask, route.assignment, route.stages, route.rank, self._family.hides_keys, device)
        return Part(here, SpreadAttention(plan, self._groups[route.inner]), mpu.get_context_parallel_group())
