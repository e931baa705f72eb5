"""Mixture-of-experts feed-forwards on megatron-core's token dispatchers: the router, and what it did in a step.

Experts are spread over `parallel.expert_model_parallel_size` ranks, and each is whole on its rank (expert tensor
parallelism is 1): under TP the ranks of a tensor group hold other positions (sequence parallelism), so they serve as
ranks for experts. No token is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_mm.parallel.experts import GroupedExperts, LocalDispatcher
from megatron_mm.parallel.lora import LoraColumnParallelLinear, LoraRowParallelLinear
from megatron_mm.parallel.transformer_config import TrunkTransformerConfig
from megatron_mm.types import MODALITIES


class Router(nn.Module):
    """Linear without bias, the top k logits, and their softmax, in fp32 at least (Mixtral, Uni-MoE).

    megatron-core's own always takes the softmax in fp32 and its balancing loss over whatever a rank holds, which both
    depend on the layout.
    """

    def __init__(self, config: TrunkTransformerConfig, pg_collection: object = None):
        super().__init__()
        self.config = config
        options = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size, **options))
        self.weight.sequence_parallel = config.sequence_parallel
        self.kinds: torch.Tensor | None = None
        """int32 [n, B] of the tokens to come: 0 is padding, then the number of the modality."""
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted: `load` [modalities, experts], choices of this rank's tokens since, and `balance`,
        the sum of balancing losses of rows (this rank's share of it)."""
        options = {"dtype": torch.float64, "device": torch.cuda.current_device()}
        self.load = torch.zeros(len(MODALITIES), self.config.num_moe_experts, **options)
        self.balance = torch.zeros((), **options)

    def set_layer_number(self, layer_number: int) -> None:
        self.layer_number = layer_number

    def forward(
        self, hidden: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [n, B, D] -> share of each expert [n * B, E], 0 where it is not chosen, and which are, bool."""
        precise = torch.promote_types(hidden.dtype, torch.float32)
        logits = F.linear(hidden.to(precise), self.weight.to(precise))
        best, chosen = logits.topk(self.config.moe_router_topk)
        shares = torch.zeros_like(logits).scatter(-1, chosen, best.softmax(-1))
        choices = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
        # Recomputed layers pass twice, once without gradients.
        if self.training and torch.is_grad_enabled():
            self._count(choices)
            if self.config.router_balance_scale > 0.0:
                shares = MoEAuxLossAutoScaler.apply(shares, self._balance(logits, choices))
        return shares.flatten(0, 1), choices.flatten(0, 1)

    @torch.no_grad()
    def _count(self, choices: torch.Tensor) -> None:
        kinds = torch.arange(1, len(MODALITIES) + 1, device=choices.device)
        of_kind = (self.kinds.flatten()[None] == kinds[:, None]).to(self.load.dtype)
        self.load += of_kind @ choices.flatten(0, 1).to(self.load.dtype)

    def _balance(self, logits: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
        """This rank's share of the balancing loss, scaled: of each row E * sum over experts of (share of its choices) *
        (mean probability) (arXiv 2101.03961), 1 in perfect balance. A row's other positions may be on other ranks."""
        real = (self.kinds > 0).unsqueeze(-1)
        probabilities = (logits.softmax(-1) * real).sum(0)  # [B, E]
        with torch.no_grad():
            counts = torch.cat([(choices & real).sum(0), real.sum(0)], -1).to(logits.dtype)
            dist.all_reduce(counts, group=mpu.get_tensor_and_context_parallel_group())
            counts, tokens = counts[:, :-1], counts[:, -1:].clamp(min=1)
        experts, chosen = counts.shape[-1], self.config.moe_router_topk
        loss = experts * (counts / (chosen * tokens) * probabilities / tokens).sum()
        self.balance += loss.detach()
        return loss * self.config.router_balance_scale


class Experts(MoELayer):
    """megatron-core's MoE layer, told which tokens it is looking at."""

    def __init__(self, config: TrunkTransformerConfig, submodules: MoESubmodules, **kwargs):
        super().__init__(config, submodules, **kwargs)
        groups = get_default_pg_collection()
        if isinstance(self.experts, GroupedExperts) and groups.ep.size() == 1:
            self.token_dispatcher = LocalDispatcher(config, groups)

    def show_tokens(self, kinds: torch.Tensor) -> None:
        """kinds int32 [n, B] of this rank's positions."""
        self.router.kinds = kinds


def experts_spec(config: TrunkTransformerConfig) -> ModuleSpec:
    linears = MLPSubmodules(linear_fc1=LoraColumnParallelLinear, linear_fc2=LoraRowParallelLinear)
    # Adapters may be too narrow for a grouped product.
    grouped = config.grouped_experts and not config.lora.rank
    experts = ModuleSpec(module=GroupedExperts if grouped else SequentialMLP, submodules=linears)
    return ModuleSpec(module=Experts, submodules=MoESubmodules(experts=experts, router=Router))


@dataclass(frozen=True)
class Routing:
    """What the routers of all layers did in a step: `load` fp64 [layers, modalities, experts], choices over all ranks;
    `balance`: sum of the balancing losses of all rows and layers."""

    layers: tuple[int, ...]
    load: np.ndarray
    balance: float

    @staticmethod
    def of(config: TrunkTransformerConfig, counted: Sequence[float]) -> Routing:
        """From what `take_routing` gives, summed over all ranks and on the host."""
        layers = _moe_layers(config)
        rows = np.asarray(counted).reshape(len(layers), -1)
        return Routing(layers, rows[:, :-1].reshape(len(layers), len(MODALITIES), -1), float(rows[:, -1].sum()))

    def shares(self) -> dict[str, float]:
        """<layer or mean>/<modality>/<expert> -> share of the modality's choices; modalities without tokens are left
        out."""
        rows = {f"layer_{layer}": load for layer, load in zip(self.layers, self.load, strict=True)}
        rows["mean"] = self.load.sum(0)
        return {
            f"{row}/{modality}/{expert}": float(choices / of_modality.sum())
            for row, load in rows.items()
            for modality, of_modality in zip(MODALITIES, load, strict=True)
            if of_modality.sum() > 0
            for expert, choices in enumerate(of_modality)
        }


def take_routing(models: Sequence[nn.Module]) -> torch.Tensor:
    """What this rank's routers counted since the last call, for `Routing.of`: fp64 [n] on the device, as long on every
    rank, and empty for a model without experts. Reads no value on the host."""
    config = models[0].config
    if config.num_moe_experts is None:
        return torch.zeros(0, dtype=torch.float64, device=torch.cuda.current_device())
    layers = _moe_layers(config)
    shape = (len(layers), len(MODALITIES) * config.num_moe_experts + 1)
    counted = torch.zeros(shape, dtype=torch.float64, device=torch.cuda.current_device())
    for router in (module for model in models for module in model.modules() if isinstance(module, Router)):
        counted[layers.index(router.layer_number - 1)] = torch.cat([router.load.flatten(), router.balance[None]])
        router.reset()
    return counted.flatten()


def _moe_layers(config: TrunkTransformerConfig) -> tuple[int, ...]:
    return tuple(layer for layer in range(config.num_layers) if is_moe_layer(config, layer))


def is_moe_layer(config: TrunkTransformerConfig, layer: int) -> bool:
    """Whether the layer, counted from 0 over the whole model, has experts."""
    return config.num_moe_experts is not None and layer % config.moe_layer_freq == 0
