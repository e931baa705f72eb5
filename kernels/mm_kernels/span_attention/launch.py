"""From tensors to kernel launches: descriptors, grids, and the order in which tiles run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from mm_kernels.span_attention.backward import PAD, dkv_kernel, dq_kernel, prepare_kernel
from mm_kernels.span_attention.configs import TileConfig, padded_head_dim
from mm_kernels.span_attention.forward import forward_kernel

L2_SHARE = 32 * 2**20
"""Bytes of keys and values that programs running at the same time may want to find in L2 (50 MiB on an H100, 60 on an
H200, shared with everything else)."""


@dataclass(frozen=True)
class Problem:
    """What every launch of one attention call shares. See `op.span_attention` for the tensors."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor
    until: torch.Tensor | None
    scale: float

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, S, K, H, G."""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1], self.q.shape[2], self.k.shape[2]

    @property
    def lo(self) -> torch.Tensor:
        return self.mask[:, 0]

    @property
    def hi(self) -> torch.Tensor:
        return self.mask[:, 1]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def scale_log2(self) -> float:
        return self.scale * math.log2(math.e)

    @property
    def strides(self) -> dict[str, int]:
        return {"mask_stride": self.mask.stride(0), "until_stride": 0 if self.until is None else self.until.stride(0)}

    @property
    def constants(self) -> dict[str, object]:
        """Compile-time arguments: kernels are compiled once for each of their combinations, never for a length."""
        return {
            "BLOCK_D": padded_head_dim(self.head_dim),
            "PRECISION": "tf32x3" if self.q.dtype == torch.float32 else "tf32",
        }


def forward(problem: Problem, out: torch.Tensor, lse: torch.Tensor, config: TileConfig) -> None:
    """Writes out [B, S, H, D] and lse fp32 [B, H, S]."""
    batch, queries, keys, heads, groups = problem.sizes
    tiles = triton.cdiv(queries, config.block_q)
    q, o = (_descriptor(t, config.block_q) for t in (problem.q, out))
    k, v = (_descriptor(t, config.block_k) for t in (problem.k, problem.v))
    forward_kernel[(tiles * heads * batch,)](
        q, k, v, o, lse, problem.lo, problem.hi, _or_mask(problem),
        queries=queries, keys=keys, heads=heads, heads_per_wave=_heads_per_wave(heads, heads // groups, problem.k),
        **problem.strides, scale_log2=problem.scale_log2, GROUP=heads // groups, HAS_UNTIL=problem.until is not None,
        BLOCK_Q=config.block_q, BLOCK_K=config.block_k, **problem.constants,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def prepare(
    problem: Problem,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What both passes need: the row sums fp32 [B, H, 2, PAD + S] and the transposed mask int32 [2, B, K]."""
    batch, queries, keys, heads, _ = problem.sizes
    sums = lse.new_empty(batch, heads, 2, PAD.value + queries)
    transposed = problem.mask.new_empty(2, batch, keys)
    o, do = (_descriptor(t, PAD.value) for t in (out, dout))
    prepare_kernel[(triton.cdiv(max(queries, keys), PAD.value), heads, batch)](
        o, do, lse, lse if dlse is None else dlse, sums, problem.lo, problem.hi, _or_mask(problem), *transposed,
        queries=queries, keys=keys, heads=heads, **problem.strides, search_steps=queries.bit_length(),
        HAS_DLSE=dlse is not None, HAS_UNTIL=problem.until is not None,
        BLOCK_D=padded_head_dim(problem.head_dim),
    )  # fmt: skip
    return sums, transposed


def dq(
    problem: Problem,
    dout: torch.Tensor,
    sums: torch.Tensor,
    grad: torch.Tensor,
    config: TileConfig,
) -> None:
    """Writes grad [B, S, H, D], the gradient of the queries."""
    batch, queries, keys, heads, groups = problem.sizes
    tiles = triton.cdiv(queries, config.block_q)
    q, do, out = (_descriptor(t, config.block_q) for t in (problem.q, dout, grad))
    k, v = (_descriptor(t, config.block_k) for t in (problem.k, problem.v))
    dq_kernel[(tiles * heads * batch,)](
        q, k, v, do, out, sums, problem.lo, problem.hi, _or_mask(problem),
        queries=queries, keys=keys, heads=heads, heads_per_wave=_heads_per_wave(heads, heads // groups, problem.k),
        **problem.strides, scale=problem.scale, scale_log2=problem.scale_log2,
        GROUP=heads // groups, HAS_UNTIL=problem.until is not None,
        BLOCK_Q=config.block_q, BLOCK_K=config.block_k, **problem.constants,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def dkv(
    problem: Problem,
    dout: torch.Tensor,
    sums: torch.Tensor,
    transposed: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor],
    config: TileConfig,
) -> None:
    """Writes grads, both [B, K, G, D], the gradients of keys and values."""
    batch, queries, keys, heads, groups = problem.sizes
    tiles = triton.cdiv(keys, config.block_k)
    q, do = (_descriptor(t, config.block_q) for t in (problem.q, dout))
    k, v, dk, dv = (_descriptor(t, config.block_k) for t in (problem.k, problem.v, *grads))
    dkv_kernel[(tiles * groups * batch,)](
        q, k, v, do, dk, dv, sums, *transposed,
        queries=queries, keys=keys, heads=heads, kv_heads=groups,
        heads_per_wave=_heads_per_wave(groups, 1, problem.q, heads // groups),
        scale=problem.scale, scale_log2=problem.scale_log2, GROUP=heads // groups,
        BLOCK_Q=config.block_q, BLOCK_K=config.block_k, **problem.constants,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _descriptor(tensor: torch.Tensor, block: int) -> TensorDescriptor:
    """Tiles of `block` positions of one head of [B, S, H, D], as [B, H, S, D]: where the leading sizes of a tile are 1,
    Triton reads it as a matrix, straight into shared memory. Beyond the tensor's ends reads give zeros."""
    view = tensor.transpose(1, 2)
    strides = [stride if size > 1 else view.shape[-1] for size, stride in zip(view.shape, view.stride(), strict=True)]
    return TensorDescriptor(view, list(view.shape), strides, [1, 1, block, padded_head_dim(view.shape[-1])])


def _or_mask(problem: Problem) -> torch.Tensor:
    """`until`, or any pointer where there is none."""
    return problem.mask if problem.until is None else problem.until


def _heads_per_wave(heads: int, sharing: int, walked: torch.Tensor, tensors: int = 1) -> int:
    """How many heads go through their tiles together: a divisor of `heads`, as many as L2 holds the walked side of.

    `sharing` heads walk the same tensors [B, S, heads / sharing, D], of which there are two for each of `tensors`.
    """
    head_bytes = 2 * tensors * walked.shape[1] * walked.shape[3] * walked.element_size()
    fit = max(1, L2_SHARE // head_bytes) * sharing
    return max(n for n in range(1, min(heads, fit) + 1) if heads % n == 0)
