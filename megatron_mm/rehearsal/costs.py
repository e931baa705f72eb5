"""What an operation costs a GPU: its kind, floating-point operations, and bytes to and from memory.

Bytes are those of each input read once and each output written once, which is what a kernel cannot do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    name: str
    kind: str
    flops: int
    bytes: int
    launches: int = 1


def of_operation(
    func: torch._ops.OpOverload, args: tuple, kwargs: dict, out: Any, tensors: Sequence, outs: Sequence
) -> Cost:
    """The cost of one of torch's own operations on the device, which is no view."""
    name = func._schema.name.removeprefix("aten::")
    size = sum(map(nbytes, [*tensors, *outs]))
    if name.removesuffix("_") in _PRODUCTS:
        a, b = tensors[1:3] if "add" in name else tensors[:2]
        return Cost(name, "product", 2 * a.numel() * b.shape[-1], size)
    if count := flop_registry.get(func._overloadpacket):
        kind = "attention" if "attention" in name else "product"
        return Cost(name, kind, count(*args, **kwargs, out_val=out), size)
    return Cost(name, _kind(name), 0, size)


def _kind(name: str) -> str:
    if name.startswith(("_fused_adam", "_foreach")):
        return "optimizer"
    if name in _COPIES or name.startswith(("index", "scatter", "gather", "new_", "zero", "fill", "full", "one")):
        return "copy"
    if any(part in name for part in _REDUCTIONS):
        return "reduction"
    return "elementwise"


_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "_grouped_mm"}
_REDUCTIONS = ("sum", "norm", "softmax", "mean", "max", "min", "topk", "sort", "all", "any")
_COPIES = {"copy_", "_to_copy", "clone", "cat", "stack", "embedding", "embedding_dense_backward", "constant_pad_nd",
           "select_backward", "slice_backward", "arange", "roll"}  # fmt: skip


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes that reading or writing the tensor moves: an expanded one is read once."""
    size = tensor.element_size()
    for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= extent if stride != 0 else min(extent, 1)
    return size
