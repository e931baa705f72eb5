"""Adapters in peft's format: adapter_config.json and adapter_model.safetensors, over Hugging Face's layers.

A layer of ours may be several of theirs, joined by rows (queries, keys and values; gate and up): they share A, and B is
split as the weight is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from megatron_mm.config.schema import LoraConfig
from megatron_mm.interop.rules import Rule
from megatron_mm.nn.lora import adapted_layers


def adapters_to_peft(weights: Mapping[str, torch.Tensor], rules: Iterable[Rule]) -> Iterator[tuple[str, torch.Tensor]]:
    """(peft's name, adapter) of every adapter in `weights`.

    Raises:
        ValueError: an adapter's layer is none of the rules'.
    """
    table = {rule.name: rule for rule in rules}
    for layer in adapted_layers(weights):
        rule = table.get(f"{layer}weight")
        if rule is None:
            raise ValueError(f"{layer.rstrip('.')} has an adapter, but Hugging Face's model has no such layer.")
        down, up = weights[f"{layer}lora_A"], weights[f"{layer}lora_B"]
        # The rules split rows of the weight's width.
        parts = rule.split(F.pad(up, (0, rule.shape[1] - up.shape[1])))
        for name, part in zip(rule.sources, parts, strict=True):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            yield f"{module}.lora_A.weight", down.clone()
            yield f"{module}.lora_B.weight", part[:, : up.shape[1]].contiguous()


def config_to_peft(lora: LoraConfig, names: Iterable[str]) -> dict[str, Any]:
    """adapter_config.json for adapters of `names`, as `adapters_to_peft` gives them."""
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in names}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": sorted(modules),
    }
