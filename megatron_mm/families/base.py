"""The seam between a model family and everything else.

A family lists the spans of a document and fills in its images (host side, numpy), embeds a packed batch on the first
pipeline stage, and turns the trunk's output into loss sums on the last one. It imports no engine and no process group:
what must be sharded it asks of `ParallelOps`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import nn

from megatron_mm.config.model import TrunkConfig
from megatron_mm.documents.builder import DocumentFamily
from megatron_mm.nn.ops import Attended, ParallelOps
from megatron_mm.types import PackedBatch

LossSums = dict[str, torch.Tensor]


@runtime_checkable
class FurtherLayers(Protocol):
    """A back with layers of its own behind the trunk, which attend over documents as the trunk does. It reads hidden
    states [B, n, D + E] that end in what these make of the others, and no image as a whole."""

    def further(self, hidden: torch.Tensor, batch: PackedBatch, attended: Attended) -> torch.Tensor:
        """What the layers make of hidden states [B, n, D]: [B, n, E]. `attended` goes to `ops.modulated_layers`."""
        ...


class Family(DocumentFamily, Protocol):
    """What every family provides."""

    name: str

    @property
    def trunk(self) -> TrunkConfig: ...

    def build_front(self, ops: ParallelOps) -> nn.Module:
        """Module: PackedBatch -> embeddings [B, S, D]."""
        ...

    def build_back(self, ops: ParallelOps) -> nn.Module:
        """Module: (hidden [B, S, D] after the final norm, PackedBatch) -> {term name: scalar sum of losses}."""
        ...
