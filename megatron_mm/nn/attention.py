"""Which attention computes the interval mask: one function a backend, and the choice between them.

Every backend maps q [B, S, H, Dh], k and v [B, S, G, Dh] and the mask int32 [B, 3, S] to out [B, S, H, Dh].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from mm_kernels.span_attention.reference import span_attention_reference

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def select(name: str, device: torch.device, dtype: torch.dtype, causal: bool) -> tuple[str, str]:
    """The backend to run and why.

    `causal` says that the family's mask is plain packed-causal, the only one that flash-attn can express.

    Raises:
        ValueError: the named backend cannot run here.
    """
    half_on_cuda = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    flash_installed = importlib.util.find_spec("flash_attn") is not None
    if name == "flash":
        for ok, why in [
            (causal, "this family's mask is not plain causal"),
            (half_on_cuda, "it needs CUDA and bf16"),
            (flash_installed, "the flash-attn package is not installed (pip install megatron_mm[flash])"),
        ]:
            if not ok:
                raise ValueError(f"attention.backend=flash cannot run: {why}. Use attention.backend=auto.")
    if name != "auto":
        return name, "asked for"
    if causal and half_on_cuda and flash_installed:
        return "flash", "the mask is plain packed-causal and flash-attn is installed"
    if device.type == "cuda":
        return "sdpa", "no fused kernel takes this mask here"
    return "reference", "CPU: plain torch over the mask's intervals"


def dense_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """torch SDPA with the mask expanded to [B, 1, S, S]: needs no host synchronisation, costs O(S^2) memory."""
    lo, hi, until = mask[:, :, :, None].unbind(1)  # [B, S, 1] as rows
    key = torch.arange(k.shape[1], device=q.device, dtype=mask.dtype)
    allowed = (lo <= key) & (key < hi)
    allowed &= torch.arange(q.shape[1], device=q.device, dtype=mask.dtype)[:, None] < until.transpose(1, 2)
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


BACKENDS: dict[str, Attention] = {
    "reference": span_attention_reference,
    "sdpa": dense_sdpa,
    "flash": packed_flash,
}
