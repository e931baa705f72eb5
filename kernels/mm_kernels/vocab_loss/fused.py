"""The two row-wise primitives in Triton: one program a row.

The logits are read once for the statistics (online softmax, arXiv 1805.02867), and read and written once for the
gradient; both kernels are bound by memory. Blocks that hold no padding run without masks: a mask whose end the compiler
does not know would turn 16-byte loads into single ones.

Trade-off: a row is one program's, so a chunk of fewer rows than fill the GPU runs below the memory's speed. Beside the
head's matrix products, 2 D operations for each logit, it does not show.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mm_kernels.vocab_loss.reference import IGNORE

BLOCK = 4096
"""Columns that a program holds at a time: 16 a thread, so two 16-byte loads of bf16 are on their way."""
WARPS = 8


@triton.jit
def _add_exp(x, peak, total):
    """Takes a block x [BLOCK] into (peak, total [BLOCK]): the sum of exp(x) is exp(peak) times the sum of total."""
    new_peak = tl.maximum(peak, tl.max(x, 0))
    # Nothing but -inf so far: exp(-inf - 0) is the zero that is needed.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    return new_peak, total * tl.exp(peak - base) + tl.exp(x - base)


# The width is specialised by its divisibility alone, without which loads would be narrow, and the number of rows is the
# grid's: nothing is compiled again when the lengths of sequences or chunks change.
@triton.jit(
    do_not_specialize=["first", "real"],
    do_not_specialize_on_alignment=["labels_ptr", "log_sum_exp_ptr", "target_ptr"],
)
def statistics_kernel(
    logits_ptr, labels_ptr, log_sum_exp_ptr, target_ptr, first, real, width,
    IGNORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `reference.row_statistics`; logits [C, width]."""
    dtype: tl.constexpr = log_sum_exp_ptr.dtype.element_ty
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * width
    label = tl.load(labels_ptr + row)
    real = tl.where(label == IGNORE, 0, real)  # an ignored row is not read
    lanes = tl.arange(0, BLOCK)

    peak = tl.full([], float("-inf"), dtype)
    total = tl.zeros([BLOCK], dtype)
    whole = real // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        x = tl.load(logits_ptr + start + lanes).to(dtype)
        peak, total = _add_exp(x, peak, total)
    for start in range(whole, real, BLOCK):
        x = tl.load(logits_ptr + start + lanes, mask=start + lanes < real, other=float("-inf")).to(dtype)
        peak, total = _add_exp(x, peak, total)
    log_sum_exp = tl.log(tl.sum(total, 0)) + peak

    column = label - first
    mine = (column >= 0) & (column < real)
    target = tl.load(logits_ptr + tl.where(mine, column, 0), mask=mine, other=0.0).to(dtype)
    tl.store(log_sum_exp_ptr + row, tl.where(label == IGNORE, 0.0, log_sum_exp))
    tl.store(target_ptr + row, target)


@triton.jit(
    do_not_specialize=["first", "real"],
    do_not_specialize_on_alignment=["labels_ptr", "log_z_ptr", "grad_ce_ptr", "grad_log_z_ptr"],
)
def gradient_kernel(
    logits_ptr, labels_ptr, log_z_ptr, grad_ce_ptr, grad_log_z_ptr, first, real, width,
    IGNORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `reference.logit_gradient_`; logits [C, width]."""
    dtype: tl.constexpr = log_z_ptr.dtype.element_ty
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * width
    label = tl.load(labels_ptr + row)
    real = tl.where(label == IGNORE, 0, real)  # an ignored row is all padding
    column = (label - first).to(tl.int32)
    log_z = tl.load(log_z_ptr + row)
    grad_ce = tl.load(grad_ce_ptr + row)
    scale = grad_ce + tl.load(grad_log_z_ptr + row)
    lanes = tl.arange(0, BLOCK)

    whole = real // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        at = start + lanes
        x = tl.load(logits_ptr + at).to(dtype)
        gradient = scale * tl.exp(x - log_z) - tl.where(at == column, grad_ce, 0.0)
        tl.store(logits_ptr + at, gradient)
    for start in range(whole, width, BLOCK):
        at = start + lanes
        x = tl.load(logits_ptr + at, mask=at < real, other=float("-inf")).to(dtype)
        gradient = scale * tl.exp(x - log_z) - tl.where(at == column, grad_ce, 0.0)
        tl.store(logits_ptr + at, tl.where(at < real, gradient, 0.0), mask=at < width)


def row_statistics(
    logits: torch.Tensor, labels: torch.Tensor, first: int, real: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.row_statistics`; the logits must be contiguous."""
    assert logits.is_contiguous()
    precise = torch.promote_types(logits.dtype, torch.float32)
    log_sum_exp, target = (torch.empty(len(logits), dtype=precise, device=logits.device) for _ in range(2))
    statistics_kernel[(len(logits),)](
        logits, labels.contiguous(), log_sum_exp, target, first, real, logits.shape[1],
        IGNORE=IGNORE, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
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
    """See `reference.logit_gradient_`; the logits must be contiguous."""
    assert logits.is_contiguous()
    labels, log_z, grad_ce, grad_log_z = (t.contiguous() for t in (labels, log_z, grad_ce, grad_log_z))
    gradient_kernel[(len(logits),)](
        logits, labels, log_z, grad_ce, grad_log_z, first, real, logits.shape[1],
        IGNORE=IGNORE, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
