"""From dense models to one with experts: feed-forwards are where they belong, and equal experts are the dense model."""

from dataclasses import replace

import pytest
import torch
from distributed import run_ranks
from test_convert_lora import BASE, LORA, logits, save

from megatron_mm.convert import main
from megatron_mm.engines.derived import checkpoint_config
from megatron_mm.engines.whole_weights import load_whole_weights
from megatron_mm.nn.lora import merge
from megatron_mm.parallel.distributed import single_process

pytestmark = pytest.mark.slow

MLP = replace(LORA, lora=replace(LORA.lora, targets=("decoder.layers.*.mlp.*",)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assembly")
    run_ranks(save, 1, BASE, folder / "base")
    for name, seed in (("one", 1), ("two", 2)):
        config = replace(MLP, train=replace(MLP.train, seed=seed))
        run_ranks(save, 1, config, folder / name, folder / "base")
    return folder


def assemble(folder, checkpoints, out, *overrides):
    given = ",".join(str(folder / name) for name in checkpoints)
    run = lambda init: main(["assemble_experts", f"checkpoints=[{given}]", f"out={folder}/{out}", *overrides])  # noqa: E731
    run_ranks(run, 1)


@pytest.mark.parametrize("frequency", [1, 2])
def test_equal_experts_are_the_dense_model(frequency, folder):
    out = f"equal{frequency}"
    assemble(folder, ["base"] * 3, out, f"model.trunk.moe_layer_freq={frequency}")
    config = checkpoint_config(folder / out)
    assert (config.model.trunk.num_experts, config.model.trunk.moe_layer_freq) == (3, frequency)
    assembled = run_ranks(logits, 1, config, folder / out)[0]
    torch.testing.assert_close(assembled, run_ranks(logits, 1, BASE, folder / "base")[0], rtol=0, atol=2e-5)


def weights_of(init, folder, *names):
    with single_process(torch.device("cpu")):
        return [load_whole_weights(folder / name) for name in names]


def test_each_expert_is_a_models_merged_feed_forward(folder):
    assemble(folder, ["one", "two"], "mixed", "model.trunk.moe_layer_freq=2", "lora.rank=2")
    config = checkpoint_config(folder / "mixed")
    assert config.lora.rank == 2, "overrides win"
    mixed, one, two = run_ranks(weights_of, 1, folder, "mixed", "one", "two")[0]
    dense = [merge(weights, MLP.lora.scale) for weights in (one, two)]
    for part in ("linear_fc1", "linear_fc2"):
        experts = mixed[f"decoder.layers.0.mlp.experts.experts.{part}.weight"]
        for expert, weights in zip(experts, dense, strict=True):
            assert torch.equal(expert, weights[f"decoder.layers.0.mlp.{part}.weight"])
        assert not torch.equal(*experts)
        # The second layer stays dense, and the first model's.
        assert torch.equal(
            mixed[f"decoder.layers.1.mlp.{part}.weight"], dense[0][f"decoder.layers.1.mlp.{part}.weight"]
        )
    assert 0.01 < mixed["decoder.layers.0.mlp.router.weight"].std() < 0.03
    assert not any("lora" in name for name in mixed)


@pytest.mark.parametrize(
    ("checkpoints", "said"),
    [
        (["base"], r"checkpoints= must name two dense models or more"),
        (["base", "done"], r"done has experts already: give dense models"),
        (["base", "none"], r"none holds no checkpoint"),
    ],
)
def test_mistakes_are_one_sentence(checkpoints, said, folder):
    if "done" in checkpoints and not (folder / "done").exists():
        assemble(folder, ["base"] * 2, "done")
    with pytest.raises(AssertionError, match=said):
        assemble(folder, checkpoints, "never")
