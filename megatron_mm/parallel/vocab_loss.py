"""The head and its loss together, over a vocabulary that is sharded over tensor-parallel ranks."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from mm_kernels.vocab_loss import linear_cross_entropy


def vocab_parallel_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    chunk: int | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy, log Z) as `linear_cross_entropy` defines them, equal on every rank of `group`.

    Ranks meet twice: in the forward pass over two numbers a token, and in the backward pass over hidden's gradient,
    which `copy_to_tensor_model_parallel_region` sums, as before any column-parallel layer.

    Args:
        hidden: [..., D], the same on every rank.
        weight: [V / TP, D], this rank's rows of the head.
        labels: int64 [...], the same on every rank.
        vocab_size: entries of the whole vocabulary; rows beyond it are padding.
        chunk: tokens whose logits exist at a time; see `linear_cross_entropy`.
        bias: [V / TP], this rank's part of the head's, if it has one.

    Raises:
        ValueError: on a CPU, a label that is not in the vocabulary; on CUDA it makes the loss and its gradients NaN.
    """
    return linear_cross_entropy(
        copy_to_tensor_model_parallel_region(hidden, group),
        weight,
        labels,
        vocab_size=vocab_size,
        first=group.rank() * len(weight),
        merge=partial(_merge_shards, group=group) if group.size() > 1 else None,
        chunk=chunk,
        bias=bias,
    )


def _merge_shards(
    log_sum_exp: torch.Tensor, target: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log Z, the label's logit) of the whole vocabulary, each [N], from every shard's, in one exchange."""
    mine = torch.stack([log_sum_exp, target])
    shards = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(shards, mine, group)
    log_sum_exps, targets = torch.stack(shards, 1)
    return log_sum_exps.logsumexp(0), targets.sum(0)
