"""Weights between Hugging Face's names and ours, as pure functions over a table of rules.

Both sides keep RoPE half-split, so weights are only renamed, joined and padded: no number changes, and the way back is
bit-exact. One tensor is converted at a time.

Shape legend: H heads, G key/value heads, Dh head size, D hidden size.
"""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F

from megatron_mm.config.model import ImageConfig, TrunkConfig
from megatron_mm.parallel.ops import padded_vocab_size

logger = logging.getLogger(__name__)

LLAMA = {
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "parallel_block": False,
    "rotary_percent": 1.0,
    "head_bias": False,
    "num_experts": None,
}
"""What a Llama-like trunk of Hugging Face has without a choice."""

VQ_PREFIX = "model.vqmodel."
"""Hugging Face's image tokenizers, which are no part of our models."""


@dataclass(frozen=True)
class Rule:
    """One of our weights, the Hugging Face weights it is made of (name -> shape), and the way there and back."""

    name: str
    sources: dict[str, tuple[int, ...]]
    join: Callable[..., torch.Tensor]
    split: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]

    @property
    def shape(self) -> torch.Size:
        return self.join(*(torch.empty(shape, device="meta") for shape in self.sources.values())).shape


def same(name: str, source: str, *shape: int) -> Rule:
    """The same weight under another name."""
    return Rule(name, {source: shape}, lambda w: w, lambda w: (w,))


def vocabulary(name: str, source: str, size: int, *hidden: int) -> Rule:
    """A matrix [size, hidden] (or a vector [size]) over a vocabulary, which we pad."""
    padding = 2 * len(hidden) * (0,) + (0, padded_vocab_size(size) - size)
    return Rule(name, {source: (size, *hidden)}, lambda w: F.pad(w, padding), lambda w: (w[:size],))


def linear(name: str, source: str, outputs: int, inputs: int) -> Iterator[Rule]:
    """Weight and bias of a linear layer."""
    yield same(f"{name}.weight", f"{source}.weight", outputs, inputs)
    yield same(f"{name}.bias", f"{source}.bias", outputs)


def qkv(trunk: TrunkConfig, name: str, sources: Sequence[str], *inner: int) -> Rule:
    """Queries [H * Dh, *inner], keys and values [G * Dh, *inner] as megatron-core's [G * (H / G + 2) * Dh, *inner],
    group by group; `inner` is D for a weight, nothing for a bias."""
    groups, size = trunk.kv_heads, trunk.head_dim
    per_group = trunk.num_attention_heads // groups * size

    def join(*parts: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.reshape(groups, -1, *inner) for part in parts], 1).flatten(0, 1)

    def split(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = weight.view(groups, -1, *inner).split([per_group, size, size], 1)
        return tuple(part.flatten(0, 1) for part in parts)

    rows = (groups * per_group, groups * size, groups * size)
    return Rule(name, {source: (n, *inner) for source, n in zip(sources, rows, strict=True)}, join, split)


def trunk_rules(trunk: TrunkConfig, theirs: str) -> Iterator[Rule]:
    """The transformer layers and the final norm of a model that Hugging Face calls `theirs` (as Llama's, and with
    Chameleon's norms on heads)."""
    hidden, heads, groups, size = trunk.hidden_size, trunk.num_attention_heads, trunk.kv_heads, trunk.head_dim
    swin = trunk.norm_placement == "swin"
    attention_norm, mlp_norm = (
        ("self_attn_bda.norm", "mlp_bda.norm") if swin else ("input_layernorm", "pre_mlp_layernorm")
    )
    ffn_shape = (trunk.ffn_size, hidden)
    yield same("decoder.final_layernorm.weight", f"{theirs}.norm.weight", hidden)
    for n in range(trunk.num_layers):
        ours, layer = f"decoder.layers.{n}", f"{theirs}.layers.{n}"
        attention, their_attention = f"{ours}.self_attention", f"{layer}.self_attn"
        yield same(f"{ours}.{attention_norm}.weight", f"{layer}.input_layernorm.weight", hidden)
        yield same(f"{ours}.{mlp_norm}.weight", f"{layer}.post_attention_layernorm.weight", hidden)
        for kind, inner in (("weight", (hidden,)), ("bias", ()))[: 1 + trunk.add_qkv_bias]:
            sources = [f"{their_attention}.{part}_proj.{kind}" for part in "qkv"]
            yield qkv(trunk, f"{attention}.linear_qkv.{kind}", sources, *inner)
        for kind in ("weight", "bias") if trunk.qk_layernorm else ():
            yield same(f"{attention}.q_layernorm.{kind}", f"{their_attention}.q_norm.{kind}", heads, size)
            yield same(f"{attention}.k_layernorm.{kind}", f"{their_attention}.k_norm.{kind}", groups, size)
        yield same(f"{attention}.linear_proj.weight", f"{their_attention}.o_proj.weight", hidden, hidden)
        yield Rule(
            f"{ours}.mlp.linear_fc1.weight",
            {f"{layer}.mlp.{part}_proj.weight": ffn_shape for part in ("gate", "up")},
            lambda gate, up: torch.cat([gate, up]),
            lambda weight: weight.chunk(2),
        )
        yield same(f"{ours}.mlp.linear_fc2.weight", f"{layer}.mlp.down_proj.weight", *ffn_shape[::-1])


def check_square(image: ImageConfig, theirs: str) -> None:
    """Raises ValueError, in one sentence, unless an image has as many rows of codes as columns."""
    if image.height != image.width:
        raise ValueError(
            f"model.image has {image.height} x {image.width} codes, but {theirs}'s images are square: this model "
            "cannot be converted."
        )


def square_overrides(hf: Mapping[str, Any]) -> list[str]:
    """Those of `model.image` and its codes, from the keys that Show-o and MMaDA have for them."""
    side = isqrt(hf["num_vq_tokens"])
    return [f"model.image.height={side}", f"model.image.width={side}", f"model.image_codes={hf['codebook_size']}"]


def check_trunk(trunk: TrunkConfig, fixed: Mapping[str, Any], theirs: str) -> None:
    """Raises ValueError, in one sentence, unless the model called `theirs` can hold such a trunk; `fixed` says what it
    has without a choice."""
    for key, value in fixed.items():
        if (ours := getattr(trunk, key)) != value:
            raise ValueError(
                f"model.trunk.{key}={_written(ours)}, but {theirs} always has {_written(value)}: this "
                "model cannot be converted."
            )


def trunk_overrides(values: Mapping[str, Any]) -> list[str]:
    """`model.trunk.*` overrides of these values."""
    return [f"model.trunk.{key}={_written(value)}" for key, value in values.items()]


def _written(value: Any) -> str:
    """As on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def convert_in(rules: Iterable[Rule], tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(our name, weight) of every weight; `tensors` may read its values only when asked for them.

    Raises:
        ValueError: names are missing or left over, or a shape is not the configuration's.
    """
    table = list(rules)
    expected = {name: shape for rule in table for name, shape in rule.sources.items()}
    check_names("The Hugging Face weights", expected, (n for n in tensors if not n.startswith(VQ_PREFIX)))
    for rule in table:
        parts = [tensors[name] for name in rule.sources]
        for part, (name, shape) in zip(parts, rule.sources.items(), strict=True):
            _check_shape(name, part, shape)
        yield rule.name, rule.join(*parts)


def with_tied_head(rules: Iterable[Rule], tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """`tensors` of a model whose configuration ties its head to its embedding: where one of the two is missing, it is
    the other, as in transformers. Ours are two weights, which may part in training."""
    embedding, head = "front.embedding.weight", "back.head.weight"
    named = {rule.name: next(iter(rule.sources)) for rule in rules if rule.name in (embedding, head)}
    for missing, present in ((named[head], named[embedding]), (named[embedding], named[head])):
        if missing not in tensors and present in tensors:
            logger.info("%s is tied to %s: it starts as its copy", missing, present)
            return ChainMap({missing: tensors[present]}, tensors)
    return tensors


def convert_out(
    rules: Iterable[Rule], weights: MutableMapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, weight) of every weight but the image tokenizer's, each with memory of its own.

    Takes them out of `weights`, so that the model is not held twice.

    Raises:
        ValueError: names are missing or left over, or a shape is not the configuration's.
    """
    table = list(rules)
    check_names("The checkpoint's weights", [rule.name for rule in table], weights)
    for rule in table:
        weight = weights.pop(rule.name)
        _check_shape(rule.name, weight, rule.shape)
        for name, part in zip(rule.sources, rule.split(weight), strict=True):
            yield name, part.clone(memory_format=torch.contiguous_format)


def check_names(what: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raises ValueError, in one sentence, unless both hold the same names."""
    expected, found = set(expected), set(found)
    problems = [
        f"{word} {', '.join(sorted(names)[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for word, names in (("lack", expected - found), ("have the unknown", found - expected))
        if names
    ]
    if problems:
        raise ValueError(f"{what} {' and '.join(problems)}: they are not those of this configuration.")


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} is {list(tensor.shape)}, but the configuration says {list(shape)}: they do not match."
        )
