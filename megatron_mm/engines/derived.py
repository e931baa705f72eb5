"""Checkpoints made from checkpoints, weight by name and without a model; each needs a process group of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf

from megatron_mm.config.compose import Config, from_dict_config, to_yaml
from megatron_mm.config.schema import LoraConfig
from megatron_mm.engines.checkpoint import common_state
from megatron_mm.engines.whole_weights import load_whole_weights, save_whole_weights
from megatron_mm.nn.lora import merge


def checkpoint_config(folder: Path) -> Config:
    """The configuration of the run that wrote the checkpoint.

    Raises:
        CheckpointError: there is none, or it is corrupt.
    """
    return from_dict_config(OmegaConf.create(common_state(folder)["config"]))


def merge_lora(checkpoint: Path, out: Path) -> Config:
    """Writes the checkpoint to `out` with its adapters added to their weights. Returns the configuration there.

    Raises:
        ValueError: it has no adapters, or `out` holds a checkpoint already.
    """
    config = checkpoint_config(checkpoint)
    if not config.lora.rank:
        raise ValueError(f"{checkpoint} has no adapters to merge: it was written with lora.rank=0.")
    merged = replace(config, lora=LoraConfig())
    weights = merge(load_whole_weights(checkpoint), config.lora.scale)
    save_whole_weights(out, weights.items(), to_yaml(merged))
    return merged
