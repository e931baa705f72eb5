"""What every engine shares: global counts, sums that are read once a step, means, metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_mm.config.compose import Config
from megatron_mm.documents.builder import counts
from megatron_mm.engines.base import Evaluation, MicroBatch, StepMetrics
from megatron_mm.families.base import Family
from megatron_mm.mask import area
from megatron_mm.parallel.build import build_chunks
from megatron_mm.parallel.context.runtime import ContextParallel, HostPart
from megatron_mm.parallel.cpu_device import direct
from megatron_mm.parallel.init import Fresh
from megatron_mm.parallel.layout import Layout
from megatron_mm.parallel.moe import Routing, take_routing
from megatron_mm.parallel.trainable import freeze
from megatron_mm.types import PackedBatch


class CommonEngine(ABC):
    """The models of one rank, and all of a step but how gradients and weights move.

    fresh: the weights that are drawn; the others wait for a checkpoint.
    """

    def __init__(self, config: Config, family: Family, layout: Layout, device: torch.device, fresh: Fresh = "all"):
        self.config, self.family, self.layout, self.device = config, family, layout, device
        self.models = build_chunks(config, family, layout, device, fresh)
        self.trained_of = freeze(self.models, config.optim)
        self.context = ContextParallel(config, family, layout)
        weights = [term.weight for term in family.terms]
        self._term_weights = torch.tensor(weights, dtype=torch.float64, device=device)

    def prepare(self, batch: PackedBatch) -> MicroBatch:
        """What the host has to do for a micro-batch before its step; may run in a thread."""
        pairs = sum(area(row) for row in batch.mask.numpy()) if self.device.type != "cpu" else 0
        return MicroBatch(
            self.context.part(batch, self.device), counts(self.family.terms, batch), batch.real_tokens, pairs
        )

    def evaluate(self, steps: Iterable[list[MicroBatch]]) -> Evaluation:
        """See `Engine`."""
        for model in self.models:
            model.eval()
        with direct(self.device), torch.no_grad():
            sums = torch.zeros(len(self._term_weights), dtype=torch.float64, device=self.device)
            mine = np.zeros(len(sums) + 2)
            for step in steps:
                sums += self._sums([batch.part for batch in step])
                mine += self._counts(step)
            counts = self._over_replicas(mine)
            if not self.layout.reports_losses:
                sums.zero_()
            take_routing(self.models)  # is the next training step's
            (*labels, _, _), sums = self._read(counts, [sums])
        return self._means(sums, labels)

    @abstractmethod
    def _sums(self, parts: list[HostPart]) -> torch.Tensor:
        """Loss sums [terms] fp64 of this rank's micro-batches, forward alone; zeros where they are not computed."""

    def _means(self, sums: Sequence[float], labels: Sequence[float]) -> Evaluation:
        terms = self.family.terms
        losses = {term.name: total / max(count, 1) for term, total, count in zip(terms, sums, labels, strict=True)}
        found = {term.name: int(count) for term, count in zip(terms, labels, strict=True)}
        return Evaluation(losses, found, sum(term.weight * losses[term.name] for term in terms))

    def _metrics(
        self,
        totals: Sequence[float],
        sums: Sequence[float],
        routed: Sequence[float],
        grad_norm: float,
        learning_rate: float,
        skipped: bool,
        stopping: bool,
    ) -> StepMetrics:
        """Of a step, from numbers over all ranks: `totals` as `_global_counts` has them, loss sums, routing."""
        *labels, tokens, pairs = totals
        means = self._means(sums, labels)
        losses, loss = dict(means.losses), means.loss
        routing = Routing.of(self.models[0].config, routed) if routed else None
        coefficient = self.family.trunk.moe_aux_loss_coeff
        if routing and coefficient > 0.0:
            rows = self.config.train.global_batch_size * len(routing.layers)
            losses["load_balancing"] = routing.balance / rows
            loss += coefficient * losses["load_balancing"]
        return StepMetrics(
            losses,
            means.counts,
            int(tokens),
            int(pairs) if self.device.type != "cpu" else None,
            loss,
            grad_norm,
            learning_rate,
            skipped=skipped,
            stopping=stopping,
            router=routing.shares() if routing else {},
        )

    def _global_counts(self, batches: list[MicroBatch]) -> torch.Tensor:
        """Labels of each loss term, non-padding positions and allowed pairs, summed over the data-parallel ranks:
        fp64 [terms + 2] on the device, for which the host does not wait."""
        return self._over_replicas(self._counts(batches))

    def _counts(self, batches: list[MicroBatch]) -> np.ndarray:
        """The same of this rank's micro-batches, on the host."""
        names = [term.name for term in self.family.terms]
        return np.sum([(*(b.counts[name] for name in names), b.tokens, b.pairs) for b in batches], axis=0, dtype=float)

    def _over_replicas(self, mine: np.ndarray) -> torch.Tensor:
        pinned = torch.tensor(mine, dtype=torch.float64, pin_memory=self.device.type != "cpu")
        total = pinned.to(self.device, non_blocking=True)
        dist.all_reduce(total, group=mpu.get_data_parallel_group())
        return total

    def _read(self, counts: torch.Tensor, summed: list[torch.Tensor]) -> list[list[float]]:
        """The numbers of `counts`, and of each of `summed` over all ranks, on the host: one collective and one read."""
        totals = torch.cat(summed)
        dist.all_reduce(totals)
        values = iter(torch.cat([counts, totals]).tolist())
        return [list(islice(values, len(part))) for part in (counts, *summed)]
