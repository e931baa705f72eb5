"""Families by name, and the published sizes in configs/model."""

from dataclasses import replace
from pathlib import Path

import hydra
import pytest
import torch
from documents import shape_like
from plain_ops import PlainOps
from transformers import JanusConfig, JanusForConditionalGeneration

from megatron_mm.config.compose import from_dict_config
from megatron_mm.config.model import ChameleonConfig
from megatron_mm.documents.builder import Builder
from megatron_mm.families.registry import FAMILIES, build_family
from megatron_mm.interop.janus_config import config_to_hf

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return from_dict_config(hydra.compose(overrides=[f"+model={name}"])).model


def billions(trunk, vocab_size):
    """Parameters of the matrices: attention, SwiGLU, embedding and head."""
    d = trunk.hidden_size
    layer = d * (2 * d + 2 * trunk.kv_heads * trunk.head_dim) + 3 * d * trunk.ffn_size
    return (trunk.num_layers * layer + 2 * d * vocab_size) / 1e9


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("transfusion_0.16b", 0.16),
        ("transfusion_0.37b", 0.37),
        ("transfusion_0.76b", 0.76),
        ("transfusion_1.4b", 1.4),
        ("transfusion_7b", 7.0),
        ("chameleon_7b", 7.0),
        ("chameleon_34b", 34.0),
    ],
)
def test_published_sizes_have_their_parameters(name, published):
    family = build_family(load(name), 32000)
    assert billions(family.trunk, family.vocab.size) == pytest.approx(published, rel=0.05)
    h, w = (32, 32) if family.name == "chameleon" else (16, 16)
    assert Builder(family).length(shape_like(family, "ti", 10)) == 2 + 10 + 2 + h * w


def test_chameleon_s_two_sizes_differ_as_published():
    small, large = load("chameleon_7b").trunk, load("chameleon_34b").trunk
    assert (small.norm_placement, small.hidden_dropout, small.kv_heads) == ("pre", 0.1, 32)
    assert (large.norm_placement, large.hidden_dropout, large.kv_heads) == ("swin", 0.0, 8)
    assert small.qk_layernorm and large.qk_layernorm
    assert (small.ffn_size, large.ffn_size) == (11008, 22016)


@pytest.mark.parametrize(("name", "published"), [("janus_pro_1b", 2.09), ("janus_pro_7b", 7.42)])
def test_janus_has_the_parameters_of_hugging_face_s(name, published):
    """Built without memory, part by part, against transformers' model of the same sizes; published: its files."""
    config = load(name)
    family = build_family(config, 100_000)
    original = hf_janus(config)
    weights = {n: p.numel() for n, p in original.named_parameters()}
    tokenizer = sum(count for n, count in weights.items() if n.startswith("model.vqmodel."))
    with torch.device("meta"):
        front, back = family.build_front(PlainOps()), family.build_back(PlainOps())
    ends = sum(p.numel() for part in (front, back) for p in part.parameters())
    trunk = billions(family.trunk, 0) * 1e9 + (2 * family.trunk.num_layers + 1) * family.trunk.hidden_size
    assert ends + round(trunk) == sum(weights.values()) - tokenizer
    # The published files also hold the encoder's pooling head, which no one reads: 13M.
    assert (sum(weights.values()) + 13e6) / 1e9 == pytest.approx(published, rel=0.003)
    assert Builder(family).length(shape_like(family, "ti", 10)) == 2 + 10 + 2 + 576


def hf_janus(config):
    """transformers' model of our configuration, on the meta device."""
    vocab = build_family(config, 100_000).vocab
    hf = JanusConfig.from_dict(config_to_hf(config, vocab, {}) | {"tie_word_embeddings": False})
    with torch.device("meta"):
        return JanusForConditionalGeneration(hf)


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_config_builds_its_family(path):
    config = load(path.stem)
    family = build_family(config, 256)
    assert family.name == config.family and f"{path.stem}_".startswith(f"{family.name}_")
    assert family.trunk == config.trunk


def test_unknown_families_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"model.family=gpt: use one of {', '.join(sorted(FAMILIES))}"):
        build_family(replace(ChameleonConfig(), family="gpt"), 256)
