"""The vision encoder: a pretrained SigLIP from a local folder, and the same weights under every layout."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from megatron_mm.config.janus import EncoderConfig
from megatron_mm.nn.vision import VisionIn

OURS = EncoderConfig(16, 2, 2, 24, image_size=8, patch_size=4, activation="gelu_pytorch_tanh")
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}


@pytest.fixture
def siglip(tmp_path):
    """A vision model with its pooling head, saved by transformers."""
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path / "vision")
    return model


def read(vision: VisionIn, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vision.encoder(pixels).last_hidden_state


def test_a_pretrained_encoder_gives_what_transformers_gives(siglip, tmp_path):
    pixels = torch.randn(3, 3, 8, 8)
    vision = VisionIn(OURS, 32, str(tmp_path / "vision"), frozen=False)
    with torch.no_grad():
        expected = siglip(pixels).last_hidden_state
    assert (read(vision, pixels) - expected).abs().max() > 0.01, "new weights must not pass for pretrained ones"
    vision.load_pretrained()
    torch.testing.assert_close(read(vision, pixels), expected)


def test_the_vision_half_of_a_whole_siglip_is_read(tmp_path):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = SiglipModel(SiglipConfig(text_config=text | {"vocab_size": 50}, vision_config=SIZES)).eval()
    whole.save_pretrained(tmp_path)
    vision = VisionIn(OURS, 32, str(tmp_path), frozen=True)
    vision.load_pretrained()
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(read(vision, pixels), whole.vision_model(pixels).last_hidden_state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "config.json").unlink(), r"has no readable config\.json"),
        (lambda f: (f / "config.json").write_text('{"model_type": "clip"}'), "is a model of type clip, not siglip"),
        (lambda f: (f / "model.safetensors").write_bytes(b"nothing"), r"model\.safetensors cannot be read"),
        (lambda f: edit(f, drop="post_layernorm.bias"), r"lacks post_layernorm\.bias: it is not"),
        (lambda f: edit(f, add="encoder.layers.2.mlp.fc1.bias"), r"has the unknown encoder\.layers\.2\.mlp\.fc1\.bias"),
        (lambda f: edit(f, cut="post_layernorm.bias"), r"post_layernorm\.bias is \[15\], but .* makes it \[16\]"),
    ],
)
def test_what_does_not_fit_is_named(siglip, tmp_path, change, said):
    folder = tmp_path / "vision"
    change(folder)
    with pytest.raises(ValueError, match=rf"model\.encoder_path={folder}:? {said}") as error:
        VisionIn(OURS, 32, str(folder), frozen=False).load_pretrained()
    assert "\n" not in str(error.value)


def edit(folder, drop=None, add=None, cut=None):
    weights = load_file(folder / "model.safetensors")
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in weights) else ""
    if drop:
        del weights[prefix + drop]
    if add:
        weights[prefix + add] = torch.zeros(3)
    if cut:
        weights[prefix + cut] = weights[prefix + cut][1:].clone()
    save_file(weights, folder / "model.safetensors")


def test_other_sizes_are_told_as_overrides(siglip, tmp_path):
    folder = tmp_path / "vision"
    with pytest.raises(ValueError, match=r"set model\.encoder\.num_layers=2 model\.encoder\.activation=gelu_pytorch_t"):
        VisionIn(replace(OURS, num_layers=1, activation="gelu"), 32, str(folder), frozen=False).load_pretrained()
    hf = json.loads((folder / "config.json").read_text())
    del hf["hidden_size"]
    (folder / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=r"set model\.encoder\.hidden_size=768"):
        VisionIn(OURS, 32, str(folder), frozen=False).load_pretrained()


def test_new_weights_have_no_drawn_biases_and_every_matrix_its_std():
    """Vectors are not drawn by name, so that nothing may depend on the ordinary generator."""
    encoder = VisionIn(OURS, 32, None, frozen=False).encoder
    for name, parameter in encoder.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
        else:
            assert 0.1 < parameter.init_std < 0.5, name
