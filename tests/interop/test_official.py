"""Show-o's and MMaDA's config.json and names: what is read, and what is refused."""

import weakref

import pytest
import torch

from megatron_mm.config.compose import compose
from megatron_mm.config.masked import MMaDAConfig, ShowoConfig
from megatron_mm.config.model import TrunkConfig
from megatron_mm.families.registry import build_family
from megatron_mm.interop import mmada_config, mmada_weights, showo_config, showo_weights
from megatron_mm.interop.registry import CONVERTERS, family_of

VOCAB = 200
SIZES = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48}
SHOWO = ShowoConfig(trunk=TrunkConfig(**SIZES, **showo_config.TRUNK))
MMADA = MMaDAConfig(trunk=TrunkConfig(**SIZES))
CASES = {"showo": (SHOWO, showo_weights), "mmada": (MMADA, mmada_weights)}
SHOWO_RELEASE = {
    "_class_name": "Showo", "_diffusers_version": "0.30.1", "codebook_size": 8192, "llm_model_path": "",
    "llm_vocab_size": 50295, "load_from_showo": False, "mask_token_id": 58497, "num_vq_tokens": 256,
    "vocab_size": 58498, "w_clip_vit": False,
}  # fmt: skip
MMADA_RELEASE = {
    "model_type": "mmada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "vocab_size": 134656, "embedding_size": 134656, "block_type": "llama",
    "activation_type": "silu", "layer_norm_type": "rms", "mask_token_id": 126336, "codebook_size": 8192,
    "num_vq_tokens": 1024, "weight_tying": False, "bias_for_layer_norm": False, "llm_vocab_size": 126464,
}  # fmt: skip


def model(name, overrides):
    return compose([f"model={name}", "run.name=test", "data.path=none", *overrides]).model


def test_show_o_is_our_configuration_of_its_size():
    ours, expected = model("showo", showo_config.overrides_from_hf(SHOWO_RELEASE)), model("showo_1.3b", [])
    assert (ours.trunk, ours.image, ours.vocab_size) == (expected.trunk, expected.image, expected.vocab_size)
    vocab = build_family(ours, 50295).vocab
    assert (vocab.pad, vocab.bos, vocab.eos, vocab.boi, vocab.eoi) == (50295, 50256, 50256, 50296, 50297)
    assert vocab.special == {"t2i": 50300, "mmu": 50301, "mask": 58497} and vocab.image_start == 50305
    assert showo_config.config_to_hf(ours, vocab, SHOWO_RELEASE) == SHOWO_RELEASE
    large = model("showo", showo_config.overrides_from_hf(SHOWO_RELEASE | {"num_vq_tokens": 1024}))
    assert (large.image.height, large.image.width) == (32, 32), "512 x 512 pixels"


def test_mmada_is_our_configuration_of_its_size():
    ours, expected = model("mmada", mmada_config.overrides_from_hf(MMADA_RELEASE)), model("mmada_8b", [])
    assert ours.trunk == TrunkConfig(**(vars(expected.trunk) | {"num_query_groups": 32}))
    assert (ours.image, ours.vocab_size) == (expected.image, expected.vocab_size)
    vocab = build_family(ours, 126349).vocab
    assert (vocab.pad, vocab.bos, vocab.eos, vocab.boi, vocab.eoi) == (126093, 126080, 126081, 126084, 126085)
    assert vocab.special == {"t2i": 126088, "mmu": 126089, "mask": 126336} and vocab.image_start == 126349
    written = mmada_config.config_to_hf(ours, vocab, MMADA_RELEASE)
    assert MMADA_RELEASE.items() <= written.items() and "special_ids" not in written


@pytest.mark.parametrize(
    ("read", "hf", "message"),
    [
        (showo_config.overrides_from_hf, {"w_clip_vit": True}, "w_clip_vit=True, but our Show-o reads images as codes"),
        (mmada_config.overrides_from_hf, {"weight_tying": True}, "weight_tying=True, which our MMaDA does not do"),
        (mmada_config.overrides_from_hf, {"block_type": "sequential"}, "block_type=sequential"),
        (family_of, {"model_type": "gpt2"}, "model_type=gpt2, but only chameleon and janus and mmada and showo can"),
        (family_of, {"_class_name": "Showo2Qwen2_5"}, "_class_name=Showo2Qwen2_5, but only"),
    ],
)
def test_variants_that_we_do_not_have_are_refused(read, hf, message):
    with pytest.raises(ValueError, match=message) as error:
        read(hf)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("showo_1.3b", "model.trunk.activation=swiglu", "activation=swiglu, but Show-o always has gelu"),
        ("showo_1.3b", "model.image.width=8", "16 x 8 codes, but Show-o's images are square"),
        ("mmada_8b", "model.trunk.qk_layernorm=true", "qk_layernorm=true, but MMaDA always has false"),
        ("mmada_8b", "model.trunk.add_qkv_bias=true", "add_qkv_bias=true"),
        ("mmada_8b", "model.image.width=8", "32 x 8 codes, but MMaDA's images are square"),
    ],
)
def test_models_that_the_official_code_cannot_hold_are_refused(name, override, message):
    def describe(*overrides):
        ours = model(name, ["model.vocab_size=null", *overrides])
        return CONVERTERS[ours.family].config_to_hf(ours, build_family(ours, 256).vocab, {})

    assert describe()["special_ids"]["boi"] == 256 + 3, "our own arrangement"
    with pytest.raises(ValueError, match=message):
        describe(override)


@pytest.fixture(params=CASES)
def case(request):
    """(model config, module of its weights, random official weights)."""
    config, module = CASES[request.param]
    torch.manual_seed(0)
    shapes = {name: shape for rule in module.rules(config, VOCAB) for name, shape in rule.sources.items()}
    return config, module, {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def test_there_and_back_is_bit_exact_in_the_same_dtype(case):
    config, module, theirs = case
    ours = dict(module.weights_from_hf(theirs, config, VOCAB))
    back = dict(module.weights_to_hf(ours, config, VOCAB))
    assert not ours, "converted weights are released"
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], weight) and back[name].dtype == weight.dtype for name, weight in theirs.items())


def test_wrong_names_and_shapes_are_named(case):
    config, module, theirs = case
    name = next(name for name in theirs if "1." in name)
    with pytest.raises(ValueError, match=f"weights lack {name}: they are not those") as error:
        dict(module.weights_from_hf({n: w for n, w in theirs.items() if n != name}, config, VOCAB))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="have the unknown mm_projector.0.weight: they"):
        dict(module.weights_from_hf(theirs | {"mm_projector.0.weight": torch.zeros(1)}, config, VOCAB))
    with pytest.raises(ValueError, match=rf"{name} is \[7, 32\], but the configuration says"):
        dict(module.weights_from_hf(theirs | {name: torch.zeros(7, 32)}, config, VOCAB))


def test_a_tensor_is_read_when_it_is_converted_and_not_kept(case):
    """Never the whole model twice: of the source no more than one of our weights is made of."""
    config, module, theirs = case
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    class Source(dict):
        def __getitem__(self, name):
            tensor = super().__getitem__(name).clone()
            alive.add(tensor)
            return tensor

    most = 0
    for _, weight in module.weights_from_hf(Source(theirs), config, VOCAB):
        most = max(most, len(alive))
        del weight
    assert 1 <= most <= 6, "queries, keys and values of this weight and of the one before it"


def test_norms_that_training_made_differ_between_heads_are_refused():
    shapes = {rule.name: rule.shape for rule in showo_weights.rules(SHOWO, VOCAB)}
    ours = {name: torch.zeros(shape) for name, shape in shapes.items()}
    name = "decoder.layers.1.self_attention.k_layernorm.bias"
    ours[name][1, 3] = 1e-6
    with pytest.raises(ValueError, match=f"{name} differs between heads, but Show-o's heads share one showo.model"):
        dict(showo_weights.weights_to_hf(ours, SHOWO, VOCAB))
