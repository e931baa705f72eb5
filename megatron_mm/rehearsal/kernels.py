"""Our Triton kernels on the meta device: every launch is counted in place of being made, with what it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from mm_kernels.span_attention import merge
from mm_kernels.span_attention import op as span
from mm_kernels.span_attention.forward import forward_kernel
from mm_kernels.vocab_loss import linear
from mm_kernels.vocab_loss import op as vocab_loss
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_mm.rehearsal.costs import Cost, nbytes
from megatron_mm.rehearsal.errors import RehearsalError
from megatron_mm.rehearsal.recorder import Recorder

OPERATORS = (span.forward, span.backward, vocab_loss.row_statistics, vocab_loss.logit_gradient_)
PRODUCTS = {"forward_kernel": 4, "dq_kernel": 4, "dkv_kernel": 6}
"""FLOPs of a pair, head and channel: together the backward pass has two and a half times the forward pass's, as
published figures count it (it multiplies one product more, which they leave out)."""
IN_PLACE = {"merge_kernel": ("out", "lse"), "gradient_kernel": ("logits_ptr",)}
"""What a kernel both reads and writes."""


class Launches:
    """Counts launches of Triton's kernels. The backward kernels of attention know the pairs from the mask that the
    first of them reads."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._pairs: dict[tuple, tuple[torch.Tensor, int]] = {}
        self._latest = 0

    def __call__(self, kernel: JITFunction, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        name = kernel.fn.__name__
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        tensors = {key: tensor for key, value in given.items() if (tensor := _tensor(value)) is not None}
        moved = sum(map(nbytes, tensors.values()))
        moved += sum(nbytes(tensors[key]) for key in IN_PLACE.get(name, ()))
        if name in PRODUCTS or name == "prepare_kernel":
            if "lo_ptr" in tensors:
                self._latest = self._count_pairs(given, tensors)
            heads, width = given["heads"], tensors["dout_desc" if name == "prepare_kernel" else "q_desc"].shape[-1]
            flops = PRODUCTS.get(name, 0) * self._latest * heads * width
            self._recorder.launch(Cost(name, "attention", flops, moved))
        else:
            self._recorder.launch(Cost(name, "attention" if name == "merge_kernel" else "vocabulary loss", 0, moved))

    def _count_pairs(self, given: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> int:
        """Allowed pairs of all rows; all pairs where the mask was made on the device."""
        lo, hi, until = (self._recorder.host_copy(tensors[f"{name}_ptr"]) for name in ("lo", "hi", "until"))
        queries, keys = given["queries"], given["keys"]
        if lo is None or hi is None or until is None:
            return tensors["lo_ptr"].shape[0] * queries * keys
        if not given["HAS_UNTIL"]:
            until = None
        elif until.dim() == 3:
            until = until[:, 2]
        key = (lo.data_ptr(), queries, keys, until is None)
        if key not in self._pairs:
            rows = zip(lo, hi, [None] * len(lo) if until is None else until, strict=True)
            count = sum(pairs(*(None if row is None else row.numpy() for row in each), keys) for each in rows)
            self._pairs[key] = lo, count  # the mask is kept, or another one could come to lie where it was
        return self._pairs[key][1]


def pairs(lo: np.ndarray, hi: np.ndarray, until: np.ndarray | None, keys: int) -> int:
    """Allowed (query, key) pairs of one row: `mask.area` where keys and queries need not be the same positions."""
    key = np.arange(keys)
    first = np.searchsorted(hi, key, side="right")
    end = np.searchsorted(lo, key, side="right")
    if until is not None:
        end = np.minimum(end, until)
    return int(np.maximum(end - first, 0).sum())


def _tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, TensorDescriptor):
        return value.base
    return value if isinstance(value, torch.Tensor) else None


@contextlib.contextmanager
def counted_kernels(recorder: Recorder) -> Iterator[None]:
    """Our operators run as on CUDA in here, up to the launches of their kernels.

    Raises:
        RehearsalError: Triton interprets kernels in this process.
    """
    if not isinstance(forward_kernel, JITFunction):
        raise RehearsalError("TRITON_INTERPRET=1 is set, so there are no compiled kernels to count: unset it.")
    launches = Launches(recorder)
    recorder.replace({operator._qualname: _body(operator, "cuda") for operator in OPERATORS})
    with patch.object(JITFunction, "run", lambda kernel, *args, **kwargs: launches(kernel, *args, **kwargs)):
        yield


@contextlib.contextmanager
def cpu_operators(recorder: Recorder) -> Iterator[None]:
    """Our operators run as on a CPU in here, where they are torch's own operations."""
    recorder.replace({operator._qualname: _body(operator, "cpu") for operator in OPERATORS})
    with (
        patch.object(linear, "CHUNK_BYTES", linear.CPU_CHUNK_BYTES),
        patch.object(merge, "merge_fused", None),
    ):
        yield


def _body(operator: torch.library.CustomOpDef, device: str) -> Callable[..., object]:
    """What an operator of ours runs on a device."""
    return operator._backend_fns.get(device, operator._init_fn)
