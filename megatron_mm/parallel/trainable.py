"""What trains, and at which learning rate: patterns over the layout-free names that checkpoints use.

    front.*   decoder.layers.<n>.*   decoder.final_layernorm.*   back.*

<n> is the layer's number in the whole model, under every pipeline layout.
"""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_mm.config.compose import ConfigError
from megatron_mm.config.schema import OptimConfig
from megatron_mm.parallel.model import StageModel
from megatron_mm.parallel.names import matches, named_weights


def freeze(models: list[StageModel], optim: OptimConfig) -> tuple[int, int]:
    """Takes the gradient from all parameters that `optim.trainable` and `optim.frozen` leave out; collective.

    What the model itself has frozen (an encoder, what lies beneath adapters) stays so. Call it before DDP and the
    optimizer see the parameters.

    Returns:
        (numbers that train, all numbers) in the parameters of the whole model.

    Raises:
        ConfigError: a pattern matches no parameter of the whole model, or nothing is left to train.
    """
    for name, parameter, _ in named_weights(models):
        parameter.requires_grad_(parameter.requires_grad and _trains(name, optim))
    weights = _whole_weights(models)
    for key in ("trainable", "frozen", "lr_multipliers"):
        for pattern in getattr(optim, key) or ():
            if not any(fnmatchcase(name, pattern) for name in weights):
                shown = ", ".join(get_close_matches(pattern, weights, n=4, cutoff=0.0))
                raise ConfigError(
                    f"optim.{key}: {pattern} matches none of the {len(weights)} parameters; some of them: {shown}."
                )
    trained = sum(size for size, trains in weights.values() if trains)
    if not trained:
        raise ConfigError("optim.trainable and optim.frozen leave no parameter to train; freeze less.")
    return trained, sum(size for size, _ in weights.values())


def lr_overrides(models: list[StageModel], optim: OptimConfig) -> dict[ParamKey, ParamGroupOverride]:
    """megatron-core's overrides for `optim.lr_multipliers`: one a factor, over this rank's parameters."""
    members: dict[float, set[int]] = {}
    for name, parameter, _ in named_weights(models):
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
    return (not optim.trainable or matches(name, optim.trainable)) and not matches(name, optim.frozen)


def _whole_weights(models: list[StageModel]) -> dict[str, tuple[int, bool]]:
    """Checkpoint name -> numbers and whether they train, of the whole model: the pipeline stages together hold every
    name."""
    group = mpu.get_pipeline_model_parallel_group()
    stages: list[dict[str, tuple[int, bool]]] = [{} for _ in range(dist.get_world_size(group))]
    mine = {name: (size, parameter.requires_grad) for name, parameter, size in named_weights(models)}
    dist.all_gather_object(stages, mine, group=group)
    return {name: weight for stage in stages for name, weight in stage.items()}
