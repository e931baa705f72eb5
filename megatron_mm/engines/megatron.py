"""The default engine: one optimizer step of any family under any layout, by megatron-core.

`step` takes this rank's micro-batches and returns the step's metrics, equal on every rank. Each loss term is divided by
its own global count, which is summed over all micro-batches and ranks before the first backward pass, so gradients are
only ever summed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_mm.config.compose import Config
from megatron_mm.engines.base import MicroBatch, StepMetrics
from megatron_mm.engines.common import CommonEngine
from megatron_mm.engines.format import EMA, METADATA
from megatron_mm.engines.weights import model_state
from megatron_mm.families.base import Family
from megatron_mm.parallel.build import select_parts
from megatron_mm.parallel.context.runtime import HostPart
from megatron_mm.parallel.cpu_device import direct
from megatron_mm.parallel.ema import WeightAverage
from megatron_mm.parallel.init import Fresh
from megatron_mm.parallel.layout import Layout
from megatron_mm.parallel.moe import take_routing
from megatron_mm.parallel.optimizer import build_optimizer, clip_and_step, squared_grad_norm

MOMENTS = "optimizer.state.exp_avg."
"""How megatron-core's checkpoints begin the names of first moments."""


class MegatronEngine(CommonEngine):
    """See `Engine`: model chunks under DDP, optimizer and schedule of one rank."""

    def __init__(self, config: Config, family: Family, layout: Layout, device: torch.device, fresh: Fresh = "all"):
        super().__init__(config, family, layout, device, fresh)
        parallel = select_parts(config, family, device).parallel
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            grad_reduce_in_fp32=config.train.precision == "bf16",
        )
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
        decay = config.optim.ema_decay
        self.average = WeightAverage(self.optimizer, decay) if decay is not None else None

    def step(self, batches: list[MicroBatch], stop: Callable[[], bool] = bool) -> StepMetrics:
        """See `Engine`."""
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
        totals, sums, (square,), (stopping,), routed = self._read(counts, summed)
        grad_norm = square**0.5
        stepped = clip_and_step(self.optimizer, grad_norm)
        learning_rate = self.schedule.get_lr({})  # of parameters that no multiplier names
        if stepped:
            self.schedule.step(1)
            if self.average:
                self.average.update()
        return self._metrics(totals, sums, routed, grad_norm, learning_rate, not stepped, stopping > 0)

    def _sums(self, parts: list[HostPart]) -> torch.Tensor:
        return self._run(parts, self._term_weights, forward_only=True)

    def _run(self, parts: list[HostPart], weights: torch.Tensor, forward_only: bool = False) -> torch.Tensor:
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
            forward_only=forward_only,
        )
        total = torch.zeros(len(weights), dtype=torch.float64, device=self.device)
        for sums in stored:
            total += sums.double()
        return total

    def take_weights(self) -> None:
        """See `Engine`."""
        self.optimizer.reload_model_params()
        if self.average:
            self.average.start()

    def obstacle(self, common: Mapping[str, Any]) -> str | None:
        """See `Engine`."""
        ours = self.config.parallel.use_distributed_optimizer
        if common["distributed_optimizer"] == ours:
            return None
        theirs = f"parallel.use_distributed_optimizer={str(not ours).lower()}"
        return f"was written with {theirs}, which cannot be converted: set it to {str(not ours).lower()}."

    def state(self, is_loading: bool, saved: Collection[str] | None = None) -> dict[str, Any]:
        """See `Engine`."""
        if not is_loading and self.chunks[0].ddp_config.overlap_param_gather:
            for chunk in self.chunks:  # what the last step made of the weights still has to be gathered
                chunk.start_param_sync(force_sync=True)
        model = model_state(self.models)
        for part in self.optimizer.chained_optimizers:
            part.init_state_fn(part.optimizer, part.config)  # before the first step there are no moments to save
        average = {}
        if self.average and (saved is None or any(name.startswith(EMA) for name in saved)):
            with self.average.as_first_moments():
                average = {"ema": _average_alone(self._optimizer_state(model, is_loading))}
        return {
            "model": model,
            "optimizer": self._optimizer_state(model, is_loading),
            **average,
            "schedule": self.schedule.state_dict(),
            "distributed_optimizer": self.config.parallel.use_distributed_optimizer,
        }

    def _optimizer_state(self, model: dict[str, Any], is_loading: bool) -> dict[str, Any]:
        state = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=METADATA)
        _keep_empty_groups_out(state)
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Engine`."""
        for number, model in enumerate(self.models):
            model.load_state_dict(state["model"][str(number)], strict=True)
        if self.average and "ema" in state:
            with self.average.as_first_moments():
                self.optimizer.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average and "ema" not in state:
            self.average.start()
        self.schedule.load_state_dict(state["schedule"])


def _average_alone(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Of an optimizer's sharded state whose first moments are averages: these by names of their own, and nothing else
    that a checkpoint would store."""

    def renamed(entry: Any) -> Any:
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            return entry
        if not entry.key.startswith(MOMENTS):
            return LocalNonpersistentObject(entry.data)
        entry.key = EMA + entry.key.removeprefix(MOMENTS)
        return entry

    return dict_list_map_inplace(renamed, optimizer)


def _keep_empty_groups_out(optimizer: dict[str, Any]) -> None:
    """Groups of master weights that are empty on this stage, since nothing of them trains here, are not stored.

    megatron-core would store rank 0's empty ones as common values, which then clash with another stage's.
    """
    for part in (optimizer, *(part for part in optimizer.values() if isinstance(part, dict))):
        if groups := part.get("fp32_from_fp16_params"):
            part["fp32_from_fp16_params"] = [group or LocalNonpersistentObject([]) for group in groups]
