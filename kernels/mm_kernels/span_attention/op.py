"""Span attention as one differentiable function of tensors: custom operators around the Triton launches.

Custom operators are opaque to torch.compile and visible to activation checkpointing and CUDA graphs; nothing here
synchronises with the device or looks into a mask.
"""

from __future__ import annotations

import torch

from mm_kernels.span_attention import launch
from mm_kernels.span_attention.arguments import check, default_scale, split_mask
from mm_kernels.span_attention.tuning import choose


def span_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    until: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention softmax(q k^T * scale) v over the keys that an interval mask allows.

        allowed(q, k) = lo[q] <= k < hi[q]  and  q < until[k]

    Args:
        q: [B, S, H, D] in bf16, fp16 or fp32; k, v: [B, K, G, D] with H a multiple of G (query head h reads key head
            h // (H / G)). Any strides, as long as D is dense and the others are multiples of 16 bytes.
        mask: int32 [B, 3, S], rows lo, hi, until, where keys and queries are the same positions (K = S); or [B, 2, S],
            lo and hi alone, where nothing is hidden or `until` is given. lo and hi count keys and never decrease along
            a row; a query with hi <= lo sees nothing. Leave `until` out where it hides nothing: that saves a
            comparison per score.
        until: int32 [B, K], counting queries.
        scale: of the scores; D ** -0.5 if None.

    For chunks of a longer sequence see `intervals.chunk_mask`.

    Returns:
        out [B, S, H, D] in q's dtype and memory layout, exactly 0 where a query sees no key;
        lse fp32 [B, H, S], the natural logarithm of the sum of exponentials, -inf where a query sees no key.
        Both are differentiable. The same inputs give the same bits, forward and backward.

    Raises:
        ValueError: shapes, dtypes or the scale do not fit together.
    """
    scale = default_scale(q, scale)
    check(q, k, v, mask, until, scale)
    _check_dtype(q)
    rows, until = split_mask(mask, until)
    out, lse = forward(q, k, v, rows, until, scale)
    return out, lse


@torch.library.custom_op("mm_kernels::span_attention", mutates_args=())
def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, until: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`span_attention` with a mask of two rows and its arguments unchecked."""
    problem = _problem(q, k, v, mask, until, scale)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    config = choose("forward", problem, lambda config: launch.forward(problem, out, lse, config))
    launch.forward(problem, out, lse, config)
    return out, lse


@torch.library.custom_op("mm_kernels::span_attention_backward", mutates_args=())
def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor,
    until: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), each in the layout of its input.

    `out` and `lse` may be those of more keys than these (a ring's merged result): then the result is these keys' part.
    """
    problem = _problem(q, k, v, mask, until, scale)
    dout, out = _addressable(dout), _addressable(out)
    dlse = None if dlse is None else dlse.contiguous()
    sums, transposed = launch.prepare(problem, out, lse.contiguous(), dout, dlse)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    config = choose("dq", problem, lambda config: launch.dq(problem, dout, sums, dq, config))
    launch.dq(problem, dout, sums, dq, config)
    config = choose("dkv", problem, lambda config: launch.dkv(problem, dout, sums, transposed, (dk, dv), config))
    launch.dkv(problem, dout, sums, transposed, (dk, dv), config)
    return dq, dk, dv


@forward.register_fake
def _(q, k, v, mask, until, scale):
    return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@backward.register_fake
def _(dout, dlse, q, k, v, out, lse, mask, until, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:
    q, k, v, mask, until, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, mask, until, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse):
    q, k, v, mask, until, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return *backward(dout, dlse, q, k, v, out, lse, mask, until, ctx.scale), None, None, None


forward.register_autograd(_differentiate, setup_context=_save)


def _problem(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, until: torch.Tensor | None, scale: float
) -> launch.Problem:
    until = None if until is None else _dense_rows(until)
    return launch.Problem(_addressable(q), _addressable(k), _addressable(v), _dense_rows(mask), until, scale)


def _check_dtype(q: torch.Tensor) -> None:
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q is {q.dtype}: the kernel runs in bfloat16, float16 and float32.")
    if q.shape[-1] * q.element_size() % 16:
        raise ValueError(f"A head of {q.shape[-1]} numbers in {q.dtype} is not a multiple of 16 bytes.")


def _addressable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where the copy engine can address it, else a dense copy."""
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False) if size > 1]
    fits = tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0
    fits = fits and all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in strides)
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def _dense_rows(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()
