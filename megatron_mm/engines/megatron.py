"""The default engine: one optimizer step of any family under any layout, by megatron-core.

`step` takes this rank's micro-batches and returns the step's metrics, equal on every rank. Each loss term is divided by
its own global count, which is summed over all micro-batches and ranks before the first backward pass, so gradients are
only ever summed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_mm.config.compose import Config
from megatron_mm.config.schema import FusionConfig
from megatron_mm.families.base import Family
from megatron_mm.mask import area
from megatron_mm.nn import attention, fusion
from megatron_mm.parallel.context.runtime import ContextParallel, HostPart
from megatron_mm.parallel.init import Fresh, initialize
from megatron_mm.parallel.layout import Layout
from megatron_mm.parallel.lora import check_targets
from megatron_mm.parallel.model import StageModel
from megatron_mm.parallel.moe import collect_routing
from megatron_mm.parallel.optimizer import build_optimizer, clip_and_step
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
    router: dict[str, float] = field(default_factory=dict)
    """<layer or mean>/<modality>/<expert> -> share of the modality's choices; empty without experts."""


@dataclass(frozen=True)
class Parts:
    """What computes the model's parts here, and why, as lines for the log."""

    attention: str
    fusion: FusionConfig
    reasons: tuple[str, ...]


def select_parts(config: Config, family: Family, device: torch.device) -> Parts:
    """What `attention.*` and `fusion.*` come to on this device.

    Raises:
        ValueError: what was asked for cannot run here.
    """
    backend, why = attention.select(
        config.attention.backend, device, config.train.dtype, family.causal, family.trunk.head_dim,
        spread=config.parallel.context_parallel_size > 1,
    )  # fmt: skip
    fused, parts = fusion.select(config.fusion, device)
    return Parts(backend, fused, (f"attention backend: {backend} ({why})", f"elementwise parts: {parts}"))


def build_chunks(
    config: Config, family: Family, layout: Layout, device: torch.device, fresh: Fresh = "all"
) -> list[StageModel]:
    """This rank's model chunks (several under interleaved pipelining), `fresh` weights drawn from the run's seed."""
    parts = select_parts(config, family, device)
    if layout.rank == 0:
        for reason in parts.reasons:
            logger.info(reason)
    core = transformer_config(
        family.trunk, config.parallel, config.train, parts.attention, family.hides_keys, parts.fusion, config.lora
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
        parallel = config.parallel
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

    def prepare(self, batch: PackedBatch) -> MicroBatch:
        """What the host has to do for a micro-batch before its step; may run in a thread."""
        pairs = sum(area(row) for row in batch.mask.numpy()) if self.device.type == "cuda" else 0
        return MicroBatch(self.context.part(batch), self.family.counts(batch), batch.real_tokens, pairs)

    def step(self, batches: list[MicroBatch]) -> StepMetrics:
        """One optimizer step over this rank's micro-batches of the global batch."""
        counts, tokens, pairs = self._global_counts(batches)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        weights = [term.weight / max(counts[term.name], 1) for term in self.family.terms]
        sums = self._run(
            [batch.part for batch in batches], torch.tensor(weights, dtype=torch.float64), forward_only=False
        )
        stepped, grad_norm = clip_and_step(self.optimizer)
        learning_rate = self.schedule.get_lr({})  # of parameters that no multiplier names
        if stepped:
            self.schedule.step(1)
        losses = self._global_means(sums, counts)
        loss = sum(term.weight * losses[term.name] for term in self.family.terms)
        routing, coefficient = collect_routing(self.models), self.family.trunk.moe_aux_loss_coeff
        if routing and coefficient > 0.0:
            rows = self.config.train.global_batch_size * len(routing.layers)
            losses["load_balancing"] = routing.balance / rows
            loss += coefficient * losses["load_balancing"]
        return StepMetrics(
            losses, counts, tokens, pairs, loss, grad_norm, learning_rate, skipped=not stepped,
            router=routing.shares() if routing else {},
        )  # fmt: skip

    def _run(self, parts: list[HostPart], weights: torch.Tensor, forward_only: bool) -> torch.Tensor:
        """Loss sums [terms] fp64 over all micro-batches of this rank's replica; zeros where they are not computed."""
        weights = weights.to(self.device)

        def loss_of(sums: torch.Tensor):
            # No count is returned here (it would rescale the gradients): `weights` holds the counts already.
            return (
                (sums.double() * weights).sum().to(sums.dtype),
                torch.ones((), dtype=torch.int, device=self.device),
                sums.detach(),
            )

        def forward_step(iterator, chunk):
            return chunk(self.context.to(next(iterator), self.device, self.config.train.dtype)), loss_of

        iterators = [iter(parts) for _ in self.chunks]
        stored = self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(parts),
            seq_length=parts[0].mask.shape[2],
            micro_batch_size=parts[0].mask.shape[0],
            forward_only=forward_only,
        )
        total = torch.zeros(len(weights), dtype=torch.float64, device=self.device)
        for sums in stored:
            total += sums.double()
        return total

    def _global_counts(self, batches: list[MicroBatch]) -> tuple[dict[str, int], int, int | None]:
        """(labels of each loss term, non-padding positions, allowed pairs), summed over the data-parallel ranks."""
        names = [term.name for term in self.family.terms]
        rows = [[batch.counts[name] for name in names] + [batch.tokens, batch.pairs] for batch in batches]
        total = torch.tensor(rows, device=self.device).sum(0)
        dist.all_reduce(total, group=mpu.get_data_parallel_group())
        *sums, tokens, pairs = total.tolist()
        return dict(zip(names, sums, strict=True)), tokens, pairs if self.device.type == "cuda" else None

    def _global_means(self, sums: torch.Tensor, counts: dict[str, int]) -> dict[str, float]:
        if not self.layout.reports_losses:
            sums.zero_()
        dist.all_reduce(sums)
        return {
            term.name: total / max(counts[term.name], 1)
            for term, total in zip(self.family.terms, sums.tolist(), strict=True)
        }
