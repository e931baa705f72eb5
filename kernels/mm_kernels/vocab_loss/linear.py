"""Cross-entropy and log Z straight from hidden states and the head's weights: logits exist for one chunk of tokens.

The forward pass keeps log Z of each token and nothing of the size of the vocabulary; the backward pass computes each
chunk's logits again, turns them into their gradient in place, and multiplies that into both gradients; its column sums
are the bias's.

Trade-off: four products with the head where three would do, for O(chunk * V) memory in place of several times S * V.
Taking the gradients in the forward pass already (as Liger does) would save the fourth, but needs to know there how the
loss depends on every token, and holds a gradient of the weight from then on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from mm_kernels.vocab_loss.op import logit_gradient_, row_statistics
from mm_kernels.vocab_loss.reference import IGNORE

CHUNK_BYTES = 2**30
"""Logits of a chunk on a GPU: about a hundredth of its memory. Each chunk reads and writes the weight's whole fp32
gradient, which is little beside its products if the tokens are many (here 4096 at 129280 entries in bf16)."""
CPU_CHUNK_BYTES = 2**22
"""On a CPU, where a chunk should stay in the cache between the passes over it: the best of 1 to 32 MiB on one core."""
CHUNK_MULTIPLE = 128
"""Tokens, and the fewest: fewer rows make slow matrix products."""

Merge = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int | None = None,
    first: int = 0,
    merge: Merge | None = None,
    chunk: int | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy, log Z) of the logits hidden @ weight.T + bias, each [...] in fp32 (fp64 for fp64 weights).

    Exactly 0 and without gradient where the label is `IGNORE`; NaN, gradients too, where a label is not in the
    vocabulary (on a CPU that raises). The gradients of weight and bias are summed over chunks in fp32.

    Args:
        hidden: [..., D]. Its gradient is this shard's part: over several shards the caller takes the sum.
        weight: [V, D], in hidden's dtype: this shard's rows of the head, of which row 0 is the entry `first`.
        labels: int64 [...].
        vocab_size: entries of the whole vocabulary; rows of the weight beyond it are padding and never take part.
            All rows if None.
        merge: given this shard's (log-sum-exp, label's logit or 0), [N] each, returns those of the whole vocabulary:
            the log-sum-exp over the shards' log-sum-exps, and the sum over their logits. None for a single shard.
        chunk: tokens whose logits exist at a time; by default what `CHUNK_BYTES` hold.
        bias: [V], in weight's dtype: this shard's part of the head's. None for a head without one.

    Raises:
        ValueError: the shapes do not fit together, or on a CPU a label is not in the vocabulary.
    """
    vocab_size = len(weight) if vocab_size is None else vocab_size
    _check(hidden, weight, bias, labels, vocab_size, alone=merge is None)
    real = min(max(vocab_size - first, 0), len(weight))
    chunk = default_chunk(weight) if chunk is None else chunk
    return LinearCrossEntropy.apply(hidden, weight, labels, vocab_size, first, real, merge, chunk, bias)


def default_chunk(weight: torch.Tensor) -> int:
    """Tokens of a chunk for a head's weight [V, D]."""
    budget = CPU_CHUNK_BYTES if weight.device.type == "cpu" else CHUNK_BYTES
    tokens = budget // (len(weight) * weight.element_size())
    return max(tokens // CHUNK_MULTIPLE, 1) * CHUNK_MULTIPLE


class LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx, hidden, weight, labels, vocab_size: int, first: int, real: int, merge: Merge | None, chunk: int, bias=None
    ):
        rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        precise = torch.promote_types(weight.dtype, torch.float32)
        log_z, target = (hidden.new_empty(len(rows), dtype=precise) for _ in range(2))
        for part, logits in _logit_chunks(rows, weight, bias, chunk):
            log_z[part], target[part] = row_statistics(logits, flat[part], first, real)
        if merge is not None:
            log_z, target = merge(log_z, target)
        ignored = flat == IGNORE
        unknown = ~ignored & ((flat < 0) | (flat >= vocab_size))
        # NaN reaches the gradients through the saved log Z.
        log_z = log_z.masked_fill(unknown, torch.nan).masked_fill(ignored, 0.0)
        ctx.save_for_backward(hidden, weight, bias, flat, log_z)
        ctx.shard, ctx.chunk = (first, real), chunk
        return (log_z - target).view(labels.shape), log_z.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ce: torch.Tensor, grad_log_z: torch.Tensor):
        hidden, weight, bias, labels, log_z = ctx.saved_tensors
        rows, grad_ce, grad_log_z = hidden.reshape(-1, hidden.shape[-1]), grad_ce.reshape(-1), grad_log_z.reshape(-1)
        hidden_grad = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight, dtype=log_z.dtype) if ctx.needs_input_grad[1] else None
        bias_grad = torch.zeros_like(bias, dtype=log_z.dtype) if bias is not None and ctx.needs_input_grad[8] else None
        for part, logits in _logit_chunks(rows, weight, bias, ctx.chunk):
            logit_gradient_(logits, labels[part], log_z[part], grad_ce[part], grad_log_z[part], *ctx.shard)
            if hidden_grad is not None:
                torch.mm(logits, weight, out=hidden_grad[part])
            if weight_grad is not None:
                _add_product_(weight_grad, logits.t(), rows[part])
            if bias_grad is not None:
                bias_grad += logits.sum(0, dtype=bias_grad.dtype)
            del logits  # with the last one the chunk's memory is free for the weight's gradient in its own dtype
        if hidden_grad is not None:
            hidden_grad = hidden_grad.view(hidden.shape)
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        if bias_grad is not None:
            bias_grad = bias_grad.to(bias.dtype)
        return hidden_grad, weight_grad, *[None] * 6, bias_grad


def _logit_chunks(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chunk: int):
    """Yields (slice of the rows [N, D], their logits [c, V]), the latter in memory that the next ones overwrite."""
    buffer = rows.new_empty(min(chunk, len(rows)), len(weight))
    for start in range(0, len(rows), chunk):
        part = slice(start, min(start + chunk, len(rows)))
        logits = buffer[: part.stop - start]
        if bias is None:
            torch.mm(rows[part], weight.t(), out=logits)
        else:
            torch.addmm(bias, rows[part], weight.t(), out=logits)
        yield part, logits


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, summed in total's dtype, which may be wider than theirs."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cpu":
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    vocab_size: int,
    alone: bool,
) -> None:
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)} and labels {list(labels.shape)} do not fit: "
            f"expected [..., D], [V, D] and [...]."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {list(bias.shape)} does not fit weight {list(weight.shape)}: expected [V] and [V, D].")
    if alone and vocab_size > len(weight):
        raise ValueError(
            f"vocab_size={vocab_size} exceeds the weight's {len(weight)} rows: give the whole weight, or `merge`."
        )
    if labels.device.type == "cpu":
        unknown = labels[(labels != IGNORE) & ((labels < 0) | (labels >= vocab_size))]
        if len(unknown):
            raise ValueError(
                f"A label is {unknown[0]}, but the vocabulary has {vocab_size} entries: labels are 0 to "
                f"{vocab_size - 1}, or {IGNORE} where there is none."
            )
