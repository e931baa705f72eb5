"""Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers: y = W x + alpha / r * B A drop(x), W frozen.

A [r, in] and B [out, r] are parameters `lora_A` and `lora_B` of the layer itself, so its weight keeps its name. Where a
layer is cut over tensor ranks, one of the two is cut alike; the other is whole on each of them, and what crosses ranks
is r numbers a position:

    column   A whole, B cut in rows. A's output is gathered over positions under sequence parallelism.
    row      A cut in columns, B whole. A's output is summed over the ranks.

An expert is whole on its rank and needs neither.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from megatron_mm.config.compose import ConfigError
from megatron_mm.config.schema import LoraConfig
from megatron_mm.nn.dropout import hash_tokens, hashed_dropout
from megatron_mm.nn.lora import ADAPTERS
from megatron_mm.parallel.names import matches, named_weights


class Adapted(nn.Module):
    """Mixin of a linear layer that can take an adapter; it has none until `attach`."""

    lora: LoraConfig | None = None
    weight: nn.Parameter
    token_hash: torch.Tensor | None = None
    """int32, of the positions that the layer reads; None where the adapter's input is not dropped."""

    def attach(self, lora: LoraConfig, name: str, seed: int) -> None:
        """Adds A, of PyTorch's own spread for linear layers as in peft, and B, zero; `name` is the layer's in
        checkpoints."""
        rows, columns = self.weight.shape
        options = {"dtype": self.weight.dtype, "device": self.weight.device}
        self.lora = lora
        self.salt = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "little")
        self.lora_A = nn.Parameter(torch.empty(lora.rank, columns, **options))
        self.lora_B = nn.Parameter(torch.zeros(rows, lora.rank, **options))
        self.lora_A.init_std, self.lora_B.init_std = 1 / math.sqrt(3 * self._whole_inputs()), 0.0

    def show_tokens(self, keys: torch.Tensor, positions: torch.Tensor) -> None:
        """Tells the dropout which tokens come: document keys and positions int32 [S, B], of the whole sequence."""
        if self.lora.dropout > 0.0:
            self.token_hash = self._read_part(hash_tokens(keys, positions, self.salt))

    def _whole_inputs(self) -> int:
        return self.weight.shape[1]

    def _read_part(self, whole: torch.Tensor) -> torch.Tensor:
        """The positions that the layer reads."""
        return whole

    def _down(self, x: torch.Tensor, first_channel: int = 0) -> torch.Tensor:
        if self.training and self.token_hash is not None:
            x = hashed_dropout(x, self.lora.dropout, self.token_hash, first_channel)
        return F.linear(x, self.lora_A)

    def _up(self, down: torch.Tensor) -> torch.Tensor:
        return F.linear(down, self.lora_B) * self.lora.scale


class LoraLinear(Adapted, nn.Linear):
    """A family's own linear layer, whole on every rank."""

    @classmethod
    def of(cls, linear: nn.Linear) -> LoraLinear:
        """A layer on the same weight and bias."""
        adapted = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        adapted.weight, adapted.bias = linear.weight, linear.bias
        return adapted

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self._up(self._down(x))


class _Direct(nn.Module):
    """Mixin of megatron-core's layers: where nothing is cut over ranks and no kernel of Apex adds up the gradient, they
    are torch's own linear function, without the two or three autograd functions in Python around it."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    @functools.cached_property
    def _direct(self) -> bool:
        return self.tp_group.size() == 1 and not self.gradient_accumulation_fusion

    def forward(self, x: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self._direct:
            return super().forward(x, *args, **kwargs)
        if self.skip_bias_add:
            return F.linear(x, self.weight), self.bias
        return F.linear(x, self.weight, self.bias), None


class LoraColumnParallelLinear(Adapted, _Direct, ColumnParallelLinear):
    """megatron-core's layer of the trunk; `tp_comm_buffer_name` is how megatron-core tells a gated layer."""

    def __init__(self, *args, tp_comm_buffer_name: str | None = None, **kwargs):
        super().__init__(*args, tp_comm_buffer_name=tp_comm_buffer_name, **kwargs)
        self.gated = tp_comm_buffer_name == "fc1" and self.config.gated_linear_unit
        _mark_expert(self)

    def attach(self, lora: LoraConfig, name: str, seed: int) -> None:
        super().attach(lora, name, seed)
        _mark(self.lora_A, self.is_expert, cut=self.is_expert, sequence_parallel=self.sequence_parallel)
        _mark(self.lora_B, self.is_expert, cut=True)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(x, *args, **kwargs)
        if self.lora is None:
            return output, bias
        down = self._down(x)
        if not self.is_expert:
            if self.sequence_parallel:
                down = gather_from_sequence_parallel_region(down, group=self.tp_group)
            else:
                down = copy_to_tensor_model_parallel_region(down, group=self.tp_group)
        return output + self._up(down), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = _sharded(self, {"weight": 0, "bias": 0, "lora_B": 0}, prefix, sharded_offsets, metadata)
        name = f"{prefix}lora_B"
        if self.gated and name in state:
            state[name] = apply_swiglu_sharded_factory(state[name], sharded_offsets)
        return state

    def _read_part(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(self.tp_group.size())[self.tp_group.rank()] if self.sequence_parallel else whole


class LoraRowParallelLinear(Adapted, _Direct, RowParallelLinear):
    """megatron-core's layer of the trunk."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _mark_expert(self)

    def attach(self, lora: LoraConfig, name: str, seed: int) -> None:
        super().attach(lora, name, seed)
        _mark(self.lora_A, self.is_expert, cut=True)
        _mark(self.lora_B, self.is_expert, cut=self.is_expert, sequence_parallel=self.sequence_parallel)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(x)
        if self.lora is None:
            return output, bias
        down = self._down(x, first_channel=self.tp_group.rank() * x.shape[-1])
        if not self.is_expert:
            if self.sequence_parallel:
                down = reduce_scatter_to_sequence_parallel_region(down, group=self.tp_group)
            else:
                down = reduce_from_tensor_model_parallel_region(down, group=self.tp_group)
        return output + self._up(down), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return _sharded(self, {"weight": 1, "lora_A": 1}, prefix, sharded_offsets, metadata)

    def _whole_inputs(self) -> int:
        return self.input_size


def adapt(model: nn.Module, lora: LoraConfig, seed: int) -> None:
    """Gives the layers of a `StageModel` that `lora.targets` names their adapters, and freezes all else but
    `lora.also_train`."""
    for path, linear in list(_linears(model)):
        name = layer_name(model, path)
        if not matches(name, lora.targets):
            continue
        if type(linear) is nn.Linear:
            parent, _, own = path.rpartition(".")
            linear = LoraLinear.of(linear)
            setattr(model.get_submodule(parent), own, linear)
        linear.attach(lora, name, seed)
    for name, parameter, _ in named_weights([model]):
        parameter.requires_grad_(name.endswith(ADAPTERS) or matches(name, lora.also_train))


def check_targets(models: Sequence[nn.Module], lora: LoraConfig) -> None:
    """Refuses patterns that match nothing in the whole model; collective over the pipeline's ranks.

    Raises:
        ConfigError: a pattern of `lora.targets` matches no linear layer, or one of `lora.also_train` no parameter.
    """
    if not lora.rank:
        return
    layers = [layer_name(model, path) for model in models for path, _ in _linears(model)]
    weights = [name for name, _, _ in named_weights(models)]
    for key, patterns, what, mine in (
        ("targets", lora.targets, "linear layers", layers),
        ("also_train", lora.also_train, "parameters", weights),
    ):
        stages: list[list[str]] = [[] for _ in range(mpu.get_pipeline_model_parallel_world_size())]
        dist.all_gather_object(stages, mine, group=mpu.get_pipeline_model_parallel_group())
        names = sorted({name for stage in stages for name in stage})
        for pattern in patterns:
            if not any(matches(name, [pattern]) for name in names):
                shown = ", ".join(get_close_matches(pattern, names, n=4, cutoff=0.0))
                raise ConfigError(
                    f"lora.{key}: {pattern} matches none of the {len(names)} {what}; some of them: {shown}."
                )


def layer_name(model: nn.Module, path: str) -> str:
    """The layout-free name of the module at `path` of a `StageModel`; the experts of a layer share one."""
    parts = path.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
    return re.sub(r"\.local_experts\.\d+\.", ".experts.", ".".join(parts))


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, Adapted) or type(module) is nn.Linear:
            yield path, module


def _mark(parameter: nn.Parameter, expert: bool, cut: bool, sequence_parallel: bool = False) -> None:
    """What megatron-core asks of a parameter: whether its gradient is summed over all data-parallel ranks or an
    expert's, whether other tensor ranks hold other numbers of it (for the gradient norm), and whether its gradient is
    to be summed over them, since each saw other positions."""
    parameter.allreduce = not expert
    parameter.tensor_model_parallel = cut
    parameter.sequence_parallel = sequence_parallel and not expert


def _mark_expert(layer: nn.Module) -> None:
    """An expert's gradients belong to the ranks that share the expert; megatron-core says so only where experts are
    spread, but under TP others than those of data parallelism share it. It also makes optimizer states alike, spread
    or not."""
    if not layer.is_expert:
        return
    layer.explicit_expert_comm = True  # the dispatcher communicates, the layer never does
    for parameter in layer.parameters():
        parameter.allreduce = False
        # Of a row's bias megatron-core thinks that the tensor ranks share it.
        parameter.sequence_parallel, parameter.tensor_model_parallel = False, True


def _sharded(module: nn.Module, axes: dict[str, int], prefix: str, offsets: tuple, metadata: dict | None) -> dict:
    """As the layers' own `sharded_state_dict`, with the adapter."""
    return make_sharded_tensors_for_checkpoint(
        module.state_dict(prefix="", keep_vars=True),
        prefix,
        axes,
        offsets,
        tp_group=module.tp_group,
        dp_cp_group=(metadata or {}).get("dp_cp_group", mpu.get_data_parallel_group(with_context_parallel=True)),
    )
