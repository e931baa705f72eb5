"""Show-o2's image paths: what they depend on, and that images do not mix."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from megatron_mm.nn.flow_head import AdaLayer, FlowHead, SemanticLayers
from megatron_mm.types import Grids

PLACES = [(0, 1, 2, 2), (0, 6, 2, 2), (1, 3, 2, 2)]
IMAGES = Grids.of(PLACES, 12)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomised(module):
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)
    return module.double()


def inside():
    where = torch.zeros(2, 12, dtype=torch.bool)
    for row, first, h, w in PLACES:
        where[row, first : first + h * w] = True
    return where


def test_semantic_layers_are_siglips():
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2,
        num_channels=3,
    )  # fmt: skip
    theirs = randomised(SiglipVisionModel(config)).eval()
    ours = SemanticLayers(12, (2, 2), config).double().eval()
    vision = theirs.vision_model if hasattr(theirs, "vision_model") else theirs
    ours.layers.load_state_dict(vision.encoder.state_dict())
    embed = vision.embeddings
    ours.embed.weight.data.copy_(embed.patch_embedding.weight.flatten(1))
    ours.embed.bias.data.copy_(embed.patch_embedding.bias)
    ours.position.data.copy_(embed.position_embedding.weight)
    patches = torch.randn(2, 12, 12, dtype=torch.float64)
    out = ours(patches, IMAGES)
    assert not out[~inside()].any()
    for row, first, h, w in PLACES:
        image = F.fold(patches[row, first : first + 4].t()[None], (4, 4), 2, stride=2)
        expected = vision.encoder(inputs_embeds=embed(image)).last_hidden_state[0]
        torch.testing.assert_close(out[row, first : first + h * w], expected)


def test_ada_layer_is_dits():
    theirs = randomised(
        BasicTransformerBlock(
            16, 2, 8, norm_type="ada_norm_zero", num_embeds_ada_norm=10, norm_elementwise_affine=False,
            activation_fn="gelu-approximate", attention_bias=True,
        )
    )  # fmt: skip
    ours = AdaLayer(16, 2).double()
    to = theirs.attn1
    ours.qkv.weight.data.copy_(torch.cat([to.to_q.weight, to.to_k.weight, to.to_v.weight]))
    ours.qkv.bias.data.copy_(torch.cat([to.to_q.bias, to.to_k.bias, to.to_v.bias]))
    for mine, other in (
        (ours.proj, to.to_out[0]),
        (ours.fc1, theirs.ff.net[0].proj),
        (ours.fc2, theirs.ff.net[2]),
        (ours.modulate, theirs.norm1.linear),
    ):
        mine.load_state_dict(other.state_dict())
    theirs.norm1.eps = theirs.norm1.norm.eps = theirs.norm3.eps = 1e-6
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    time, label = torch.tensor([3, 4, 5]), torch.tensor([1, 0, 2])
    c = F.silu(theirs.norm1.emb(time, label, hidden_dtype=torch.float64))
    torch.testing.assert_close(ours(x, c), theirs(x, timestep=time, class_labels=label), rtol=1e-7, atol=1e-9)


def test_flow_head_starts_at_zero_and_hears_of_time():
    head = FlowHead(16, 2, 2, 4)
    hidden, time = torch.randn(2, 12, 16), torch.full((2, 12), -0.001)
    time[inside()] = 300.0
    assert head(hidden, time, IMAGES).any()  # as built; the engine draws the weights with these deviations:
    assert head.out.weight.init_std == head.modulate.weight.init_std == head.layers[0].modulate.weight.init_std == 0.0
    head = randomised(head)
    hidden, time = hidden.double(), time.double()
    out = head(hidden, time, IMAGES)
    assert not out[~inside()].any() and out[inside()].any()
    later = time.clone()
    later[0, 1:5] = 700.0
    changed = (head(hidden, later, IMAGES) != out).any(-1)
    assert changed[0, 1:5].all() and not changed[0, 5:].any() and not changed[1].any()
    partly = time.clone()
    partly[0, 1] = -0.001  # a position borrowed from another rank
    torch.testing.assert_close(head(hidden, partly, IMAGES), out)


def test_without_images_parameters_get_zero_gradients():
    head = FlowHead(16, 2, 1, 4)
    head(torch.randn(1, 3, 16), torch.zeros(1, 3), ()).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())
