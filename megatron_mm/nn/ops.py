"""What a family may ask of the parallel layer: the vocabulary-sized parts, which tensor parallelism shards.

A family builds its front and back from these and from ordinary torch modules; it never sees a process group.
`megatron_mm.parallel` implements the protocol on megatron-core.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn


class VocabHead(Protocol):
    """A torch module: hidden states [..., D] to this rank's share of the logits [..., V / TP]."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cross-entropy, log Z), each fp32 (fp64 for fp64 weights) [...], exact over the whole vocabulary.

        `labels` int64 [...]; where a label is `IGNORE` both results are exactly 0 and give no gradient. The logits of
        all positions never exist at once.
        """
        ...


class ParallelOps(Protocol):
    """Factory of the vocabulary-parallel modules."""

    def vocab_embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """Module mapping tokens int64 [...] to embeddings [..., hidden_size], the full width on every rank."""
        ...

    def vocab_head(self, hidden_size: int, vocab_size: int, bias: bool = False) -> VocabHead:
        """The output layer, with a bias for each entry if asked for."""
        ...

    def gather_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The full logits [..., V] from every rank's share; for sampling, without gradient."""
        ...
