"""Show-o2's image paths: what they depend on, and that images do not mix."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from plain_ops import PlainOps
from transformers import LlamaConfig, SiglipVisionConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from megatron_mm import mask as masks
from megatron_mm.config.flow import ShowoFlowConfig
from megatron_mm.config.model import TrunkConfig
from megatron_mm.nn.flow import UNIT
from megatron_mm.nn.flow_head import ClockEmbedding, FlowHead, SemanticLayers, llama3_frequencies, runs
from megatron_mm.nn.patch import sinusoids
from megatron_mm.types import Grids

PLACES = [(0, 1, 2, 2), (0, 6, 2, 2), (1, 3, 2, 2)]
IMAGES = Grids.of(PLACES, 12)
CPU = torch.device("cpu")


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
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipVisionConfig(**sizes, image_size=4, patch_size=2, num_channels=3)
    theirs = randomised(SiglipVisionModel(config)).eval()
    ours = SemanticLayers(12, (2, 2), **sizes).double().eval()
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


def test_places_of_other_grids_lie_between_the_learnt_ones():
    """By the bicubic interpolation that transformers' SigLIP has."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 0, "num_attention_heads": 2}
    theirs = randomised(SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=2)))
    theirs = (theirs.vision_model if hasattr(theirs, "vision_model") else theirs).embeddings
    ours = SemanticLayers(12, (16, 16), **sizes).double()
    ours.position.data.copy_(theirs.position_embedding.weight)
    for h, w in ((16, 16), (8, 20), (24, 3)):
        expected = theirs.interpolate_pos_encoding(torch.empty(1, h * w, 8), 2 * h, 2 * w)
        torch.testing.assert_close(ours.places(h, w)[None], expected)


def test_runs_of_times():
    time = torch.tensor([[-1, -1, 5, 5, 5, -1], [-1, 7, 7, 7, 9, 9]], dtype=torch.int32)
    number, values = runs(time, 7)
    assert values.tolist() == [-1, 5, -1, 7, 9, -1, -1]
    assert torch.equal(values[number], time) and number.shape == time.shape
    number, values = runs(torch.full((2, 3), -1), 1)
    assert values.tolist() == [-1] and not number.any()


def test_frequencies_are_llama3s():
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "high_freq_factor": 4.0,
        "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=2048, num_attention_heads=32, head_dim=64, rope_parameters=rope)
    theirs, scaling = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    assert scaling == 1.0
    torch.testing.assert_close(llama3_frequencies(64, 500000.0, CPU).float(), theirs, rtol=1e-6, atol=0)


def test_clock_is_the_official_codes():
    """Sinusoids of the time itself in [0, 1], as diffusers' `Timesteps` gives them; then Linear, SiLU, Linear."""
    clock = ClockEmbedding(6)
    times = torch.tensor([0, 250_000, UNIT])
    waves = get_timestep_embedding(times / UNIT, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(sinusoids(times / UNIT), waves, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(clock(times), clock[2](F.silu(clock[0](waves))), rtol=1e-5, atol=1e-6)


LAYERS = TrunkConfig(num_layers=2, hidden_size=16, num_attention_heads=2, num_query_groups=1, ffn_hidden_size=24)


def attended(n=12):
    meta = torch.zeros(2, 6, n, dtype=torch.int32)
    mask = masks.with_spans(n, [(first, first + 4) for _, first, _, _ in PLACES[:2]])
    meta[:, :3], meta[:, 3] = torch.from_numpy(mask), torch.arange(n)
    return SimpleNamespace(meta=meta)


def test_flow_head_starts_at_zero_and_hears_of_time():
    head = FlowHead(8, LAYERS, 4, PlainOps())
    assert head.out.weight.init_std == head.modulate.weight.init_std == 0.0  # the engine draws weights by these
    head, hidden = randomised(head), torch.randn(2, 12, 8, dtype=torch.float64)
    time = torch.full((2, 12), -1, dtype=torch.int32)
    time[inside()] = 300_000
    out = head(hidden, time, 3, attended())
    later = time.clone()
    later[0, 6:10] = 700_000
    changed = (head(hidden, later, 3, attended()) != out).any(-1)
    assert changed[0, 6:].all(), "an image whose time it is, and what sees it"
    assert not changed[0, :6].any() and not changed[1].any()


def test_flow_head_has_the_published_parameters():
    """Layer by layer what `DiffusionHeadConfig`, `ModulatedAttentionBlock` and `FinalLayer` of the official code have,
    and around them `diff_proj` and `time_embed`."""
    with torch.device("meta"):
        head = FlowHead(3584, ShowoFlowConfig().flow_head, 64, PlainOps())
    attention = 2048 * 2048 * 2 + 2 * 2048 * 512 + 2 * 64
    layer = attention + 3 * 2048 * 8192 + 2 * 2048 + (2048 + 1) * 6 * 2048
    final = 2048 + (2048 + 1) * 64 + (2048 + 1) * 2 * 2048
    inward, clock = (3584 + 1) * 2048 + (2048 + 1) * 2048, (256 + 1) * 2048 + (2048 + 1) * 2048
    assert sum(p.numel() for p in head.parameters()) == 10 * layer + final + inward + clock
