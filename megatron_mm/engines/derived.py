"""Checkpoints made from checkpoints, weight by name and without a model; each needs a process group of one process."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from megatron_mm.config.compose import Config, build, from_dict_config, to_yaml
from megatron_mm.config.schema import LoraConfig
from megatron_mm.engines.format import common_state
from megatron_mm.engines.whole_weights import load_whole_weights, save_whole_weights
from megatron_mm.nn.lora import merge
from megatron_mm.parallel.draw import drawn


def checkpoint_config(folder: Path) -> Config:
    """The configuration of the run that wrote the checkpoint.

    Raises:
        CheckpointError: there is none, or it is corrupt.
    """
    return from_dict_config(OmegaConf.create(common_state(folder)["config"]))


def merge_lora(checkpoint: Path, out: Path, averaged: bool = False) -> Config:
    """Writes the checkpoint to `out` with its adapters, or their moving averages, added to their weights. Returns the
    configuration there.

    Raises:
        ValueError: it has no adapters, or `out` holds a checkpoint already.
    """
    config = checkpoint_config(checkpoint)
    if not config.lora.rank:
        raise ValueError(f"{checkpoint} has no adapters to merge: it was written with lora.rank=0.")
    merged = replace(config, lora=LoraConfig())
    weights = merge(load_whole_weights(checkpoint, averaged), config.lora.scale)
    save_whole_weights(out, weights.items(), to_yaml(merged))
    return merged


def assemble_experts(checkpoints: Sequence[Path], out: Path, overrides: Mapping[str, Any]) -> Config:
    """Writes a model with experts to `out`: expert i of every layer that has any is the feed-forward of checkpoint i,
    whose adapters are merged; routers are new, and all else is the first checkpoint's. Returns the configuration there.

    Args:
        overrides: nested keys that win over the first checkpoint's, {"model": {"trunk": {"moe_layer_freq": 2}}}.

    Raises:
        ValueError: fewer than two checkpoints, one that has experts already or other shapes than the first, or `out`
            holds a checkpoint already.
    """
    if len(checkpoints) < 2:
        raise ValueError("checkpoints= must name two dense models or more, one for each expert, which may be the same.")
    config = checkpoint_config(checkpoints[0])
    trunk = replace(config.model.trunk, num_experts=len(checkpoints))
    config = build(replace(config, lora=LoraConfig(), model=replace(config.model, trunk=trunk)), dict(overrides))
    trunk = config.model.trunk
    weights: dict[str, torch.Tensor] = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for number, checkpoint in enumerate(checkpoints):
        for name, weight in _dense_weights(checkpoint).items():
            found = re.fullmatch(r"(decoder\.layers\.(\d+)\.mlp)\.(.*)", name)
            if found and int(found[2]) % trunk.moe_layer_freq == 0:
                experts.setdefault(f"{found[1]}.experts.experts.{found[3]}", []).append(weight)
            elif number == 0:
                weights[name] = weight
    for name, parts in experts.items():
        if len(parts) < len(checkpoints) or any(part.shape != parts[0].shape for part in parts):
            raise ValueError(f"{name.replace('experts.experts.', '')} is not of one shape in all of checkpoints=.")
        weights[name] = torch.stack(parts)
    shape = (len(checkpoints), trunk.hidden_size)
    for layer in range(0, trunk.num_layers, trunk.moe_layer_freq):
        name = f"decoder.layers.{layer}.mlp.router.weight"
        router = drawn(f"{config.train.seed}/{name}", shape) * trunk.init_method_std
        weights[name] = router.to(next(iter(weights.values())).dtype)
    save_whole_weights(out, weights.items(), to_yaml(config))
    return config


def _dense_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    config = checkpoint_config(checkpoint)
    if config.model.trunk.num_experts is not None:
        raise ValueError(f"{checkpoint} has experts already: give dense models, of model.trunk.num_experts=null.")
    weights = load_whole_weights(checkpoint)
    return merge(weights, config.lora.scale) if config.lora.rank else weights
