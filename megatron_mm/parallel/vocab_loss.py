"""Cross-entropy and log Z over a vocabulary that is sharded over tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mm.types import IGNORE


class VocabParallelCrossEntropy(torch.autograd.Function):
    """(cross-entropy, log Z) of sharded logits, with exact gradients of both.

    megatron-core's own function overwrites fp32 logits in place and gives no log Z, which the z-loss needs.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup):
        """logits [..., V / TP], labels int64 [...] -> two tensors [...], in fp32 (fp64 for fp64 logits)."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        valid = labels != IGNORE
        local = labels - group.rank() * logits.shape[-1]
        mine = valid & (local >= 0) & (local < logits.shape[-1])
        local = local.where(mine, torch.zeros_like(local)).unsqueeze(-1)

        peak = logits.amax(-1)
        _all_reduce(peak, dist.ReduceOp.MAX, group)
        exp = (logits - peak.unsqueeze(-1)).exp_()
        total = exp.sum(-1)
        target = logits.gather(-1, local).squeeze(-1).where(mine, torch.zeros_like(peak))
        both = torch.stack([total, target])
        _all_reduce(both, dist.ReduceOp.SUM, group)
        total, target = both.unbind()

        log_z = total.log() + peak
        ctx.save_for_backward(exp.div_(total.unsqueeze(-1)), local, mine, valid)
        zero = torch.zeros_like(log_z)
        return (log_z - target).where(valid, zero), log_z.where(valid, zero)

    @staticmethod
    def backward(ctx, grad_ce: torch.Tensor, grad_log_z: torch.Tensor):
        softmax, local, mine, valid = ctx.saved_tensors
        grad = softmax * ((grad_ce + grad_log_z) * valid).unsqueeze(-1)
        grad.scatter_add_(-1, local, -(grad_ce * mine).unsqueeze(-1))
        return grad, None, None


def _all_reduce(tensor: torch.Tensor, op, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op, group)
