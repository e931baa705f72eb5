"""Cross-entropy and log Z of a linear layer over a large, possibly sharded vocabulary, without its logits."""

from mm_kernels.vocab_loss.linear import linear_cross_entropy
from mm_kernels.vocab_loss.op import logit_gradient_, row_statistics
from mm_kernels.vocab_loss.reference import IGNORE

__all__ = ["IGNORE", "linear_cross_entropy", "logit_gradient_", "row_statistics"]
