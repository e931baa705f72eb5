"""Names and arrangement of Chameleon's weights on both sides."""

import pytest
import torch

from megatron_mm.config.model import ChameleonConfig, TrunkConfig
from megatron_mm.interop.chameleon_weights import rules, weights_from_hf, weights_to_hf
from megatron_mm.interop.rules import VQ_PREFIX

VOCAB = 200
TRUNK = TrunkConfig(2, 32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48, qk_layernorm=True)
MODEL = ChameleonConfig(trunk=TRUNK)


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    shapes = {name: shape for rule in rules(MODEL, VOCAB) for name, shape in rule.sources.items()}
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def test_there_and_back_is_bit_exact_in_the_same_dtype(theirs):
    ours = dict(weights_from_hf(theirs | {f"{VQ_PREFIX}encoder.weight": torch.zeros(1)}, MODEL, VOCAB))
    back = dict(weights_to_hf(ours, MODEL, VOCAB))
    assert not ours, "converted weights are released"
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], weight) and back[name].dtype == weight.dtype for name, weight in theirs.items())
    storages = {weight.untyped_storage().data_ptr() for weight in back.values()}
    assert len(storages) == len(back), "safetensors refuses weights that share memory"


def test_queries_keys_and_values_are_interleaved_by_group(theirs):
    ours = dict(weights_from_hf(theirs, MODEL, VOCAB))["decoder.layers.1.self_attention.linear_qkv.weight"]
    q, k, v = (theirs[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    assert torch.equal(ours, torch.cat([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]]))


def test_vocabulary_is_padded_with_zeros_to_the_layout_free_size(theirs):
    ours = dict(weights_from_hf(theirs, MODEL, VOCAB))
    for name, source in (("front.embedding", "model.embed_tokens"), ("back.head", "lm_head")):
        weight = ours[f"{name}.weight"]
        assert weight.shape == (256, 32) and (weight[VOCAB:] == 0).all()
        assert torch.equal(weight[:VOCAB], theirs[f"{source}.weight"])


def test_wrong_names_and_shapes_are_named(theirs):
    norm, extra = theirs.pop("model.norm.weight"), {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    with pytest.raises(ValueError, match=r"weights lack model\.norm\.weight: they") as error:
        dict(weights_from_hf(theirs, MODEL, VOCAB))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"have the unknown model\.layers\.0\.self_attn\.q_proj\.bias: they"):
        dict(weights_from_hf(theirs | {"model.norm.weight": norm} | extra, MODEL, VOCAB))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is \[31\], but the configuration says \[32\]"):
        dict(weights_from_hf(theirs | {"model.norm.weight": norm[1:]}, MODEL, VOCAB))
    with pytest.raises(ValueError, match=r"checkpoint's weights lack back\.head\.weight, decoder.*and \d+ more: they"):
        dict(weights_to_hf({"front.embedding.weight": torch.zeros(256, 32)}, MODEL, VOCAB))
