"""The two row-wise primitives in plain torch: what defines them, and what a CPU runs.

Trade-off: several passes over the logits, and an fp32 copy where their precision is lower; both are cheap for a chunk
that fits in the cache.

Shape legend: C tokens of a chunk, V entries of the vocabulary in this shard, padding included.
"""

from __future__ import annotations

import torch

IGNORE = -100
"""Label of a token without one; torch's own default `ignore_index`."""


def row_statistics(
    logits: torch.Tensor, labels: torch.Tensor, first: int, real: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the loss needs to know of each row; both exactly 0 where the label is `IGNORE`, whatever the row holds.

    Args:
        logits: [C, V], of which the columns from `real` on are padding that is never read.
        labels: int64 [C], ids of the whole vocabulary; column 0 is the entry `first`.

    Returns:
        log_sum_exp of the row, and target: the label's logit where it is in this shard, else 0. Both [C], fp32 (fp64
        for fp64 logits).
    """
    column, mine = _label_columns(labels, first, real)
    precise = torch.promote_types(logits.dtype, torch.float32)
    log_sum_exp = logits[:, :real].to(precise).logsumexp(-1).masked_fill(labels == IGNORE, 0.0)
    target = logits.gather(-1, column[:, None])[:, 0].to(precise).masked_fill(~mine, 0.0)
    return log_sum_exp, target


def logit_gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    log_z: torch.Tensor,
    grad_ce: torch.Tensor,
    grad_log_z: torch.Tensor,
    first: int,
    real: int,
) -> None:
    """Overwrites `logits` [C, V] with the gradient of the loss: (dCE + dlogZ) softmax(logits) - dCE onehot(label).

    Exactly 0 in padding columns and where the label is `IGNORE`, whatever these hold and whatever the gradients are.

    Args:
        log_z: [C], over the whole vocabulary.
        grad_ce, grad_log_z: [C], gradients of the loss by cross-entropy and log Z.
    """
    column, mine = _label_columns(labels, first, real)
    gradient = logits.to(log_z.dtype)  # the logits themselves, but for low precision
    gradient.sub_(log_z[:, None]).exp_().mul_((grad_ce + grad_log_z)[:, None])
    gradient.scatter_add_(-1, column[:, None], grad_ce.neg().masked_fill(~mine, 0.0)[:, None])
    gradient.masked_fill_((labels == IGNORE)[:, None], 0.0)
    gradient[:, real:] = 0.0
    if gradient is not logits:
        logits.copy_(gradient)


def _label_columns(labels: torch.Tensor, first: int, real: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each label's column (0 where it has none here), and whether it has one: int64 and bool [C]."""
    column = labels - first
    mine = (labels != IGNORE) & (column >= 0) & (column < real)
    return column.masked_fill(~mine, 0), mine
