"""Attention under an interval mask: allowed(q, k) = lo[q] <= k < hi[q] and q < until[k]."""

from mm_kernels.span_attention.reference import span_attention_reference

__all__ = ["span_attention_reference"]
