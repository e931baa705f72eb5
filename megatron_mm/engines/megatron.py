"""The default engine: one optimizer step of any family under any layout, by megatron-core.

`step` takes this rank's micro-batches and returns the step's metrics, equal on every rank. Each loss term is divided by
its own global count, which is summed over all micro-batches and ranks before the first backward pass, so gradients are
only ever summed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_mm.config.compose import Config
from megatron_mm.config.schema import FusionConfig, ParallelConfig
from megatron_mm.documents.builder import counts
from megatron_mm.documents.traits import MaskTraits
from megatron_mm.families.base import Family
from megatron_mm.mask import area
from megatron_mm.nn import attention, fusion
from megatron_mm.parallel import overlap
from megatron_mm.parallel.context.runtime import ContextParallel, HostPart
from megatron_mm.parallel.cpu_device import direct
from megatron_mm.parallel.init import Fresh, initialize
from megatron_mm.parallel.layout import Layout
from megatron_mm.parallel.lora import check_targets
from megatron_mm.parallel.model import StageModel
from megatron_mm.parallel.moe import Routing, take_routing
from megatron_mm.parallel.optimizer import build_optimizer, clip_and_step, squared_grad_norm
from megatron_mm.parallel.trainable import freeze
from megatron_mm.parallel.transformer_config import transformer_config
from megatron_mm.types import PackedBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicroBatch:
    """What a step needs to know of a micro-batch, on the host.

    counts: labels of each loss term in the whole rows, as `tokens` (non-padding positions) and `pairs` (allowed by the
    mask; 0 on a CPU) are. part: what this rank computes of them.
    """

    part: HostPart
    counts: dict[str, int]
    tokens: int
    pairs: int


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step reports. `losses` are means over each term's own global count."""

    losses: dict[str, float]
    counts: dict[str, int]
    tokens: int
    """Non-padding positions of the step, over all ranks."""
    pairs: int | None
    """Query-key pairs that the masks of the step allow, over all ranks; None on a CPU, where no MFU is reported."""
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    stopping: bool = False
    """Whether any rank would end the run."""
    router: dict[str, float] = field(default_factory=dict)
    """<layer or mean>/<modality>/<expert> -> share of the modality's choices; empty without experts."""


@dataclass(frozen=True)
class Parts:
    """What computes the model's parts here, and why, as lines for the log."""

    attention: str
    fusion: FusionConfig
    parallel: ParallelConfig
    reasons: tuple[str, ...]


def select_parts(config: Config, family: Family, device: torch.device) -> Parts:
    """What `attention.*`, `fusion.*` and the overlaps of `parallel.*` come to on this device.

    Raises:
        ValueError: what was asked for cannot run here.
    """
    backend, why = attention.select(
        config.attention.backend, device, config.train.dtype, MaskTraits.of(family).causal, family.trunk.head_dim,
        spread=config.parallel.context_parallel_size > 1,
    )  # fmt: skip
    fused, parts = fusion.select(config.fusion, device)
    parallel, beside = overlap.select(config.parallel, device, config.train.dtype)
    lines = (f"attention backend: {backend} ({why})", f"elementwise parts: {parts}", f"overlap: {beside}")
    return Parts(backend, fused, parallel, lines)


def build_chunks(
    config: Config, family: Family, layout: Layout, device: torch.device, fresh: Fresh = "all"
) -> list[StageModel]:
    """This rank's model chunks (several under interleaved pipelining), `fresh` weights drawn from the run's seed."""
    parts = select_parts(config, family, device)
    if layout.rank == 0:
        for reason in parts.reasons:
            logger.info(reason)
    hides_keys = MaskTraits.of(family).hides_keys
    core = transformer_config(
        family.trunk, parts.parallel, config.train, parts.attention, hides_keys, parts.fusion, config.lora
    )
    chunks = []
    for stage in range(layout.virtual_stages):
        virtual = stage if layout.virtual_stages > 1 else None
        first = layout.pp_rank == 0 and stage == 0
        last = layout.pp_rank == layout.pp_size - 1 and stage == layout.virtual_stages - 1
        chunk = StageModel(core, family, first, last, virtual)
        initialize(chunk, config.train.seed, fresh)
        chunks.append(chunk)
    check_targets(chunks, config.lora)
    return chunks


class MegatronEngine:
    """Model chunks under DDP, optimizer and schedule of one rank.

    fresh: the weights that are drawn; the others wait for a checkpoint.
    trained_of: (numbers that train, all numbers) in the parameters of the whole model.
    """

    def __init__(self, config: Config, family: Family, layout: Layout, device: torch.device, fresh: Fresh = "all"):
        self.config, self.family, self.layout, self.device = config, family, layout, device
        self.models = build_chunks(config, family, layout, device, fresh)
        self.trained_of = freeze(self.models, config.optim)
        parallel = select_parts(config, family, device).parallel
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            grad_reduce_in_fp32=config.train.precision == "bf16",
        )
        self.context = ContextParallel(config, family, layout)
        core = self.models[0].config
        self.chunks = [
            DistributedDataParallel(core, ddp, model, disable_bucketing=number > 0)
            for number, model in enumerate(self.models)
        ]
        core.finalize_model_grads_func = lambda chunks, num_tokens, **kwargs: finalize_model_grads(
            chunks, None, **kwargs
        )
        if parallel.overlap_grad_reduce:
            core.no_sync_func = [chunk.no_sync for chunk in self.chunks]
            core.grad_sync_func = [chunk.start_grad_sync for chunk in self.chunks]
            if len(self.chunks) == 1:
                core.no_sync_func, core.grad_sync_func = core.no_sync_func[0], core.grad_sync_func[0]
        self.optimizer, self.schedule = build_optimizer(self.chunks, config.optim, parallel, config.train)
        self._forward_backward = get_forward_backward_func()
        weights = [term.weight for term in family.terms]
        self._term_weights = torch.tensor(weights, dtype=torch.float64, device=device)

    def prepare(self, batch: PackedBatch) -> MicroBatch:
        """What the host has to do for a micro-batch before its step; may run in a thread."""
        pairs = sum(area(row) for row in batch.mask.numpy()) if self.device.type != "cpu" else 0
        return MicroBatch(
            self.context.part(batch, self.device), counts(self.family.terms, batch), batch.real_tokens, pairs
        )

    def step(self, batches: list[MicroBatch], stop: Callable[[], bool] = bool) -> StepMetrics:
        """One optimizer step over this rank's micro-batches of the global batch.

        The host waits for the device once, between the backward pass and the optimizer. `stop` is asked just before
        that, whether this rank would end the run.
        """
        with direct(self.device):
            return self._step(batches, stop)

    def _step(self, batches: list[MicroBatch], stop: Callable[[], bool]) -> StepMetrics:
        counts = self._global_counts(batches)
        for model, chunk in zip(self.models, self.chunks, strict=True):
            if not model.training:
                model.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        weights = self._term_weights / counts[: len(self._term_weights)].clamp(min=1)
        sums = self._run([batch.part for batch in batches], weights)
        if not self.layout.reports_losses:
            sums.zero_()
        summed = [
            sums,
            squared_grad_norm(self.optimizer),
            sums.new_full((1,), float(stop())),
            take_routing(self.models),
        ]
        (*labels, tokens, pairs), sums, (square,), (stopping,), routed = self._read(counts, summed)
        grad_norm = square**0.5
        stepped = clip_and_step(self.optimizer, grad_norm)
        learning_rate = self.schedule.get_lr({})  # of parameters that no multiplier names
        if stepped:
            self.schedule.step(1)

        terms = self.family.terms
        losses = {term.name: total / max(count, 1) for term, total, count in zip(terms, sums, labels, strict=True)}
        loss = sum(term.weight * losses[term.name] for term in terms)
        routing = Routing.of(self.models[0].config, routed) if routed else None
        coefficient = self.family.trunk.moe_aux_loss_coeff
        if routing and coefficient > 0.0:
            rows = self.config.train.global_batch_size * len(routing.layers)
            losses["load_balancing"] = routing.balance / rows
            loss += coefficient * losses["load_balancing"]
        return StepMetrics(
            losses,
            {term.name: int(count) for term, count in zip(terms, labels, strict=True)},
            int(tokens),
            int(pairs) if self.device.type != "cpu" else None,
            loss,
            grad_norm,
            learning_rate,
            skipped=not stepped,
            stopping=stopping > 0,
            router=routing.shares() if routing else {},
        )

    def _run(self, parts: list[HostPart], weights: torch.Tensor) -> torch.Tensor:
        """Loss sums [terms] fp64 over all micro-batches of this rank's replica; zeros where they are not computed."""
        self.context.compare(parts)

        def loss_of(sums: torch.Tensor):
            # No count is returned here (it would rescale the gradients): `weights` holds the counts already.
            return (
                (sums.double() * weights).sum().to(sums.dtype),
                torch.ones((), dtype=torch.int, device=self.device),
                sums.detach(),
            )

        def forward_step(iterator, chunk):
            stage = chunk.module
            return chunk(next(iterator).to(self.device, stage.pre_process, stage.post_process)), loss_of

        iterators = [iter(parts) for _ in self.chunks]
        stored = self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(parts),
            seq_length=parts[0].mask.shape[2],
            micro_batch_size=parts[0].mask.shape[0],
            forward_only=False,
        )
        total = torch.zeros(len(weights), dtype=torch.float64, device=self.device)
        for sums in stored:
            total += sums.double()
        return total

    def _global_counts(self, batches: list[MicroBatch]) -> torch.Tensor:
        """Labels of each loss term, non-padding positions and allowed pairs, summed over the data-parallel ranks:
        fp64 [terms + 2] on the device, for which the host does not wait."""
        rows = [(*(b.counts[term.name] for term in self.family.terms), b.tokens, b.pairs) for b in batches]
        mine = [float(sum(column)) for column in zip(*rows, strict=True)]
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
