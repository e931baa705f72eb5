"""The experts of a rank as one product: their weights are one parameter, and where all experts are on the rank, no
number of tokens is read on the host.

Checkpoints are those of experts one after the other: every expert's matrix by its number.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import nn

from megatron_mm.parallel.transformer_config import TrunkTransformerConfig


class ExpertLinear(nn.Module):
    """One matrix of each of a rank's experts: `weight` [experts, out, in], whose rows are those of `parts` matrices (a
    gated layer's two)."""

    def __init__(
        self, config: TrunkTransformerConfig, experts: int, rows: int, columns: int, parts: int, groups: Any
    ) -> None:
        super().__init__()
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = nn.Parameter(torch.empty(experts, rows, columns, **options))
        # An expert's: summed over the ranks that share it, and no other tensor rank holds the same numbers.
        self.weight.allreduce, self.weight.tensor_model_parallel, self.weight.sequence_parallel = False, True, False
        self._parts, self._groups = parts, groups

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """x [T, in], expert after expert, of which each ends before row `ends` int32 [experts] -> [T, out]."""
        return F.grouped_mm(x, self.weight.transpose(1, 2), offs=ends)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """One entry, which is built of a shard for each part of each expert."""
        experts, axis = len(self.weight), len(sharded_offsets)
        first, total = experts * self._groups.ep.rank(), experts * self._groups.ep.size()

        def build(key: str, weight: torch.Tensor, replica: ReplicaId, flattened_range: slice | None) -> list:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    rows,
                    *sharded_offsets,
                    (axis, first + number, total),
                    (axis + 1, part, self._parts),
                    replica_id=replica,
                    prepend_axis_num=axis + 1,
                )
                for number, expert in enumerate(weight.unbind())
                for part, rows in enumerate(expert.chunk(self._parts))
            ]

        def merge(rows: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(rows).view_as(self.weight)

        local, stored = f"{prefix}weight", f"{prefix}weight".replace(".experts.", ".experts.experts.", 1)
        replica = (0, 0, self._groups.expt_dp.rank())
        return {local: ShardedTensorFactory(stored, self.weight, build, merge, replica)}


class GroupedExperts(MegatronModule):
    """The experts of a rank, in one product for each of their two matrices (torch's `grouped_mm`)."""

    config: TrunkTransformerConfig

    def __init__(
        self,
        num_local_experts: int,
        config: TrunkTransformerConfig,
        submodules: object,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        hidden, inner, gated = config.hidden_size, config.moe_ffn_hidden_size, config.gated_linear_unit
        parts = 2 if gated else 1
        self.linear_fc1 = ExpertLinear(config, num_local_experts, parts * inner, hidden, parts, pg_collection)
        self.linear_fc2 = ExpertLinear(config, num_local_experts, hidden, inner, 1, pg_collection)

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, shares: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """tokens [T, D], expert after expert, and their shares [T] -> [T, D]."""
        ends = tokens_per_expert.to(tokens.device, non_blocking=True).cumsum(0).to(torch.int32)
        inner = self.linear_fc1(tokens, ends)
        if self.config.gated_linear_unit:
            gate, up = inner.chunk(2, -1)
            inner = self.config.activation_func(gate) * up
        else:
            inner = self.config.activation_func(inner)
        return self.linear_fc2((inner * shares[:, None]).to(tokens.dtype), ends), None


class LocalDispatcher(MoETokenDispatcher):
    """Sorts tokens by expert where all experts are on this rank. Unlike megatron-core's dispatchers it reads no number
    of tokens on the host: every token goes to the same number of experts."""

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [n, B, D], which experts each goes to bool [n * B, E], and with what share [n * B, E] -> (tokens
        [n * B * k, D], expert after expert, shares [n * B * k])."""
        self._shape, count = tokens.shape, len(routing_map)
        absent = ~routing_map.t().flatten()
        places = absent.to(torch.uint8).argsort(stable=True)[: count * self.config.moe_router_topk]
        self._counts, token = routing_map.sum(0), places % count
        self._back = token.argsort(stable=True)
        return tokens.flatten(0, 1).index_select(0, token), probs.t().flatten().index_select(0, places)

    def token_dispatch(self, hidden: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden, shares

    def dispatch_postprocess(
        self, hidden: torch.Tensor, shares: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return hidden, self._counts, shares

    def combine_preprocess(self, hidden: torch.Tensor) -> torch.Tensor:
        """The sum over each token's experts, [n * B, D]."""
        return hidden.index_select(0, self._back).unflatten(0, (-1, self.config.moe_router_topk)).sum(1)

    def token_combine(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def combine_postprocess(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.view(self._shape)
