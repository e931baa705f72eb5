"""The two primitives as operators of torch: the device decides which implementation runs.

Registered with the dispatcher, they have a shape-only version too: a whole training step can be counted on the meta
device.
"""

from __future__ import annotations

import torch

from mm_kernels.vocab_loss import reference

try:
    from mm_kernels.vocab_loss import fused
except ImportError:  # torch's builds for CPUs come without Triton
    fused = None

row_statistics = torch.library.custom_op(
    "mm_kernels::row_statistics", reference.row_statistics, mutates_args=(), device_types="cpu"
)
logit_gradient_ = torch.library.custom_op(
    "mm_kernels::logit_gradient_", reference.logit_gradient_, mutates_args=("logits",), device_types="cpu"
)
if fused is not None:
    row_statistics.register_kernel("cuda", fused.row_statistics)
    logit_gradient_.register_kernel("cuda", fused.logit_gradient_)


@row_statistics.register_fake
def _(logits, labels, first, real):
    precise = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(len(logits), dtype=precise), logits.new_empty(len(logits), dtype=precise)
