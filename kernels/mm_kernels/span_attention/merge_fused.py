"""`merge_` as one Triton kernel: every number is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 16
"""Queries of one program."""


def merge_(out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor) -> None:
    """See `merge.merge_`."""
    batch, length, heads, width = out.shape
    grid = (triton.cdiv(length, ROWS), heads, batch)
    merge_kernel[grid](
        out, lse, new_out, new_lse, *out.stride(), *lse.stride(), *new_out.stride(), *new_lse.stride(), length, width,
        ROWS, triton.next_power_of_2(width),
    )  # fmt: skip


@triton.jit
def merge_kernel(
    out, lse, new_out, new_lse,
    out_b, out_s, out_h, out_d, lse_b, lse_h, lse_s,
    new_out_b, new_out_s, new_out_h, new_out_d, new_lse_b, new_lse_h, new_lse_s,
    length, width, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = query < length
    place = lse + row * lse_b + head * lse_h + query * lse_s
    old = tl.load(place, real, other=0.0)
    new = tl.load(new_lse + row * new_lse_b + head * new_lse_h + query * new_lse_s, real, other=0.0)
    largest = tl.maximum(old, new)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    old, new = tl.exp(old - largest), tl.exp(new - largest)
    total = old + new
    tl.store(place, tl.where(total > 0, largest + tl.log(total), float("-inf")), real)
    share = tl.where(total > 0, 1 / total, 0.0)

    channel = tl.arange(0, WIDTH)
    inside = real[:, None] & (channel < width)[None, :]
    ours = out + row * out_b + head * out_h + query[:, None] * out_s + channel[None, :] * out_d
    theirs = new_out + row * new_out_b + head * new_out_h + query[:, None] * new_out_s + channel[None, :] * new_out_d
    merged = tl.load(ours, inside) * (old * share)[:, None] + tl.load(theirs, inside) * (new * share)[:, None]
    tl.store(ours, merged, inside)
