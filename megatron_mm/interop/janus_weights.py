"""Janus's weights between Hugging Face's names and ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch

from megatron_mm.config.janus import EncoderConfig, JanusConfig
from megatron_mm.interop.rules import Rule, convert_in, convert_out, linear, same, trunk_rules, vocabulary


def rules(model: JanusConfig, vocab_size: int) -> Iterator[Rule]:
    """A rule for every weight of the model."""
    hidden, codes, width = model.trunk.hidden_size, model.image_codes, model.encoder.hidden_size
    language = "model.language_model"
    yield vocabulary("front.embedding.weight", f"{language}.embed_tokens.weight", vocab_size, hidden)
    yield vocabulary("back.head.weight", "lm_head.weight", vocab_size, hidden)
    yield from trunk_rules(model.trunk, language)
    yield from _encoder_rules(model.encoder)
    for ours, theirs, inputs in (
        ("vision.adaptor", "aligner", width),
        ("code_adaptor", "generation_aligner", model.code_dim),
    ):
        yield from linear(f"front.{ours}.0", f"model.{theirs}.fc1", hidden, inputs)
        yield from linear(f"front.{ours}.2", f"model.{theirs}.hidden_layers.0", hidden, hidden)
    yield same("front.code_embedding.weight", "model.generation_embeddings.weight", codes, model.code_dim)
    yield from linear("back.code_in.0", "model.generation_head.proj_out", hidden, hidden)
    head = "model.generation_head.vision_head"
    yield vocabulary("back.code_head.weight", f"{head}.weight", codes, hidden)
    yield vocabulary("back.code_head.bias", f"{head}.bias", codes)


def weights_from_hf(
    tensors: Mapping[str, torch.Tensor], model: JanusConfig, vocab_size: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """See `rules.convert_in`."""
    return convert_in(rules(model, vocab_size), tensors)


def weights_to_hf(
    weights: MutableMapping[str, torch.Tensor], model: JanusConfig, vocab_size: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """See `rules.convert_out`."""
    return convert_out(rules(model, vocab_size), weights)


def _encoder_rules(encoder: EncoderConfig) -> Iterator[Rule]:
    """SigLIP's names are Hugging Face Janus's, but for the attention's output."""
    ours, theirs, width = "front.vision.encoder", "model.vision_model", encoder.hidden_size
    patch, position = "embeddings.patch_embedding", "embeddings.position_embedding.weight"
    yield same(f"{ours}.{patch}.weight", f"{theirs}.{patch}.weight", width, 3, *[encoder.patch_size] * 2)
    yield same(f"{ours}.{patch}.bias", f"{theirs}.{patch}.bias", width)
    yield same(f"{ours}.{position}", f"{theirs}.{position}", encoder.side**2, width)
    norms = ["post_layernorm"]
    for n in range(encoder.num_layers):
        layer = f"encoder.layers.{n}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        names = {name: name for name in ("q_proj", "k_proj", "v_proj")} | {"out_proj": "projection_layer"}
        for our_name, their_name in names.items():
            attention = f"{layer}.self_attn"
            yield from linear(f"{ours}.{attention}.{our_name}", f"{theirs}.{attention}.{their_name}", width, width)
        yield from linear(f"{ours}.{layer}.mlp.fc1", f"{theirs}.{layer}.mlp.fc1", encoder.ffn_size, width)
        yield from linear(f"{ours}.{layer}.mlp.fc2", f"{theirs}.{layer}.mlp.fc2", width, encoder.ffn_size)
    for norm in norms:
        for kind in ("weight", "bias"):
            yield same(f"{ours}.{norm}.{kind}", f"{theirs}.{norm}.{kind}", width)
