"""What is measured beside each other: configurations of ours, and other attention in the place of ours.

A peer replaces `attend` of every `SpanAttention`; all else in the step stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.profiler import record_function

from megatron_mm.benchmark.profiling import ATTENTION
from megatron_mm.nn.attention import Attention
from megatron_mm.parallel.attention import SpanAttention
from megatron_mm.parallel.context.shard import Shard
from megatron_mm.types import PackedBatch


class FlexAttention:
    """torch's FlexAttention, compiled and tuned on CUDA, under the same predicate.

    Its block mask is built once a micro-batch, before the layers. The predicate reads the mask from buffers, so that it
    stays one function, which the compiler need not compile anew.
    """

    def __init__(self, mask_rows: int) -> None:
        self._mask_rows = mask_rows
        self._mask: torch.Tensor | None = None
        self._seen: Callable[..., torch.Tensor] | None = None
        self._blocks: BlockMask | None = None
        self._attend, self._build = flex_attention, create_block_mask
        if torch.cuda.is_available():
            self._attend = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
            self._build = torch.compile(create_block_mask, dynamic=False)

    def prepare(self, batch: PackedBatch | Shard) -> None:
        """Builds the block mask of a batch, on its device."""
        with record_function(ATTENTION):
            mask = batch.mask[:, : self._mask_rows]
            if self._mask is None:
                self._mask = torch.empty_like(mask)
                self._seen = _predicate(*self._mask.unbind(1))
            rows, _, length = self._mask.copy_(mask).shape
            self._blocks = self._build(self._seen, rows, None, length, length, device=mask.device)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        return self._attend(q, k, v, block_mask=self._blocks, enable_gqa=grouped).transpose(1, 2)


def _predicate(lo: torch.Tensor, hi: torch.Tensor, until: torch.Tensor | None = None) -> Callable[..., torch.Tensor]:
    def within(b, h, q, k):
        return (lo[b, q] <= k) & (k < hi[b, q])

    def seen(b, h, q, k):
        return within(b, h, q, k) & (q < until[b, k])

    return within if until is None else seen


class CausalAttention:
    """torch's attention as if each row were one causal document: no mask at all, and another model."""

    def __init__(self, mask_rows: int) -> None:
        pass

    def prepare(self, batch: PackedBatch | Shard) -> None:
        pass

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


@dataclass(frozen=True)
class Variant:
    """`overrides` of the configuration; `peer` makes the attention that replaces ours."""

    name: str
    says: str
    overrides: tuple[str, ...] = ()
    peer: type[FlexAttention] | type[CausalAttention] | None = None

    @property
    def whole_rows(self) -> bool:
        """Whether attention computes every row as one causal document, whatever the batch's mask."""
        return self.peer is CausalAttention


# Those that differ in attention alone stand together: they share one engine.
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("ours", "the configuration as it is"),
        Variant("flex", "compiled FlexAttention, its block mask built once a micro-batch", peer=FlexAttention),
        Variant("flash", "flash-attn, where the mask is packed causal", ("attention.backend=flash",)),
        Variant("dense", "torch SDPA with the mask written out", ("attention.backend=sdpa",)),
        Variant("causal-sdpa", "torch SDPA on one causal document a row: another mask", peer=CausalAttention),
        Variant("eager", "no compiled parts", ("fusion.elementwise=eager",)),
        Variant("liger-norm", "RMSNorm by Liger", ("fusion.rms_norm=liger",)),
        Variant("recompute-selective", "attention recomputed", ("parallel.recompute_granularity=selective",)),
        Variant("recompute-full", "layers recomputed", ("parallel.recompute_granularity=full",)),
    )
}


@contextmanager
def attending(model: nn.Module, attend: Attention | FlexAttention | CausalAttention) -> Iterator[None]:
    """Every attention layer of `model`, a `StageModel`, computes by `attend`; a peer prepares each batch first."""
    prepare = getattr(attend, "prepare", None)
    hook = model.register_forward_pre_hook(lambda _, inputs: prepare(inputs[0].shard)) if prepare else None
    layers = [layer for layer in model.modules() if isinstance(layer, SpanAttention)]
    before = [layer.attend for layer in layers]
    for layer in layers:
        layer.attend = attend
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.attend = own
        if hook:
            hook.remove()
