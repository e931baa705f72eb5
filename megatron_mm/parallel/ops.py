"""`nn.ops.ParallelOps` on megatron-core: vocabulary-parallel embedding, head with its loss, layers behind the trunk."""

from __future__ import annotations

import copy

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import nn

from megatron_mm.config.model import TrunkConfig
from megatron_mm.nn.ops import Frequencies
from megatron_mm.parallel.modulated import ModulatedLayers
from megatron_mm.parallel.transformer_config import TrunkTransformerConfig
from megatron_mm.parallel.vocab_loss import vocab_parallel_linear_cross_entropy

VOCAB_DIVISOR = 128
"""Vocabularies are padded to this multiple under every layout, so that checkpoints do not depend on the layout."""


def padded_vocab_size(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_DIVISOR) * VOCAB_DIVISOR


class MegatronOps:
    """Makes the sharded parts of a family's front and back.

    Sequence parallelism stays in the trunk: front and back see whole sequences on every tensor-parallel rank, so their
    replicated parameters get whole gradients.
    """

    def __init__(self, config: TrunkTransformerConfig):
        self._config = copy.copy(config)
        self._config.sequence_parallel = False

    def vocab_embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        return VocabParallelEmbedding(
            padded_vocab_size(vocab_size), hidden_size, init_method=self._config.init_method, config=self._config
        )

    def vocab_head(self, hidden_size: int, vocab_size: int, bias: bool = False) -> VocabParallelHead:
        return VocabParallelHead(self._config, hidden_size, vocab_size, bias)

    def modulated_layers(self, layers: TrunkConfig, frequencies: Frequencies) -> ModulatedLayers:
        return ModulatedLayers(self._config, layers, frequencies)

    def gather_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return gather_from_tensor_model_parallel_region(logits)


class VocabParallelHead(ColumnParallelLinear):
    """Output layer whose padding entries never take part: their logits are the dtype's lowest value."""

    def __init__(self, config: TrunkTransformerConfig, hidden_size: int, vocab_size: int, bias: bool):
        super().__init__(
            hidden_size, padded_vocab_size(vocab_size), config=config, init_method=config.init_method, bias=bias
        )
        self._vocab_size = vocab_size

    def cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # A call of the module: megatron-core's DDP awaits a gathered weight in a hook before its module's forward.
        return self(hidden, labels)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None):
        """The logits, or with labels what `cross_entropy` returns."""
        if labels is not None:
            return vocab_parallel_linear_cross_entropy(
                hidden, self.weight, labels, self._vocab_size, self.tp_group, bias=self.bias
            )
        logits, _ = super().forward(hidden)
        real = self._vocab_size - self.tp_group.rank() * logits.shape[-1]
        if real < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= real
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        return logits
