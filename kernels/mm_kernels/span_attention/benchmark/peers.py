"""Who is measured: every implementation as one call of the same tensors, and where it can express the mask.

A peer gets a `Case` and returns its call, () -> out, and the tensors to differentiate for; or None where it cannot
express the mask; or raises `Unavailable` where its package or the GPU is missing. All share q, k, v [B, S, H, D]; peers
that want another layout get theirs made before the clock starts, and so does what they need to know of the mask, whose
making `MASK_BUILDERS` times by itself.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mm_kernels.span_attention.benchmark.distributions import area, documents, mask
from mm_kernels.span_attention.reference import span_attention_reference

if importlib.util.find_spec("triton") is not None:  # a CPU installation may lack it
    from mm_kernels.span_attention.op import span_attention

HOPPER_BLACKWELL = (9, 10)


@dataclass(frozen=True)
class Case:
    """One measured problem: `batch` rows of `length` positions under a named mask."""

    distribution: str
    length: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def intervals(self) -> np.ndarray:
        """int32 [B, 2, S]."""
        return np.stack([mask(self.distribution, self.length, row) for row in range(self.batch)])

    @cached_property
    def mask(self) -> torch.Tensor:
        return torch.from_numpy(self.intervals).to(self.device)

    @cached_property
    def qkv(self) -> tuple[torch.Tensor, ...]:
        """q, k, v with gradients and dout, [B, S, heads, head_dim]."""
        generator = torch.Generator(self.device).manual_seed(0)
        shapes = [(self.batch, self.length, heads, self.head_dim) for heads in (self.heads, *[self.kv_heads] * 2)]
        make = lambda shape: torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)  # noqa: E731
        return *(make(shape).requires_grad_() for shape in shapes), make(shapes[0])

    @property
    def forward_flops(self) -> float:
        """4 * (allowed pairs) * heads * head_dim; backward counts 2.5 times as much."""
        return 4.0 * sum(area(row) for row in self.intervals) * self.heads * self.head_dim

    @cached_property
    def cu_seqlens(self) -> tuple[torch.Tensor, int]:
        """Documents of all rows laid end to end, int32 [documents + 1], and the longest."""
        ends = np.concatenate([documents(row)[1:] + i * self.length for i, row in enumerate(self.intervals)])
        bounds = np.append(0, ends).astype(np.int32)
        return torch.from_numpy(bounds).to(self.device), int(np.diff(bounds).max())

    @property
    def causal(self) -> bool | None:
        """Whether documents are causal (True) or bidirectional (False) as a whole; None if neither."""
        return {"full": False, "mmada": False, "causal": True, "docs": True}.get(self.distribution)

    def heads_first(self) -> tuple[torch.Tensor, ...]:
        """q, k, v as dense [B, heads, S, head_dim], with gradients of their own."""
        return tuple(t.detach().transpose(1, 2).contiguous().requires_grad_() for t in self.qkv[:3])


Call = Callable[[], torch.Tensor]
Peer = Callable[[Case], tuple[Call, tuple[torch.Tensor, ...]] | None]


class Unavailable(Exception):
    """Says what a peer needs that is not here."""


def need(case: Case, package: str = "", capabilities: tuple[int, ...] = ()) -> None:
    """Raises `Unavailable` unless the case is on a GPU of one of the major `capabilities` and `package` is there."""
    if case.device.type != "cuda":
        raise Unavailable("needs CUDA")
    if capabilities and torch.cuda.get_device_capability(case.device)[0] not in capabilities:
        raise Unavailable(f"needs compute capability {' or '.join(map(str, capabilities))}")
    try:
        found = not package or importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise Unavailable(f"{package} is not installed")


def span(case: Case) -> tuple[Call, tuple[torch.Tensor, ...]] | None:
    """Ours."""
    need(case, "triton")
    q, k, v, _ = case.qkv
    return lambda: span_attention(q, k, v, case.mask)[0], (q, k, v)


def reference(case: Case) -> tuple[Call, tuple[torch.Tensor, ...]] | None:
    """Ours in plain torch: what a CPU runs."""
    if case.device.type == "cuda":
        return None  # the span kernel stands for it
    q, k, v, _ = case.qkv
    return lambda: span_attention_reference(q, k, v, case.mask), (q, k, v)


def flex(backend: str) -> Peer:
    """torch's FlexAttention, compiled, with the same predicate, by Triton or ("FLASH") by FlashAttention-4."""

    def make(case: Case) -> tuple[Call, tuple[torch.Tensor, ...]] | None:
        need(case, *(("flash_attn.cute", HOPPER_BLACKWELL) if backend == "FLASH" else ("triton",)))
        q, k, v = case.heads_first()
        blocks = block_mask(case)() if backend == "TRITON" else flash_block_mask(case)()
        options = {"block_mask": blocks, "enable_gqa": case.heads != case.kv_heads}
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(q, k, v, **options, kernel_options={"BACKEND": backend}), (q, k, v)

    return make


def block_mask(case: Case, block_q: int = 128) -> Callable[[], BlockMask]:
    """What FlexAttention needs anew for every batch of packed documents."""
    lo, hi = case.mask.unbind(1)
    predicate = lambda b, h, i, j: (lo[b, i] <= j) & (j < hi[b, i])  # noqa: E731
    build = torch.compile(create_block_mask, dynamic=False) if case.device.type == "cuda" else create_block_mask
    shape = (case.batch, None, case.length, case.length)
    return lambda: build(predicate, *shape, device=case.device.type, BLOCK_SIZE=(block_q, 128))


def flash_block_mask(case: Case) -> Callable[[], BlockMask]:
    """The same for FlashAttention-4, whose programs take 256 queries on Blackwell."""
    return block_mask(case, 256 if torch.cuda.get_device_capability(case.device)[0] >= 10 else 128)


def flash4(case: Case) -> tuple[Call, tuple[torch.Tensor, ...]] | None:
    """FlashAttention-4 over lists of the mask's blocks, with our predicate in the others."""
    need(case, "flash_attn.cute", HOPPER_BLACKWELL)
    attend = importlib.import_module("mm_kernels.span_attention.flash4").attend
    q, k, v, _ = case.qkv
    known = flash4_plan(case)()
    return lambda: attend(q, k, v, case.mask, known), (q, k, v)


def flash4_plan(case: Case) -> Callable[[], object]:
    """The lists of blocks."""
    plan = importlib.import_module("mm_kernels.span_attention.flash4").plan
    return lambda: plan(case.mask, torch.cuda.get_device_capability(case.device)[0])


def cudnn_flex(case: Case) -> tuple[Call, tuple[torch.Tensor, ...]] | None:
    """cudnn-frontend's attention under masks of intervals."""
    need(case, "cudnn.flex_attention", HOPPER_BLACKWELL)
    attend = importlib.import_module("cudnn.flex_attention").flex_attn_func
    q, k, v, _ = case.qkv
    known = cudnn_plan(case)()
    return lambda: attend(q, k, v, mask_plan=known), (q, k, v)


def cudnn_plan(case: Case) -> Callable[[], object]:
    """Its plan of a mask: of each query the ends of visible intervals, [0, first) and [lo, hi), of which the first is
    empty."""
    create = importlib.import_module("cudnn.flex_attention").create_mask_plan
    lo, hi = case.mask.unbind(1)
    ends = torch.stack([torch.zeros_like(lo), lo, hi]).flatten(1)[None]  # [1, 3, B * S]
    return lambda: create(ends, *case.qkv[:3])


def sdpa(backend: SDPBackend) -> Peer:
    """torch's attention by one of its backends: a whole row, causal or not."""

    def make(case: Case) -> tuple[Call, tuple[torch.Tensor, ...]] | None:
        if case.distribution not in ("full", "causal"):
            return None
        need(case)
        q, k, v = case.heads_first()
        grouped = case.heads != case.kv_heads

        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=bool(case.causal), enable_gqa=grouped)

        return call, (q, k, v)

    return make


def dense(case: Case) -> tuple[Call, tuple[torch.Tensor, ...]] | None:
    """torch's attention with the mask written out, S x S: what a CPU user would do without us."""
    if case.length > 4096:
        return None
    q, k, v = case.heads_first()
    lo, hi = case.mask[..., None].unbind(1)
    key = torch.arange(case.length, device=case.device)
    allowed = ((lo <= key) & (key < hi))[:, None]
    grouped = case.heads != case.kv_heads
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=grouped), (q, k, v)


def varlen(module: str, function: str) -> Peer:
    """flash-attn's packed documents, causal or bidirectional as a whole; of whichever package `module` names."""

    def make(case: Case) -> tuple[Call, tuple[torch.Tensor, ...]] | None:
        if case.causal is None:
            return None
        need(case, module)
        attend = getattr(importlib.import_module(module), function)
        q, k, v = (t.detach().flatten(0, 1).requires_grad_() for t in case.qkv[:3])
        cu, longest = case.cu_seqlens
        sizes = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}

        def call() -> torch.Tensor:
            out = attend(q, k, v, **sizes, causal=case.causal)
            return out[0] if isinstance(out, tuple) else out

        return call, (q, k, v)

    return make


PEERS: dict[str, Peer] = {
    "span": span,
    "reference": reference,
    "flex": flex("TRITON"),
    "flex-flash": flex("FLASH"),
    "sdpa-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa-flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-dense": dense,
    "flash-attn-2": varlen("flash_attn", "flash_attn_varlen_func"),
    "flash-attn-3": varlen("flash_attn_interface", "flash_attn_varlen_func"),
    "flash-attn-4": varlen("flash_attn.cute.interface", "flash_attn_varlen_func"),
    "flash-attn-4-blocks": flash4,
    "cudnn-flex": cudnn_flex,
}

OURS = ("span", "reference")

MASK_BUILDERS: dict[str, Callable[[Case], Callable[[], object]]] = {
    "flex": block_mask,
    "flex-flash": flash_block_mask,
    "flash-attn-4-blocks": flash4_plan,
    "cudnn-flex": cudnn_plan,
}
"""What a peer makes of a mask before it can run: () -> what it makes."""
