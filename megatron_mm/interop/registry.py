"""The families whose models exist elsewhere as well, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mm.interop import (
    chameleon_config,
    chameleon_weights,
    janus_config,
    janus_weights,
    mmada_config,
    mmada_weights,
    showo_config,
    showo_weights,
)
from megatron_mm.interop.rules import Rule

Weights = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Converter:
    """How one family converts.

    theirs: what the model is called in a sentence.
    trunk: what theirs has of a trunk, without a choice.
    overrides_from_hf: (config.json, tokenizer.json or {}) -> `model.*` overrides.
    config_to_hf: (model config, vocabulary, config.json that it came from or {}) -> config.json.
    rules: (model config, vocabulary size) -> a rule for every weight.
    weights_from_hf, weights_to_hf: (weights, model config, vocabulary size) -> weights.
    weights_file: the name that the other side reads.
    image_tokenizer: whether its weights are among the model's own.
    tied: whether head and embedding are one weight where config.json says nothing of it (None: they never are).
    """

    theirs: str
    trunk: Mapping[str, Any]
    overrides_from_hf: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]]
    config_to_hf: Callable[..., dict[str, Any]]
    rules: Callable[..., Iterator[Rule]]
    weights_from_hf: Callable[..., Weights]
    weights_to_hf: Callable[..., Weights]
    weights_file: str = "model.safetensors"
    image_tokenizer: bool = True
    tied: bool | None = None

    def ties_head(self, hf: Mapping[str, Any]) -> bool:
        """Whether a config.json makes the head the embedding."""
        return self.tied is not None and bool(hf.get("tie_word_embeddings", self.tied))


CONVERTERS = {
    "chameleon": Converter(
        "Hugging Face's Chameleon",
        chameleon_config.TRUNK,
        lambda hf, tokenizer: chameleon_config.overrides_from_hf(hf),
        chameleon_config.config_to_hf,
        chameleon_weights.rules,
        chameleon_weights.weights_from_hf,
        chameleon_weights.weights_to_hf,
        tied=False,
    ),
    "janus": Converter(
        "Hugging Face's Janus",
        janus_config.TRUNK,
        janus_config.overrides_from_hf,
        janus_config.config_to_hf,
        janus_weights.rules,
        janus_weights.weights_from_hf,
        janus_weights.weights_to_hf,
        tied=True,
    ),
    "mmada": Converter(
        "MMaDA",
        mmada_config.TRUNK,
        lambda hf, tokenizer: mmada_config.overrides_from_hf(hf),
        mmada_config.config_to_hf,
        mmada_weights.rules,
        mmada_weights.weights_from_hf,
        mmada_weights.weights_to_hf,
        image_tokenizer=False,
    ),
    "showo": Converter(
        "Show-o",
        showo_config.TRUNK,
        lambda hf, tokenizer: showo_config.overrides_from_hf(hf),
        showo_config.config_to_hf,
        showo_weights.rules,
        showo_weights.weights_from_hf,
        showo_weights.weights_to_hf,
        weights_file="pytorch_model.safetensors",
        image_tokenizer=False,
    ),
}
"""Our name of a family is `model_type` of its config.json, or diffusers' `_class_name` in small letters."""


def family_of(hf: Mapping[str, Any]) -> str:
    """The family that a config.json is of.

    Raises:
        ValueError: it is none of ours.
    """
    key = "model_type" if "model_type" in hf else "_class_name"
    name = str(hf.get(key))
    if name.lower() not in CONVERTERS:
        raise ValueError(f"config.json has {key}={name}, but only {' and '.join(CONVERTERS)} can be converted.")
    return name.lower()
