"""megatron-core's optimizer and schedule, and the AdamW they expect where Transformer Engine is not installed."""

from __future__ import annotations

import math

import megatron.core.optimizer as mcore_optimizer
import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from megatron_mm.config.schema import OptimConfig, ParallelConfig, TrainConfig
from megatron_mm.parallel.trainable import lr_overrides


class FusedAdam(torch.optim.Optimizer):
    """torch's AdamW in the shape of Apex's FusedAdam: the step count belongs to the parameter group.

    megatron-core's distributed optimizer can save torch's own AdamW (a step per parameter) but not load it.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True):
        assert adam_w_mode, "only decoupled weight decay is supported"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            group["step"] = group.get("step", 0) + 1
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            beta1, beta2 = group["betas"]
            # One number for all parameters, made where they are: nothing is copied from the host.
            step = torch.full((), float(group["step"]), device=params[0].device)
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [step] * len(params),
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


_NO_DECAY = ParamPredicate("norm_or_bias", lambda p: p.dim() < 2 or getattr(p, "init_std", 0.0) is None)
"""Norms and biases. megatron-core goes by shape alone and would let per-head norms decay, which are matrices."""


def build_optimizer(
    chunks: list[torch.nn.Module], optim: OptimConfig, parallel: ParallelConfig, train: TrainConfig
) -> tuple[ChainedOptimizer, OptimizerParamScheduler]:
    """The optimizer over DDP-wrapped model chunks, and its schedule, counted in iterations.

    The schedule is never optional: it applies each group's `wd_mult`, without which norms would decay too.
    """
    if mcore_optimizer.USING_PYTORCH_OPTIMIZER:
        mcore_optimizer.Adam = distrib_optimizer.Adam = FusedAdam
        mcore_optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.adam_beta1,
            adam_beta2=optim.adam_beta2,
            adam_eps=optim.adam_eps,
            clip_grad=optim.clip_grad,
            bf16=train.dtype == torch.bfloat16,
            params_dtype=train.dtype,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
        ),
        chunks,
        config_overrides={
            ParamKey(predicate=_NO_DECAY): ParamGroupOverride(wd_mult=0.0),
            **lr_overrides([chunk.module for chunk in chunks], optim),
        },
    )
    decay = optim.lr_decay_iters or train.train_iters
    exponential = optim.lr_decay_style == "exponential"  # which is WSD without a plateau
    wsd_steps = decay - optim.lr_warmup_iters if exponential else optim.lr_wsd_decay_iters
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.lr_warmup_iters,
        lr_decay_steps=decay,
        lr_decay_style="WSD" if exponential else optim.lr_decay_style,
        wsd_decay_steps=wsd_steps,
        lr_wsd_decay_style="exponential" if exponential else optim.lr_wsd_decay_style,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )
    return optimizer, schedule


def squared_grad_norm(optimizer: ChainedOptimizer) -> torch.Tensor:
    """This rank's share of the square of the gradients' norm, fp64 [1] on the device; the sum over all ranks of the job
    is the whole. In fp32 its rounding would depend on the layout, and through clipping every weight would.

    Comes before `clip_and_step`, as in megatron-core's own `step`, but reads no value on the host.
    """
    optimizer.prepare_grads()  # only a loss scale could find anything there, and there is none
    total = torch.zeros(1, dtype=torch.float64, device=torch.cuda.current_device())
    for part in optimizer.chained_optimizers:
        # The groups over which a part's norm is a sum divide the job between them; all have the same, and one counts.
        group = part.get_grad_stats_parallel_group()
        grads = part.get_main_grads_for_grad_norm()
        if grads and dist.get_process_group_ranks(group)[0] == 0:
            total += torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64)).square().sum()
    return total


def clip_and_step(optimizer: ChainedOptimizer, norm: float) -> bool:
    """Scales gradients of this norm down to `clip_grad` and steps; a norm that is not finite changes nothing, and gives
    False. megatron-core's own clipping takes two kernels a parameter without Apex."""
    if not math.isfinite(norm):
        return False
    clip = optimizer.config.clip_grad
    factor = clip / (norm + 1e-6)
    if clip > 0.0 and factor < 1.0:
        for part in optimizer.chained_optimizers:
            if grads := [p.grad for p in part.get_parameters() if p.grad is not None]:
                torch._foreach_mul_(grads, factor)
    return optimizer.step_with_ready_grads()
