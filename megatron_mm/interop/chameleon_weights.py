"""Chameleon's weights between Hugging Face's names and ours; both sides keep QK-norm a row per head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch

from megatron_mm.config.model import ChameleonConfig
from megatron_mm.interop.rules import Rule, convert_in, convert_out, trunk_rules, vocabulary


def rules(model: ChameleonConfig, vocab_size: int) -> Iterator[Rule]:
    """A rule for every weight of the model."""
    hidden = model.trunk.hidden_size
    yield vocabulary("front.embedding.weight", "model.embed_tokens.weight", vocab_size, hidden)
    yield vocabulary("back.head.weight", "lm_head.weight", vocab_size, hidden)
    yield from trunk_rules(model.trunk, "model")


def weights_from_hf(
    tensors: Mapping[str, torch.Tensor], model: ChameleonConfig, vocab_size: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """See `rules.convert_in`."""
    return convert_in(rules(model, vocab_size), tensors)


def weights_to_hf(
    weights: MutableMapping[str, torch.Tensor], model: ChameleonConfig, vocab_size: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """See `rules.convert_out`."""
    return convert_out(rules(model, vocab_size), weights)
