"""Attention under an interval mask: allowed(q, k) = lo[q] <= k < hi[q] and q < until[k].

Read `intervals` for the mask's algebra, `tiles` and `forward` for the loops, `op` for the function to call.
"""

from mm_kernels.span_attention.intervals import chunk_mask
from mm_kernels.span_attention.reference import span_attention_reference

__all__ = ["chunk_mask", "span_attention_reference"]
