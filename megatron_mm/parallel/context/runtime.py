"""Context parallelism of one run, as its engine uses it: from a batch to this rank's part, and attention over all."""

from __future__ import annotations

import logging
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_mm.config.compose import Config
from megatron_mm.config.validate import attending
from megatron_mm.documents.traits import MaskTraits
from megatron_mm.families.base import Family
from megatron_mm.parallel.context.groups import Groups, connect, make_groups
from megatron_mm.parallel.context.plan import AttentionPlan, plan_attention
from megatron_mm.parallel.context.predict import Hardware, Work
from megatron_mm.parallel.context.ring import PartialAttention, ring_attention
from megatron_mm.parallel.context.shard import Shard, shard, whole
from megatron_mm.parallel.context.ulysses import gather_heads, gather_positions
from megatron_mm.parallel.context.ways import Ways, positions
from megatron_mm.parallel.layout import Layout
from megatron_mm.parallel.staging import Staged
from megatron_mm.types import BACK, FRONT, PackedBatch

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
    """A part that is still on the host.

    stages: (is the model's first, is its last) -> what such a chunk of this rank's reads. mask: int32 [B, 3, S] of the
    whole rows. decision: digest of how the ranks with parts of these rows meet; empty where there is one.
    """

    stages: Mapping[tuple[bool, bool], Staged[Part]]
    mask: np.ndarray
    decision: bytes = b""

    def to(self, device: torch.device, first: bool, last: bool) -> Part:
        return self.stages[first, last].to(device)


class ContextParallel:
    """Cuts batches for this rank, by `parallel.context_parallel_comm`. Every rank of the job makes one."""

    def __init__(self, config: Config, family: Family, layout: Layout):
        self._family, self._layout, self._dtype = family, layout, config.train.dtype
        self._hides_keys = MaskTraits.of(family).hides_keys
        self._compared = layout.cp_size == 1
        if layout.cp_size > 1:
            near = int(os.environ.get("LOCAL_WORLD_SIZE", Hardware.node_size)) // layout.tp_size
            works = [Work.of(layers, config.train, layout.tp_size) for layers in attending(family.config)]
            self._ways = Ways.of(config.parallel, works, Hardware(node_size=max(near, 1)))
            self._groups = make_groups(self._ways.inner_sizes)
            connect(mpu.get_context_parallel_group())
            if layout.rank == 0:
                logger.info("context parallelism over %d ranks: %s", layout.cp_size, self._ways.describe())

    def part(self, batch: PackedBatch, device: torch.device) -> HostPart:
        """This rank's part of a batch, on its way to `device`; may run in a thread."""
        mask = batch.mask.numpy()
        part, decision = self._cut(self._read_here(batch), mask) if self._layout.cp_size > 1 else (Part.of(batch), b"")
        stages = {}
        for first, last in set(self._layout.ends):
            seen = part.shard.of_stage(first, last, self._family.fields, self._dtype)
            stages[first, last] = Staged.of(replace(part, shard=seen), device)
        return HostPart(stages, mask, decision)

    def compare(self, parts: Sequence[HostPart]) -> None:
        """Before the first step: whether all ranks with parts of the same rows cut them alike. Each decides by its own
        arithmetic, and where one decides otherwise, messages do not meet. Collective; later calls do nothing.

        Raises:
            ValueError: they do not; on the first of them, the others leave quietly with exit code 2.
        """
        if self._compared:
            return
        self._compared = True
        ranks, group = mpu.get_context_parallel_global_ranks(), mpu.get_context_parallel_group()
        mine = blake2b(b"".join(part.decision for part in parts)).digest(), np.__version__, torch.__version__
        everyone: list[tuple] = [()] * len(ranks)
        dist.all_gather_object(everyone, mine, group)
        alike = defaultdict(list)
        for rank, decision in zip(ranks, everyone, strict=True):
            alike[decision].append(rank)
        if len(alike) == 1:
            return
        if dist.get_rank() != ranks[0]:
            sys.exit(2)
        sides = [f"{of} (numpy {numpy}, torch {torch_})" for (_, numpy, torch_), of in alike.items()]
        raise ValueError(
            f"Context-parallel ranks do not cut the first step's rows alike: ranks {' and '.join(sides)} differ. Give "
            "all of their hosts the same packages, processors and data."
        )

    def _read_here(self, batch: PackedBatch) -> PackedBatch:
        """The batch with the fields that this rank's chunks read."""
        first, last = (any(ends) for ends in zip(*self._layout.ends, strict=True))
        here = {end for end, there in ((FRONT, first), (BACK, last)) if there}
        specs = self._family.fields
        fields = {name: values for name, values in batch.fields.items() if here & {*specs[name].readers}}
        return replace(batch, fields=fields)

    def _cut(self, batch: PackedBatch, mask: np.ndarray) -> tuple[Part, bytes]:
        """This rank's part and the digest of how all parts meet."""
        family, rank = self._family, self._layout.cp_rank
        meeting = self._ways.best(mask if self._hides_keys else mask[:, :2])
        assignment, outer = meeting.needs.assignment, rank // meeting.inner
        mine = shard(batch, positions(assignment, meeting.inner), rank, family.fields, family.vocab.pad)
        plan = plan_attention(mask, assignment, meeting.stages(outer), outer, self._hides_keys)
        attention = SpreadAttention(plan, self._groups[meeting.inner])
        return Part(mine, attention, mpu.get_context_parallel_group()), meeting.digest()
