"""Adapters: forward and gradients against peft and against the gradients of the weights they add up to."""

import pytest
import torch
from distributed import run_ranks
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from sharded import assemble
from torch import nn
from trunk_runs import config_of, run_trunk, shapes

from megatron_mm.config.compose import ConfigError
from megatron_mm.config.model import TrunkConfig
from megatron_mm.config.schema import LoraConfig
from megatron_mm.parallel.lora import LoraLinear

TRUNK = TrunkConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, hidden_dropout=0.2)
LORA = LoraConfig(rank=3, alpha=5.0)
SCALE = LORA.alpha / LORA.rank
TP2 = {"tensor_model_parallel_size": 2}
LAYOUTS = {
    "one": {},
    "tp2": TP2,
    "tp2_sp": TP2 | {"sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "recompute": {"recompute_granularity": "full"},
    "tp2_sp_feed_forward_blocks": TP2 | {"sequence_parallel": True, "feed_forward_block": 8},
}


def test_a_familys_linear_layer_is_pefts():
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(7, 5)).double()
    ours = LoraLinear.of(theirs[0])
    theirs = inject_adapter_in_model(PeftConfig(r=3, lora_alpha=5, target_modules=["0"]), theirs).double()
    down, up = theirs[0].lora_A["default"].weight, theirs[0].lora_B["default"].weight
    ours.attach(LORA, "layer", seed=0)
    with torch.no_grad():
        for mine, other in ((ours.lora_A, down), (ours.lora_B, up)):
            mine.copy_(other.normal_())
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    out, expected = ours(x), theirs(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.lora_A.grad, down.grad, rtol=0, atol=1e-13)
    torch.testing.assert_close(ours.lora_B.grad, up.grad, rtol=0, atol=1e-13)


@pytest.fixture(scope="module")
def oracle():
    """Weights of base and adapters; logits and losses of the merged model, and what its gradients come to in A and B:
    with W = W0 + s B A, dB = s dW A^T and dA = s B^T dW."""
    config = config_of(TRUNK, "fp64", LORA)
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1  # noqa: E731
    weights = {
        name: draw(shape) if len(shape) > 1 else 1 + draw(shape)
        for name, shape in run_ranks(shapes, 1, config)[0].items()
    }
    downs = [name for name in weights if name.endswith("lora_A")]
    merged = {name: weight for name, weight in weights.items() if "lora_" not in name}
    for name in downs:
        layer = name.removesuffix("lora_A")
        merged[f"{layer}weight"] = merged[f"{layer}weight"] + SCALE * weights[f"{layer}lora_B"] @ weights[name]
    (plain,) = run_ranks(run_trunk, 1, config_of(TRUNK, "fp64"), merged, False)
    gradients = assemble([plain[2]])
    expected = {}
    for name in downs:
        layer = name.removesuffix("lora_A")
        whole = gradients[f"{layer}weight"]
        expected[f"{layer}lora_B"] = SCALE * whole @ weights[name].T
        expected[name] = SCALE * weights[f"{layer}lora_B"].T @ whole
    assert len(expected) == 2 * 4 * TRUNK.num_layers
    return weights, plain[0], plain[1], expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_adapters_in_the_trunk_are_exact_under_every_layout(name, oracle):
    weights, logits, losses, expected = oracle
    config = config_of(TRUNK, "fp64", LORA, **LAYOUTS[name])
    results = run_ranks(run_trunk, config.parallel.model_parallel_size, config, weights, False)
    torch.testing.assert_close(results[-1][0], logits, rtol=0, atol=1e-12)
    assert results[0][1] == pytest.approx(losses, rel=1e-12)
    gradients = assemble([result[2] for result in results])
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected.get(key, torch.zeros(gradient.shape, dtype=gradient.dtype)),
                                   rtol=0, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")  # fmt: skip


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (
            LoraConfig(rank=2, targets=("decoder.layers.*.mpl.*",)),
            r"lora\.targets: .*mpl.* none of the 8 linear layers",
        ),
        (LoraConfig(rank=2, also_train=("fornt.*",)), r"lora\.also_train: fornt.* none of the \d+ parameters"),
    ],
)
def test_patterns_that_match_nothing_are_refused(lora, said):
    def build(init):
        with pytest.raises(ConfigError, match=said):
            shapes(init, config_of(TRUNK, lora=lora))

    run_ranks(build, 1)
