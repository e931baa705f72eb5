"""FlashAttention-4 (CuTe DSL) under our mask: our intervals as its block sparsity and mask function.

Its kernels walk lists of blocks, and ask the mask function in those that are not full. Needs the package flash-attn-4
and a GPU of compute capability 9.0 or 10.0; compiled at first use for each head size, dtype and kind of mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cutlass import Int32, cute  # flash-attn-4's own dependency
from flash_attn.cute import flash_attn_func
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.utils import scalar_to_ssa

from mm_kernels.span_attention.block_lists import BlockLists, block_lists

BLOCK_K = 128


@dataclass(frozen=True)
class Plan:
    """What one mask [B, 2 or 3, S] means to the kernels: its rows, and its blocks for the forward and backward pass."""

    rows: list[torch.Tensor]
    by_query: BlockSparseTensorsTorch
    by_key: BlockSparseTensorsTorch


def plan(mask: torch.Tensor, capability: int) -> Plan:
    """`capability`: the GPU's compute capability, its first number."""
    # On Blackwell a program takes two tiles of queries where there is more than one.
    block_q = 256 if capability >= 10 and mask.shape[2] > 128 else 128
    return Plan(
        [row.contiguous() for row in mask.unbind(1)],
        *(_sparsity(lists, block_q) for lists in block_lists(mask, block_q, BLOCK_K)),
    )


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, known: Plan | None = None
) -> torch.Tensor:
    """The output of `op.span_attention` [B, S, H, D], differentiable, in bf16 or fp16 and for D up to 128.

    `known` is the mask's plan, if there is one already. dq is added up in no fixed order: not the same bits twice.
    """
    known = plan(mask, torch.cuda.get_device_capability(q.device)[0]) if known is None else known
    out, _ = flash_attn_func(
        q, k, v, mask_mod=mask_function(len(known.rows) == 3), aux_tensors=known.rows,
        block_sparse_tensors=known.by_query, block_sparse_tensors_bwd=known.by_key,
    )  # fmt: skip
    return torch.where((mask[:, 0] < mask[:, 1])[..., None, None], out, 0.0)


@functools.cache
def mask_function(hides_keys: bool) -> Callable:
    """The predicate in the kernels' language: indices are vectors of one, `rows` are lo, hi and until, [B, S] each."""

    @cute.jit
    def within(batch, head, query, key, lengths, rows):
        lo = scalar_to_ssa(rows[0][batch[0], query[0]], Int32)
        hi = scalar_to_ssa(rows[1][batch[0], query[0]], Int32)
        return (lo <= key) & (key < hi)

    @cute.jit
    def seen(batch, head, query, key, lengths, rows):
        until = scalar_to_ssa(rows[2][batch[0], key[0]], Int32)
        return within(batch, head, query, key, lengths, rows) & (query < until)

    return seen if hides_keys else within


def _sparsity(lists: BlockLists, block_q: int) -> BlockSparseTensorsTorch:
    return BlockSparseTensorsTorch(
        lists.masked_count, lists.masked, lists.full_count, lists.full, block_size=(block_q, BLOCK_K)
    )
