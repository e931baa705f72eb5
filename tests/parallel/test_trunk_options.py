"""Each option of the trunk, alone and together, against the block spelled out in plain torch, in fp64: what an option
changes is changed, in the weights, in the loss and in every gradient, and nothing else is."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from sharded import assemble
from trunk_runs import KEYS, VOCAB, Z_WEIGHT, config_of, documents, run_trunk, shapes

from megatron_mm.config.model import TrunkConfig
from megatron_mm.mask import dense
from megatron_mm.nn.dropout import hash_tokens, hashed_dropout
from megatron_mm.types import IGNORE

LLAMA = TrunkConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, rotary_base=500.0)
OPTIONS = {
    "llama": {},
    "layernorm": {"normalization": "LayerNorm"},
    "layernorm_swin": {"normalization": "LayerNorm", "norm_placement": "swin"},
    "gelu": {"activation": "gelu"},
    "biases": {"add_bias_linear": True},
    "biases_swin": {"add_bias_linear": True, "norm_placement": "swin"},
    "qkv_bias": {"add_qkv_bias": True},
    "gelu_biases": {"activation": "gelu", "add_bias_linear": True},
    "parallel_block": {"parallel_block": True, "hidden_dropout": 0.3},
    "partial_rope": {"rotary_percent": 0.5},
    "head_bias": {"head_bias": True},
    "phi": {
        "normalization": "LayerNorm", "activation": "gelu", "add_bias_linear": True, "parallel_block": True,
        "rotary_percent": 0.5, "head_bias": True, "qk_layernorm": True, "hidden_dropout": 0.3,
    },
}  # fmt: skip
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "one": {},
    "tp2_sp": TP2,
    "feed_forward_blocks": {"feed_forward_block": 10},
    "tp2_sp_feed_forward_blocks": TP2 | {"feed_forward_block": 8},
    "recompute": {"recompute_granularity": "full"},
}


def turned(x: torch.Tensor, trunk: TrunkConfig) -> torch.Tensor:
    """RoPE of x [n, H, Dh]: of its first w channels, pairs (i, i + w / 2) as complex numbers."""
    w = int(trunk.rotary_percent * x.shape[-1])
    angles = torch.arange(len(x))[:, None] * trunk.rotary_base ** (-torch.arange(0, w, 2, dtype=x.dtype) / w)
    pairs = torch.complex(x[..., : w // 2], x[..., w // 2 : w]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([pairs.real, pairs.imag, x[..., w:]], -1)


def plain_logits(weights, trunk: TrunkConfig, seed: int, document, key: int) -> torch.Tensor:
    """Logits [n, V] of one document, with dropout; asks `weights` for every weight that the options say there is."""
    n = len(document.tokens)
    eps = trunk.layernorm_epsilon

    def norm(x, name):
        if trunk.normalization == "LayerNorm":
            return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], eps)

    def linear(x, name, bias=trunk.add_bias_linear):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"] if bias else None)

    def head_norm(x, name):
        if not trunk.qk_layernorm:
            return x
        return F.layer_norm(x, x.shape[-1:], eps=eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(x, name):
        g, per_group = trunk.kv_heads, trunk.num_attention_heads // trunk.kv_heads
        mixed = linear(x, f"{name}.linear_qkv", trunk.add_bias_linear or trunk.add_qkv_bias)
        mixed = mixed.view(n, g, per_group + 2, -1)
        q, k, v = mixed[:, :, :per_group].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]
        q, k = turned(head_norm(q, f"{name}.q_layernorm"), trunk), turned(head_norm(k, f"{name}.k_layernorm"), trunk)
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        mask = torch.from_numpy(dense(document.mask))
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=True)[0]
        return linear(out.transpose(0, 1).flatten(1), f"{name}.linear_proj")

    def feed_forward(x, name):
        inner = linear(x, f"{name}.linear_fc1")
        if trunk.activation == "swiglu":
            gate, up = inner.chunk(2, -1)
            inner = gate * torch.sigmoid(gate) * up
        else:
            inner = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
        return linear(inner, f"{name}.linear_fc2")

    def drop(x, site):
        keys, positions = torch.full((n,), key, dtype=torch.int32), torch.arange(n, dtype=torch.int32)
        return hashed_dropout(x, trunk.hidden_dropout, hash_tokens(keys, positions, site))

    h = weights["front.embedding.weight"][torch.from_numpy(document.tokens)]
    for i in range(trunk.num_layers):
        layer, site = f"decoder.layers.{i}", 2 * (seed * trunk.num_layers + i + 1)
        one, two = f"{layer}.self_attention", f"{layer}.mlp"
        if trunk.parallel_block:
            x = norm(h, f"{layer}.input_layernorm")
            h = h + drop(attention(x, one), site) + drop(feed_forward(x, two), site + 1)
        elif trunk.norm_placement == "swin":
            h = h + drop(norm(attention(h, one), f"{layer}.self_attn_bda.norm"), site)
            h = h + drop(norm(feed_forward(h, two), f"{layer}.mlp_bda.norm"), site + 1)
        else:
            h = h + drop(attention(norm(h, f"{layer}.input_layernorm"), one), site)
            h = h + drop(feed_forward(norm(h, f"{layer}.pre_mlp_layernorm"), two), site + 1)
    return linear(norm(h, "decoder.final_layernorm"), "back.head", trunk.head_bias)[:, :VOCAB]


def plain_step(weights, trunk: TrunkConfig, seed: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses and the gradient of every weight; a weight that the block has no use for is an error."""
    weights = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    losses, log_zs = [], []
    for row, keys in zip(documents(spans=True), KEYS, strict=True):
        for document, key in zip(row, keys, strict=True):
            logits = plain_logits(weights, trunk, seed, document, key)
            labels = torch.from_numpy(document.fields["labels"])
            losses.append(F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)[:-1])
            log_zs.append(logits[:-1].logsumexp(-1))
    terms = {"ce": torch.cat(losses).mean(), "z": torch.cat(log_zs).square().mean()}
    gradients = torch.autograd.grad(terms["ce"] + Z_WEIGHT * terms["z"], list(weights.values()))
    return {name: term.item() for name, term in terms.items()}, dict(zip(weights, gradients, strict=True))


def random_weights(config) -> dict[str, torch.Tensor]:
    """Of the shapes that the model has."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    (names,) = run_ranks(shapes, 1, config)
    norms = {name for name in names if "norm" in name and name.endswith("weight")}
    return {name: 1 + 0.3 * draw(shape) if name in norms else 0.3 * draw(shape) for name, shape in names.items()}


@pytest.fixture(scope="module")
def expected():
    """Option -> (weights, losses, gradients)."""
    results = {}

    def get(option):
        if option not in results:
            config = config_of(replace(LLAMA, **OPTIONS[option]), "fp64")
            weights = random_weights(config)
            results[option] = weights, *plain_step(weights, config.model.trunk, config.train.seed)
        return results[option]

    return get


CASES = [(option, "one") for option in OPTIONS]
CASES += [(option, "tp2_sp") for option in ("layernorm_swin", "biases", "biases_swin", "qkv_bias", "phi")]
CASES += [("phi", layout) for layout in LAYOUTS if layout not in ("one", "tp2_sp")]


@pytest.mark.parametrize(("option", "layout"), CASES)
def test_the_block_is_what_its_options_say(option, layout, expected):
    weights, losses, gradients = expected(option)
    config = config_of(replace(LLAMA, **OPTIONS[option]), "fp64", **LAYOUTS[layout])
    results = run_ranks(run_trunk, config.parallel.model_parallel_size, config, weights, True)
    assert results[-1][1] == pytest.approx(losses, rel=1e-12)
    ours = assemble([shards for *_, shards in results])
    assert ours.keys() == gradients.keys()
    for name, theirs in gradients.items():
        assert theirs.abs().max() > 0, f"{name} is not exercised"
        torch.testing.assert_close(ours[name], theirs, rtol=0, atol=1e-11 * float(theirs.abs().max()), msg=name)


def test_default_widths():
    """Phi-1.5's 8192 at 2048; Llama's rule for swiglu."""
    gelu = TrunkConfig(hidden_size=2048, activation="gelu")
    assert (gelu.ffn_size, TrunkConfig(hidden_size=4096).ffn_size) == (8192, 11008)
    assert replace(gelu, ffn_hidden_size=100).ffn_size == 100
