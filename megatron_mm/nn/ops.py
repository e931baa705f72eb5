"""What a family may ask of the parallel layer: what tensor parallelism shards, the vocabulary-sized parts and layers
that attend.

A family builds its front and back from these and from ordinary torch modules; it never sees a process group.
`megatron_mm.parallel` implements the protocol on megatron-core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from megatron_mm.config.model import TrunkConfig


class VocabHead(Protocol):
    """A torch module: hidden states [..., D] to this rank's share of the logits [..., V / TP]."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cross-entropy, log Z), each fp32 (fp64 for fp64 weights) [...], exact over the whole vocabulary.

        `labels` int64 [...]; where a label is `IGNORE` both results are exactly 0 and give no gradient. The logits of
        all positions never exist at once.
        """
        ...


Frequencies = Callable[[torch.device], torch.Tensor]
"""RoPE's angles of one position, float64 [head_dim / 2], on a device."""


class Attended(Protocol):
    """What attention of a micro-batch's part runs over, in the hands of the parallel layer."""

    @property
    def meta(self) -> torch.Tensor:
        """int32 [B, 6, n], see `types.PackedBatch`."""
        ...


@dataclass(frozen=True)
class Conditions:
    """What modulates each position. number int64 [B, n]: which of the K conditions is the position's. vectors [K, D].
    present bool [K]: False of one that leaves its positions as they are."""

    number: torch.Tensor
    vectors: torch.Tensor
    present: torch.Tensor


class ModulatedLayers(Protocol):
    """A torch module: layers that attend over documents, their norms shifted and scaled, and their outputs gated, by
    conditions."""

    def __call__(self, x: torch.Tensor, conditions: Conditions, attended: Attended) -> torch.Tensor:
        """[B, n, D] -> [B, n, D]."""
        ...


class ParallelOps(Protocol):
    """Factory of the modules that tensor parallelism shards."""

    def vocab_embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """Module mapping tokens int64 [...] to embeddings [..., hidden_size], the full width on every rank."""
        ...

    def vocab_head(self, hidden_size: int, vocab_size: int, bias: bool = False) -> VocabHead:
        """The output layer, with a bias for each entry if asked for."""
        ...

    def modulated_layers(self, layers: TrunkConfig, frequencies: Frequencies) -> ModulatedLayers:
        """`layers.num_layers` layers, RMSNorm and SwiGLU, with an RMSNorm of queries and keys that all heads share."""
        ...

    def gather_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The full logits [..., V] from every rank's share; for sampling, without gradient."""
        ...
