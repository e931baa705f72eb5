"""The families that Hugging Face has as well, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mm.interop import chameleon_config, chameleon_weights, janus_config, janus_weights
from megatron_mm.interop.rules import Rule

Weights = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Converter:
    """How one family converts.

    trunk: what Hugging Face's has of a trunk, without a choice.
    overrides_from_hf: (config.json, tokenizer.json or {}) -> `model.*` overrides.
    config_to_hf: (model config, vocabulary, config.json that it came from or {}) -> config.json.
    rules: (model config, vocabulary size) -> a rule for every weight.
    weights_from_hf, weights_to_hf: (weights, model config, vocabulary size) -> weights.
    """

    trunk: Mapping[str, Any]
    overrides_from_hf: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]]
    config_to_hf: Callable[..., dict[str, Any]]
    rules: Callable[..., Iterator[Rule]]
    weights_from_hf: Callable[..., Weights]
    weights_to_hf: Callable[..., Weights]


CONVERTERS = {
    "chameleon": Converter(
        chameleon_config.TRUNK,
        lambda hf, tokenizer: chameleon_config.overrides_from_hf(hf),
        chameleon_config.config_to_hf,
        chameleon_weights.rules,
        chameleon_weights.weights_from_hf,
        chameleon_weights.weights_to_hf,
    ),
    "janus": Converter(
        janus_config.TRUNK,
        janus_config.overrides_from_hf,
        janus_config.config_to_hf,
        janus_weights.rules,
        janus_weights.weights_from_hf,
        janus_weights.weights_to_hf,
    ),
}
"""Our name of a family is Hugging Face's `model_type`."""
