"""What trains, and at which learning rate: patterns over the layout-free names that checkpoints use.

    front.*   decoder.layers.<n>.*   decoder.final_layernorm.*   back.*

<n> is the layer's number in the whole model, under every pipeline layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_mm.config.compose import ConfigError
from megatron_mm.config.schema import OptimConfig
from megatron_mm.parallel.model import StageModel


def freeze(models: list[StageModel], optim: OptimConfig) -> tuple[int, int]:
    """Takes the gradient from all parameters that `optim.trainable` and `optim.frozen` leave out; collective.

    Call it before DDP and the optimizer see the parameters.

    Returns:
        (numbers that train, all numbers) in the parameters of the whole model.

    Raises:
        ConfigError: a pattern matches no parameter of the whole model, or nothing is left to train.
    """
    sizes = _whole_sizes(models)
    for key in ("trainable", "frozen", "lr_multipliers"):
        for pattern in getattr(optim, key) or ():
            if not any(fnmatchcase(name, pattern) for name in sizes):
                shown = ", ".join(get_close_matches(pattern, sizes, n=4, cutoff=0.0))
                raise ConfigError(
                    f"optim.{key}: {pattern} matches none of the {len(sizes)} parameters; some of them: {shown}."
                )
    trained = sum(size for name, size in sizes.items() if _trains(name, optim))
    if not trained:
        raise ConfigError("optim.trainable and optim.frozen leave no parameter to train; freeze less.")
    for name, parameter, _ in _parameters(models):
        parameter.requires_grad_(_trains(name, optim))
    return trained, sum(sizes.values())


def lr_overrides(models: list[StageModel], optim: OptimConfig) -> dict[ParamKey, ParamGroupOverride]:
    """megatron-core's overrides for `optim.lr_multipliers`: one a factor, over this rank's parameters."""
    members: dict[float, set[int]] = {}
    for name, parameter, _ in _parameters(models):
        for pattern, factor in (optim.lr_multipliers or {}).items():
            if fnmatchcase(name, pattern):
                members.setdefault(factor, set()).add(id(parameter))
                break
    return {
        ParamKey(predicate=ParamPredicate(f"lr times {factor}", lambda p, ids=ids: id(p) in ids)): ParamGroupOverride(
            # lr_mult scales nothing here: checkpoints tell groups apart by it.
            max_lr=factor * optim.lr, min_lr=factor * optim.min_lr, lr_mult=factor
        )
        for factor, ids in members.items()
        if factor != 1.0
    }  # fmt: skip


def _trains(name: str, optim: OptimConfig) -> bool:
    return (not optim.trainable or _matches(name, optim.trainable)) and not _matches(name, optim.frozen)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _parameters(models: list[StageModel]) -> Iterator[tuple[str, torch.nn.Parameter, int]]:
    """(checkpoint name, parameter, numbers in the whole parameter over tensor ranks) of this rank's chunks."""
    for model in models:
        parameters = dict(model.named_parameters())
        for local_name, entry in model.sharded_state_dict().items():
            shard = entry.build()[0] if isinstance(entry, ShardedTensorFactory) else entry
            yield entry.key, parameters[local_name], prod(shard.global_shape)


def _whole_sizes(models: list[StageModel]) -> dict[str, int]:
    """Checkpoint name -> numbers, of the whole model: the pipeline stages together hold every name."""
    group = mpu.get_pipeline_model_parallel_group()
    stages: list[dict[str, int]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(stages, {name: size for name, _, size in _parameters(models)}, group=group)
    return {name: size for stage in stages for name, size in stage.items()}
