"""Which attention computes the interval mask: one function a backend, and the choice between them.

Every backend maps q [B, S, H, Dh], k and v [B, S, G, Dh] and a mask int32 [B, 3, S], or [B, 2, S] where no key is
hidden, to out [B, S, H, Dh].
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from mm_kernels.span_attention import reference

TRITON = importlib.util.find_spec("triton") is not None
if TRITON:
    from mm_kernels.span_attention import op

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
HALF = (torch.bfloat16, torch.float16)


def select(
    name: str, device: torch.device, dtype: torch.dtype, causal: bool, head_dim: int, spread: bool = False
) -> tuple[str, str]:
    """The backend to run and why.

    `causal` says that the family's mask is plain packed-causal, the only one that flash-attn can express; `spread` that
    keys are spread over ranks, so that it must be one of PARTIAL_BACKENDS.

    Raises:
        ValueError: the named backend cannot run here.
    """
    if name == "auto":
        if device.type == "cpu":
            return "reference", "CPU: plain torch over the mask's intervals"
        problem = _obstacle("span", device, dtype, causal, head_dim)
        if problem is None and dtype in HALF:
            return "span", "CUDA in half precision: the fused span-mask kernel"
        if spread:
            return "reference", f"context parallelism: {problem or f'{dtype} is slow in the span kernel'}"
        return (
            "sdpa",
            f"the span kernel cannot run: {problem}" if problem else f"{dtype} is faster in torch's attention",
        )
    problem = _obstacle(name, device, dtype, causal, head_dim)
    if problem is not None:
        raise ValueError(f"attention.backend={name} cannot run: {problem}. Use attention.backend=auto.")
    return name, "asked for"


def _has_flash4() -> bool:
    return (
        importlib.util.find_spec("flash_attn") is not None and importlib.util.find_spec("flash_attn.cute") is not None
    )


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, causal: bool, head_dim: int) -> str | None:
    """Why the backend cannot run here, if it cannot."""
    cuda = device.type != "cpu"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    hopper_or_blackwell = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] in (9, 10)
    conditions = {
        "span": [
            (TRITON, "the triton package is not installed"),
            (cuda or interpreted, "it needs CUDA (TRITON_INTERPRET=1 runs it, slowly, on a CPU)"),
            (dtype in (*HALF, torch.float32), f"it has no kernel for {dtype}"),
            (head_dim % 8 == 0 and head_dim <= 256, f"a head dimension of {head_dim} is not a multiple of 8 up to 256"),
        ],
        "flash": [
            (causal, "this family's mask is not plain causal"),
            (cuda and dtype in HALF, "it needs CUDA and bf16"),
            (
                importlib.util.find_spec("flash_attn") is not None,
                "the flash-attn package is not installed (pip install megatron_mm[flash])",
            ),
        ],
        "fa4": [
            (cuda and dtype in HALF, "it needs CUDA and bf16 or fp16"),
            (head_dim % 8 == 0 and head_dim <= 128, f"a head dimension of {head_dim} is not a multiple of 8 up to 128"),
            (hopper_or_blackwell, "it needs a GPU of compute capability 9 or 10 (Hopper, Blackwell)"),
            (_has_flash4(), "the flash-attn-4 package is not installed (pip install --pre flash-attn-4)"),
        ],
    }
    return next((why for fulfilled, why in conditions.get(name, []) if not fulfilled), None)


def fused_span(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Our Triton kernel, which walks only the keys that the mask allows."""
    return op.span_attention(q, k, v, mask)[0]


def dense_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """torch SDPA with the mask expanded to [B, 1, S, S]: needs no host synchronisation, costs O(S^2) memory."""
    lo, hi = mask[:, :2, :, None].unbind(1)  # [B, S, 1] as rows
    key = torch.arange(k.shape[1], device=q.device, dtype=mask.dtype)
    allowed = (lo <= key) & (key < hi)
    if mask.shape[1] == 3:
        allowed &= torch.arange(q.shape[1], device=q.device, dtype=mask.dtype)[:, None] < mask[:, 2, None]
    live = allowed.any(-1, keepdim=True)  # [B, S, 1]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=(allowed | ~live)[:, None],
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    return torch.where(live[..., None], out, 0.0)


def packed_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """flash-attn's varlen kernel over the documents of a plain packed-causal mask. Padding is a document per token,
    whose output is cleared."""
    from flash_attn import flash_attn_varlen_func  # an optional dependency, present only on CUDA machines

    batch, length = q.shape[:2]
    lo, hi = mask[:, 0].flatten(), mask[:, 1].flatten()
    row = torch.arange(batch * length, device=q.device, dtype=torch.int32)
    live = hi > lo
    starts = torch.cat([torch.where(~live | (row % length == lo), row, -1), row.new_full((1,), batch * length)])
    cu_seqlens = starts[starts >= 0]
    out = flash_attn_varlen_func(
        *(t.flatten(0, 1) for t in (q, k, v)), cu_seqlens, cu_seqlens, length, length, causal=True
    )
    return torch.where(live[:, None, None], out, 0.0).view_as(q)


def block_sparse_flash4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """FlashAttention-4, which walks lists of the mask's blocks."""
    from mm_kernels.span_attention import flash4  # needs an optional dependency, present only on CUDA machines

    return flash4.attend(q, k, v, mask)


BACKENDS: dict[str, Attention] = {
    "span": fused_span,
    "reference": reference.span_attention_reference,
    "sdpa": dense_sdpa,
    "flash": packed_flash,
    "fa4": block_sparse_flash4,
}

PARTIAL_BACKENDS = {"reference": reference} | ({"span": op} if TRITON else {})
"""Those that also compute attention over some of the keys, for context parallelism: modules with the functions
`forward`, which returns (out, log-sum-exp), and `backward`."""
