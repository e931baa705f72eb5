"""Tokens to experts that are all on this rank: sorted by expert, and no number of them read by the host.

megatron-core's dispatchers select by a mask, whose size the host has to learn in every layer, although without drops it
is known: every token has so many experts.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


class LocalDispatcher(MoEAlltoAllTokenDispatcher):
    """megatron-core's dispatcher where no other rank has experts. Sizes: T tokens, D channels, E experts, k of them for
    each token."""

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [n, B, D], routing map bool [T, E], shares [T, E] -> tokens [T * k, D], expert after expert, and their
        shares [T * k]."""
        self.hidden_shape = hidden_states.shape
        chosen = torch.nonzero_static(routing_map.t(), size=len(routing_map) * self.config.moe_router_topk)
        expert, self.token = chosen.unbind(1)
        self.tokens_per_expert = routing_map.sum(0)
        shares = probs.t().reshape(-1).index_select(0, expert * len(routing_map) + self.token)
        return hidden_states.flatten(0, 1).index_select(0, self.token), shares

    def token_dispatch(
        self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return permutated_local_input_tokens, permuted_probs

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Adds how many tokens each expert has, int64 [E] on the device."""
        return global_input_tokens, self.tokens_per_expert, global_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def token_combine(
        self, hidden_states: torch.Tensor, async_finish: bool = True, allocate_on_comm_stream: bool = True
    ) -> torch.Tensor:
        return hidden_states

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """[T * k, D] -> the sum over each token's experts, [n, B, D]."""
        whole = permutated_local_input_tokens.new_zeros(self.hidden_shape).flatten(0, 1)
        return whole.index_add_(0, self.token, permutated_local_input_tokens).view(self.hidden_shape)
