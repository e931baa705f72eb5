"""MMaDA's weights between the official names, LLaDA's, and ours: Llama's weights, called otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import replace

import torch

from megatron_mm.config.masked import MMaDAConfig
from megatron_mm.interop.rules import Rule, convert_in, convert_out, trunk_rules, vocabulary

_NAMES = {
    "transformer.norm": "transformer.ln_f",
    "transformer.layers": "transformer.blocks",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
"""Parts of Llama's names -> LLaDA's."""


def rules(model: MMaDAConfig, vocab_size: int) -> Iterator[Rule]:
    """A rule for every weight of the model."""
    hidden, theirs = model.trunk.hidden_size, "model.transformer"
    yield vocabulary("front.embedding.weight", f"{theirs}.wte.weight", vocab_size, hidden)
    yield vocabulary("back.head.weight", f"{theirs}.ff_out.weight", vocab_size, hidden)
    for rule in trunk_rules(model.trunk, theirs):
        yield replace(rule, sources={_renamed(name): shape for name, shape in rule.sources.items()})


def weights_from_hf(
    tensors: Mapping[str, torch.Tensor], model: MMaDAConfig, vocab_size: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """See `rules.convert_in`."""
    return convert_in(rules(model, vocab_size), tensors)


def weights_to_hf(
    weights: MutableMapping[str, torch.Tensor], model: MMaDAConfig, vocab_size: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """See `rules.convert_out`."""
    return convert_out(rules(model, vocab_size), weights)


def _renamed(name: str) -> str:
    for llama, llada in _NAMES.items():
        name = name.replace(llama, llada)
    return name
