"""Every layout starts from the same weights."""

import math
from dataclasses import replace

import pytest
import torch
from distributed import run_ranks
from sharded import assemble, local_shards
from transformers import SiglipVisionConfig, SiglipVisionModel

from megatron_mm.config.compose import Config
from megatron_mm.config.flow import ShowoFlowConfig
from megatron_mm.config.janus import EncoderConfig, JanusConfig
from megatron_mm.config.model import ChameleonConfig, ImageConfig, TransfusionConfig, TrunkConfig
from megatron_mm.config.schema import LoraConfig, ParallelConfig, TrainConfig
from megatron_mm.config.unimoe import UniMoEConfig
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.build import build_chunks
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.parallel.draw import Normal

TP, PP, VPP = (f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "virtual_pipeline_model"))
TRUNK = TrunkConfig(num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, qk_layernorm=True)
EP = "expert_model_parallel_size"
MODELS = {
    "chameleon": ChameleonConfig(trunk=TRUNK, image_codes=16),
    "swin": ChameleonConfig(trunk=replace(TRUNK, norm_placement="swin"), image_codes=16),
    "phi": ChameleonConfig(
        trunk=replace(
            TRUNK,
            normalization="LayerNorm",
            activation="gelu",
            add_bias_linear=True,
            parallel_block=True,
            head_bias=True,
        ),
        image_codes=16,
    ),
    "biased_swiglu": ChameleonConfig(trunk=replace(TRUNK, add_bias_linear=True), image_codes=16),
    "experts": ChameleonConfig(trunk=replace(TRUNK, num_experts=4, moe_layer_freq=3), image_codes=16),
    "janus": JanusConfig(trunk=TRUNK, image_codes=16, encoder=EncoderConfig(24, 2, 2, image_size=8, patch_size=4)),
    "transfusion": TransfusionConfig(trunk=TRUNK, image=ImageConfig(height=8, width=8), patch_codec="unet"),
}
OTHERS = {
    "showo_flow": ShowoFlowConfig(
        trunk=TRUNK,
        image=ImageConfig(channels=4, height=4, width=4),
        semantic_hidden_size=16,
        semantic_layers=1,
        semantic_heads=2,
        semantic_ffn_size=32,
        flow_layers=1,
    ),
    "unimoe": UniMoEConfig(
        trunk=replace(TRUNK, num_experts=4), encoder=EncoderConfig(16, 1, 2, image_size=8, patch_size=4)
    ),
}
CPU = torch.device("cpu")


def shards(init, model, seed, parallel):
    config = Config(model=model, parallel=ParallelConfig(**parallel), train=TrainConfig(seed=seed))
    with process_groups(config.parallel, seed, CPU, **init) as layout:
        torch.manual_seed(layout.rank)  # nothing may depend on the ordinary generator
        return local_shards(build_chunks(config, build_family(model, 256), layout, CPU))


def weights(name, seed=0, **parallel):
    return weights_of(MODELS[name], seed, **parallel)


def weights_of(model, seed=0, ranks=None, **parallel):
    ranks = ranks or ParallelConfig(**parallel).model_parallel_size
    return assemble(run_ranks(shards, ranks, model, seed, parallel))


@pytest.fixture(scope="module")
def whole():
    return {name: weights(name) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parallel", [{TP: 2}, {PP: 2}, {PP: 2, VPP: 2}, {TP: 2, PP: 2}], ids=str)
def test_every_layout_has_the_same_weights(whole, name, parallel):
    ours = weights(name, **parallel)
    assert ours.keys() == whole[name].keys()
    for key, weight in whole[name].items():
        assert torch.equal(ours[key], weight), key


@pytest.mark.parametrize("parallel", [{EP: 2}, {EP: 2, TP: 2, "sequence_parallel": True}, {EP: 2, PP: 2}], ids=str)
def test_experts_have_the_same_weights_wherever_they_are(whole, parallel):
    ours = weights("experts", ranks=4, **parallel)
    assert ours.keys() == whole["experts"].keys()
    for key, weight in whole["experts"].items():
        assert torch.equal(ours[key], weight), key


@pytest.mark.parametrize("name", ["chameleon", "phi", "experts"])
def test_weights_follow_their_rule(whole, name):
    for key, weight in whole[name].items():
        if key.endswith("bias") or "layernorm" in key:
            assert (weight == (0 if key.endswith("bias") else 1)).all(), key
            continue
        std = 0.02 / math.sqrt(2 * 4) if key.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0.02
        assert abs(weight.std() / std - 1) < 5 / math.sqrt(2 * weight.numel()), key
        assert abs(weight.mean() / std) < 5 / math.sqrt(weight.numel()), key


@pytest.mark.parametrize("parallel", [{}, {TP: 2, PP: 2}], ids=str)
def test_a_pretrained_encoder_takes_the_place_of_drawn_weights(whole, parallel, tmp_path):
    torch.manual_seed(7)
    sizes = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    siglip = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=8, patch_size=4, hidden_act="gelu"))
    siglip.save_pretrained(tmp_path)
    ours = weights_of(replace(MODELS["janus"], encoder_path=str(tmp_path)), **parallel)
    theirs = {f"front.vision.encoder.{name}": weight for name, weight in siglip.state_dict().items()}
    assert {name for name in ours if ".encoder." in name} < theirs.keys(), "all but the pooling head"
    for name, weight in ours.items():
        assert torch.equal(weight, theirs.get(name, whole["janus"][name])), name
    patch = "front.vision.encoder.embeddings.patch_embedding.weight"
    assert not torch.equal(ours[patch], whole["janus"][patch])


@pytest.mark.parametrize("name", ["chameleon", "experts"])
def test_no_two_weights_are_alike(name, whole):
    """Nor are the halves of a joined matrix, the layers, the experts, or two seeds."""
    drawn = [w for k, w in whole[name].items() if "layernorm" not in k]
    drawn += [w for k, w in weights(name, seed=1).items() if "layernorm" not in k]
    rows = torch.cat([w.flatten().unfold(0, 16, 16) for w in drawn])
    assert len(rows.unique(dim=0)) == len(rows)


def drawn_and_held(init, parallel, fresh, monkeypatch):
    """How many numbers a rank draws, how many its matrices hold, and its chunks' weights."""
    count = []
    monkeypatch.setattr(Normal, "__call__", lambda self, bits: count.append(bits.numel()) or torch.zeros(bits.shape))
    config = Config(model=MODELS["janus"], parallel=ParallelConfig(**parallel), lora=LoraConfig(rank=2))
    with process_groups(config.parallel, 0, CPU, **init) as layout:
        chunks = build_chunks(config, build_family(config.model, 256), layout, CPU, fresh)
        return sum(count), {name: p.numel() for chunk in chunks for name, p in chunk.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("parallel", [{TP: 2}, {PP: 2}], ids=str)
def test_a_rank_draws_no_more_than_it_holds(parallel, monkeypatch):
    for drawn, held in run_ranks(drawn_and_held, 2, parallel, "all", monkeypatch):
        assert 0.9 * sum(held.values()) < drawn <= sum(held.values())


def test_what_a_checkpoint_brings_is_not_drawn(monkeypatch):
    ((drawn, _),) = run_ranks(drawn_and_held, 1, {}, "none", monkeypatch)
    assert drawn == 0
    ((drawn, held),) = run_ranks(drawn_and_held, 1, {}, "adapters", monkeypatch)
    assert drawn == sum(size for name, size in held.items() if name.endswith("lora_A")) > 0


def built(init, model):
    """A family's weights on memory full of NaN, whose own modules must not draw either."""
    torch.use_deterministic_algorithms(True)
    config = Config(model=model)
    with process_groups(config.parallel, 0, CPU, **init) as layout:
        before = torch.get_rng_state()
        (chunk,) = build_chunks(config, build_family(model, 256), layout, CPU)
        assert torch.equal(torch.get_rng_state(), before), "something was drawn twice"
        return {name: parameter.isfinite().all().item() for name, parameter in chunk.named_parameters()}


@pytest.mark.parametrize("name", ["phi", "janus", "transfusion", "showo_flow", "unimoe"])
def test_every_weight_is_drawn_once(name):
    (finite,) = run_ranks(built, 1, {**MODELS, **OTHERS}[name])
    assert all(finite.values()), [name for name, is_finite in finite.items() if not is_finite]
