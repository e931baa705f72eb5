"""What we read from a Hugging Face config.json, and what we refuse."""

import json

import pytest
from transformers import ChameleonConfig as HFConfig

from megatron_mm.config.compose import compose
from megatron_mm.config.model import TrunkConfig, VocabularyConfig
from megatron_mm.families.registry import build_family
from megatron_mm.interop.chameleon_config import config_to_hf, overrides_from_hf

NAMES = {"<s>": 0, "<pad>": 1, "</s>": 2, "<racm3:break>": 20, "<eoss>": 19}
CODES = {"IMGIMGAZ": 4, "IMGIMGBZ": 5, "IMGIMGCZ": 6}


def written(tmp_path, **changes) -> dict:
    """config.json as transformers writes it."""
    HFConfig(vocabulary_map=NAMES | CODES, vq_config={}, **changes).save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


def model(hf):
    return compose(["model=chameleon", "run.name=test", "data.path=none", *overrides_from_hf(hf)]).model


def test_defaults_are_the_7b(tmp_path):
    ours = model(written(tmp_path))
    expected = compose(["model=chameleon_7b", "run.name=test", "data.path=none", "model.trunk.hidden_dropout=0"]).model
    assert ours.trunk == TrunkConfig(**(vars(expected.trunk) | {"num_query_groups": 32}))
    assert ours.image == expected.image and ours.vocab_size == expected.vocab_size
    assert ours.vocabulary == VocabularyConfig(pad=1, bos=0, eos=2, boi=20, eoi=19, image_start=4)
    assert ours.image_codes == 3


def test_every_size_is_read(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8}
    hf = written(
        tmp_path, **sizes, num_key_value_heads=2, swin_norm=True, vocab_size=300, initializer_range=0.01,
        rope_parameters={"rope_type": "default", "rope_theta": 77.0},
    )  # fmt: skip
    trunk = model(hf).trunk
    assert trunk == TrunkConfig(3, 64, 8, 2, 96, True, "swin", 0.0, 77.0, 1e-5, 0.01)
    del hf["rope_parameters"]
    assert model(hf | {"rope_theta": 55.0}).trunk.rotary_base == 55.0, "as older versions of transformers write it"


def test_a_model_of_ours_is_described_so_that_transformers_and_we_read_it(tmp_path):
    ours = compose(["model=chameleon_tiny", "run.name=test", "data.path=none"]).model
    vocab = build_family(ours, 256).vocab
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(ours, vocab, {})))
    hf = HFConfig.from_pretrained(tmp_path)
    assert (hf.bos_token_id, hf.pad_token_id, hf.vocab_size) == (vocab.bos, vocab.pad, vocab.size)
    again = model(json.loads((tmp_path / "config.json").read_text()))
    rebuilt = build_family(again, 256).vocab
    assert rebuilt == vocab


def test_image_tokens_out_of_order_are_told(tmp_path, caplog):
    hf = written(tmp_path)
    hf["vocabulary_map"] |= {"IMGIMGAZ": 5, "IMGIMGBZ": 4}
    assert model(hf).vocabulary.image_start == 4
    assert "not in the order" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type=llama, but only chameleon"),
        ({"attention_bias": True}, "attention_bias=True, which our Chameleon does not do"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}}, "rope_type=linear"),
        ({"vocabulary_map": NAMES | CODES | {"IMGIMGDZ": 9}}, "4 image tokens at ids 4 to 9 with gaps"),
    ],
)
def test_variants_that_we_do_not_have_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        overrides_from_hf(written(tmp_path) | changes)


@pytest.mark.parametrize(
    "override",
    [
        "model.trunk.qk_layernorm=false",
        "model.trunk.layernorm_epsilon=1e-6",
        "model.trunk.normalization=LayerNorm",
        "model.trunk.activation=gelu",
        "model.trunk.add_bias_linear=true",
        "model.trunk.add_qkv_bias=true",
        "model.trunk.parallel_block=true",
        "model.trunk.rotary_percent=0.5",
        "model.trunk.head_bias=true",
    ],
)
def test_a_model_that_hugging_face_cannot_hold_is_refused(override):
    ours = compose(["model=chameleon_tiny", "run.name=test", "data.path=none", override]).model
    with pytest.raises(ValueError, match="cannot be converted"):
        config_to_hf(ours, build_family(ours, 256).vocab, {})
