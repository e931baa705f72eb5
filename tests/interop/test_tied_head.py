"""Models whose configuration makes the head the embedding, as transformers writes and reads them."""

import json
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, JanusConfig, JanusForConditionalGeneration

from megatron_mm.config import model as our_config
from megatron_mm.convert import from_hf, to_hf
from megatron_mm.interop.chameleon_weights import rules, weights_from_hf
from megatron_mm.interop.registry import CONVERTERS
from megatron_mm.interop.rules import with_tied_head

VOCAB = 320
TRUNK = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VQ = {"embed_dim": 4, "num_embeddings": 4, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}
"""The smallest image tokenizer, of which nothing is converted."""
NAMES = {"<pad>": 1, "<s>": 0, "</s>": 2, "<racm3:break>": 8, "<eoss>": 9}
CODES = {f"IMGIMG{letter}Z": 4 + code for code, letter in enumerate("ABCD")}


def chameleon() -> ChameleonForConditionalGeneration:
    config = ChameleonConfig(
        **TRUNK, vocabulary_map=NAMES | CODES, vq_config={**VQ, "resolution": 8}, tie_word_embeddings=True
    )
    return ChameleonForConditionalGeneration(config)


def janus() -> JanusForConditionalGeneration:
    """Tied by default."""
    config = JanusConfig(
        text_config={**TRUNK, "model_type": "llama", "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "projection_dim": 32,
            "num_image_tokens": 4,
        },
        vq_config={**VQ, "projection_dim": 32, "image_token_embed_dim": 32, "num_patches": 2},
        image_token_id=9,
    )
    return JanusForConditionalGeneration(config)


MODELS = {"chameleon": (chameleon, []), "janus": (janus, ["model.vocabulary.boi=7", "model.vocabulary.eoi=8"])}


def there_and_back(_init, folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """transformers' logits of the model, and of what both conversions make of it, and the latter's weights."""
    torch.manual_seed(0)
    make, overrides = MODELS[name]
    model = make().eval()
    model.save_pretrained(folder / "hf")
    assert "lm_head.weight" not in load_file(folder / "hf" / "model.safetensors")
    from_hf(folder / "hf", folder / "checkpoint", ["data.tokenizer=bytes", *overrides])
    to_hf(folder / "checkpoint", folder / "back")
    back = type(model).from_pretrained(folder / "back").eval()
    tokens = torch.arange(10, 30)[None]
    with torch.no_grad():
        logits = [each(input_ids=tokens).logits for each in (model, back)]
    return *logits, load_file(folder / "back" / "model.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_a_tied_head_becomes_a_copy_of_the_embedding(name, tmp_path):
    ((before, after, weights),) = run_ranks(there_and_back, 1, tmp_path, name)
    assert torch.equal(after, before)
    embedding = next(weight for weight_name, weight in weights.items() if weight_name.endswith("embed_tokens.weight"))
    assert torch.equal(weights["lm_head.weight"], embedding)
    assert not json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"]


def test_either_may_be_missing_and_two_stay_as_they_are():
    table = list(rules(our_config.ChameleonConfig(), VOCAB))
    embedding, head = torch.zeros(2), torch.ones(2)
    both = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    for present, weight in both.items():
        assert all(each is weight for each in (with_tied_head(table, {present: weight})[name] for name in both))
    assert with_tied_head(table, both) is both
    assert not CONVERTERS["chameleon"].ties_head({}) and CONVERTERS["janus"].ties_head({})
    assert not CONVERTERS["janus"].ties_head({"tie_word_embeddings": False})


def test_a_missing_head_that_is_not_tied_is_named():
    weights = {name: torch.zeros(1) for rule in rules(our_config.ChameleonConfig(), VOCAB) for name in rule.sources}
    del weights["lm_head.weight"]
    with pytest.raises(ValueError, match="weights lack lm_head.weight"):
        dict(weights_from_hf(weights, our_config.ChameleonConfig(), VOCAB))
