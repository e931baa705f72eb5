"""Show-o's weights between the official names, which are transformers' Phi's behind a prefix, and ours.

The heads of a layer share a norm of queries and one of keys there and have one each here: such a norm is copied for
every head, and the way back is refused where training has made them differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch

from megatron_mm.config.masked import ShowoConfig
from megatron_mm.interop.rules import Rule, convert_in, convert_out, linear, qkv, same, vocabulary


def rules(model: ShowoConfig, vocab_size: int) -> Iterator[Rule]:
    """A rule for every weight of the model."""
    trunk = model.trunk
    hidden, ffn = trunk.hidden_size, trunk.ffn_size
    yield vocabulary("front.embedding.weight", "showo.model.embed_tokens.weight", vocab_size, hidden)
    yield vocabulary("back.head.weight", "showo.lm_head.weight", vocab_size, hidden)
    yield vocabulary("back.head.bias", "showo.lm_head.bias", vocab_size)
    yield from _norm("decoder.final_layernorm", "showo.model.final_layernorm", hidden)
    for n in range(trunk.num_layers):
        ours, theirs = f"decoder.layers.{n}", f"showo.model.layers.{n}"
        attention, their_attention = f"{ours}.self_attention", f"{theirs}.self_attn"
        yield from _norm(f"{ours}.input_layernorm", f"{theirs}.input_layernorm", hidden)
        for kind, inner in (("weight", (hidden,)), ("bias", ())):
            sources = [f"{their_attention}.{part}_proj.{kind}" for part in "qkv"]
            yield qkv(trunk, f"{attention}.linear_qkv.{kind}", sources, *inner)
            for part, heads in (("q", trunk.num_attention_heads), ("k", trunk.kv_heads)):
                norm = f"{part}_layernorm.{kind}"
                yield _shared(f"{attention}.{norm}", f"{their_attention}.{norm}", heads, trunk.head_dim)
        yield from linear(f"{attention}.linear_proj", f"{their_attention}.dense", hidden, hidden)
        yield from linear(f"{ours}.mlp.linear_fc1", f"{theirs}.mlp.fc1", ffn, hidden)
        yield from linear(f"{ours}.mlp.linear_fc2", f"{theirs}.mlp.fc2", hidden, ffn)


def weights_from_hf(
    tensors: Mapping[str, torch.Tensor], model: ShowoConfig, vocab_size: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """See `rules.convert_in`."""
    return convert_in(rules(model, vocab_size), tensors)


def weights_to_hf(
    weights: MutableMapping[str, torch.Tensor], model: ShowoConfig, vocab_size: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """See `rules.convert_out`.

    Raises:
        ValueError: besides, norms of a layer's heads differ.
    """
    return convert_out(rules(model, vocab_size), weights)


def _norm(name: str, source: str, size: int) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield same(f"{name}.{kind}", f"{source}.{kind}", size)


def _shared(name: str, source: str, heads: int, size: int) -> Rule:
    """One row there, the same row for each head here."""

    def only_row(weight: torch.Tensor) -> tuple[torch.Tensor]:
        if not torch.equal(weight, weight[:1].expand_as(weight)):
            raise ValueError(
                f"{name} differs between heads, but Show-o's heads share one {source}: this model cannot be converted."
            )
        return (weight[0],)

    return Rule(name, {source: (size,)}, lambda weight: weight.repeat(heads, 1), only_row)
