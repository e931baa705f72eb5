"""Blockwise feed-forward (arXiv 2305.19370): its activations exist for some positions at a time."""

from __future__ import annotations

import torch
from megatron.core.transformer.mlp import MLP
from torch.utils.checkpoint import checkpoint

from megatron_mm.parallel.transformer_config import TrunkTransformerConfig


class BlockwiseMLP(MLP):
    """megatron-core's MLP, block after block of `parallel.feed_forward_block` positions, each computed again in the
    backward pass: what lies between the two projections is never kept."""

    config: TrunkTransformerConfig

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output and its bias, as megatron-core's MLP; hidden_states [n, B, D], or [n / TP, B, D] under sequence
        parallelism."""
        block = self.config.feed_forward_block
        if self.config.sequence_parallel:
            block //= self.config.tensor_model_parallel_size
        whole = super().forward
        blocks = [
            checkpoint(lambda x: whole(x, *args, **kwargs)[0], part, use_reentrant=False, preserve_rng_state=False)
            for part in hidden_states.split(block)
        ]
        return torch.cat(blocks), self.linear_fc2.bias
