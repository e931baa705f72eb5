"""Janus's config.json and weights on both sides: sizes, ids, refusals, names."""

import json

import pytest
import torch
from transformers import JanusConfig as HFConfig

from megatron_mm.config.compose import compose
from megatron_mm.config.janus import EncoderConfig, JanusConfig
from megatron_mm.config.model import ImageConfig, SpecialsConfig, TrunkConfig
from megatron_mm.families.registry import build_family
from megatron_mm.interop.janus_config import config_to_hf, overrides_from_hf
from megatron_mm.interop.janus_weights import rules, weights_from_hf, weights_to_hf
from megatron_mm.interop.rules import VQ_PREFIX

VOCAB = 200
MODEL = JanusConfig(
    trunk=TrunkConfig(2, 32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48, layernorm_epsilon=1e-6),
    image=ImageConfig(3, 2, 2),
    image_codes=20,
    encoder=EncoderConfig(12, 1, 2, image_size=8, patch_size=4),
)
TEXT = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16}
NAMES = {
    "<｜▁pad▁｜>": 9,
    "<｜begin▁of▁sentence｜>": 7,
    "<｜end▁of▁sentence｜>": 8,
    "<begin_of_image>": 5,
    "<end_of_image>": 6,
}


def written(tmp_path, text=None, **parts) -> dict:
    """config.json as transformers writes it."""
    text = {"model_type": "llama", "vocab_size": 102400, "num_key_value_heads": 16, **TEXT, **(text or {})}
    HFConfig(text_config=text, tie_word_embeddings=False, **parts).save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


def model(overrides):
    return compose(["model=janus", "run.name=test", "data.path=none", *overrides]).model


def test_defaults_are_pro_1b(tmp_path):
    tokens = {"added_tokens": [{"content": name, "id": i} for name, i in NAMES.items()]}
    ours = model(overrides_from_hf(written(tmp_path), tokens))
    expected = compose(["model=janus_pro_1b", "run.name=test", "data.path=none"]).model
    assert ours.trunk == TrunkConfig(**(vars(expected.trunk) | {"num_query_groups": 16}))
    assert ours.encoder == EncoderConfig(**(vars(expected.encoder) | {"ffn_hidden_size": 4096}))
    assert (ours.image, ours.image_codes, ours.code_dim) == (expected.image, 16384, 8)
    assert ours.vocab_size == 102400 and ours.vocabulary == SpecialsConfig(pad=9, bos=7, eos=8, boi=5, eoi=6)
    build_family(ours, 100_000)


def test_every_size_is_read(tmp_path):
    text = {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "initializer_range": 0.01, "vocab_size": 300}
    hf = written(
        tmp_path,
        text | {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        vision_config={"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 24,
                       "patch_size": 4, "mlp_ratio": 1.5},
        vq_config={"num_embeddings": 50, "embed_dim": 6},
    )  # fmt: skip
    ours = model(overrides_from_hf(hf, {}))
    assert ours.trunk == TrunkConfig(24, 2048, 16, 4, 5632, False, "pre", 0.0, 77.0, 1e-5, 0.01)
    assert ours.encoder == EncoderConfig(12, 3, 2, 18, 24, 4, "gelu")
    assert (ours.image.height, ours.image.width, ours.image_codes, ours.code_dim) == (6, 6, 50, 6)
    assert ours.vocabulary == SpecialsConfig(bos=1, eos=2), "config.json alone does not know the others"
    with pytest.raises(ValueError, match=r"set but for model\.vocabulary\.pad, model\.vocabulary\.boi"):
        build_family(ours, 256)


def test_a_model_of_ours_is_described_so_that_transformers_and_we_read_it(tmp_path):
    vocab = build_family(MODEL, 256).vocab
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(MODEL, vocab, {})))
    hf = HFConfig.from_pretrained(tmp_path)
    assert (hf.text_config.bos_token_id, hf.text_config.pad_token_id) == (vocab.bos, vocab.pad)
    assert hf.text_config.vocab_size == vocab.size and not hf.tie_word_embeddings
    again = model(overrides_from_hf(json.loads((tmp_path / "config.json").read_text()), {}))
    assert again.trunk == MODEL.trunk and vars(again.encoder) == vars(MODEL.encoder) | {"ffn_hidden_size": 48}


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text", {"attention_bias": True}, "text_config.attention_bias=True, which our Janus does not do"),
        ("text", {"model_type": "qwen2"}, "text_config.model_type=qwen2"),
        ("text", {"head_dim": 64}, "text_config.head_dim=64"),
        ("text", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}}, "rope_type=linear"),
        ("vision", {"hidden_act": "relu"}, "vision_config.hidden_act=relu"),
        ("vision", {"use_qk_norm": True}, "vision_config.use_qk_norm=True"),
        ("vision", {"depth": 3, "projection_dim": 8}, "vision_config.projection_dim=8, vision_config.depth=3"),
        ("vq", {"image_token_embed_dim": 1024}, "vq_config.image_token_embed_dim=1024"),
    ],
)
def test_variants_that_we_do_not_have_are_refused(tmp_path, part, change, message):
    hf = written(tmp_path)
    hf[f"{part}_config"] |= change
    with pytest.raises(ValueError, match=message):
        overrides_from_hf(hf, {})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.trunk.qk_layernorm=true", "model.trunk.qk_layernorm=true, but Hugging Face's Janus always has false"),
        ("model.trunk.norm_placement=swin", "norm_placement=swin"),
        ("model.encoder.activation=gelu_pytorch_tanh", "activation=gelu_pytorch_tanh"),
        ("model.image.height=7", "model.image is 7 x 8 codes and model.encoder 8 x 8 patches"),
    ],
)
def test_a_model_that_hugging_face_cannot_hold_is_refused(override, message):
    ours = model([override])
    with pytest.raises(ValueError, match=message):
        config_to_hf(ours, build_family(ours, 256).vocab, {})


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    shapes = {name: shape for rule in rules(MODEL, VOCAB) for name, shape in rule.sources.items()}
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def test_there_and_back_is_bit_exact_in_the_same_dtype(theirs):
    ours = dict(weights_from_hf(theirs | {f"{VQ_PREFIX}encoder.weight": torch.zeros(1)}, MODEL, VOCAB))
    assert ours["front.embedding.weight"].shape == (256, 32) and ours["back.code_head.weight"].shape == (128, 32)
    back = dict(weights_to_hf(ours, MODEL, VOCAB))
    assert not ours, "converted weights are released"
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], weight) and back[name].dtype == weight.dtype for name, weight in theirs.items())


def test_wrong_names_are_named(theirs):
    fc1 = theirs.pop("model.aligner.fc1.weight")
    with pytest.raises(ValueError, match=r"weights lack model\.aligner\.fc1\.weight: they"):
        dict(weights_from_hf(theirs, MODEL, VOCAB))
    extra = {"model.vision_model.head.probe": torch.zeros(1), "model.aligner.fc1.weight": fc1}
    with pytest.raises(ValueError, match=r"have the unknown model\.vision_model\.head\.probe: they"):
        dict(weights_from_hf(theirs | extra, MODEL, VOCAB))
    with pytest.raises(ValueError, match=r"aligner\.fc1\.weight is \[12, 32\], but the configuration says \[32, 12\]"):
        dict(weights_from_hf(theirs | {"model.aligner.fc1.weight": fc1.T}, MODEL, VOCAB))
