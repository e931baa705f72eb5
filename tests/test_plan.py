"""The plan of a run: counts against models that are built, times by hand, a user's mistakes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from distributed import run_ranks

from megatron_mm.config.compose import compose
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.context.predict import Hardware
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.parallel.model import StageModel
from megatron_mm.parallel.sizes import count_parameters
from megatron_mm.parallel.transformer_config import transformer_config
from megatron_mm.plan.__main__ import main
from megatron_mm.plan.memory import LOGITS_BYTES, estimate, layer_activations, parameters
from megatron_mm.plan.time import step_time

LONG = ["experiment=longcontext_1m"]


def _built(init_kwargs: dict, config) -> int:
    with process_groups(config.parallel, 0, torch.device("cpu"), **init_kwargs):
        family = build_family(config.model, 1000)
        core = transformer_config(family.trunk, config.parallel, config.train, "reference")
        stage = StageModel(core, family, first=True, last=True, virtual_stage=None)
        return sum(parameter.numel() for parameter in stage.parameters())


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("tensor_ranks", [1, 2])
def test_weights_are_those_of_the_model(tensor_ranks, activation):
    """All but norms, and the padding of the vocabulary."""
    config = compose(
        [
            "model=chameleon_tiny", "run.name=test", "data.path=none", "model.trunk.hidden_size=128",
            "model.trunk.num_query_groups=2", f"parallel.tensor_model_parallel_size={tensor_ranks}",
            f"model.trunk.activation={activation}",
        ]
    )  # fmt: skip
    counts = run_ranks(_built, tensor_ranks, config)
    ours, whole = parameters(config, build_family(config.model, 1000).vocab.size)
    assert ours == pytest.approx(whole / tensor_ranks)
    assert ours == pytest.approx(counts[0], rel=0.03) and ours < counts[0]


def _beside(_init_kwargs: dict, config) -> int:
    return count_parameters(config, build_family(config.model, 1000)).beside


def test_parts_beside_the_vocabulary_are_on_every_tensor_rank():
    tensor_ranks = "parallel.tensor_model_parallel_size=2"
    config = compose(["model=showo_flow_tiny", "run.name=test", "data.path=none", tensor_ranks])
    built, _ = run_ranks(_built, 2, config)
    (beside,) = run_ranks(_beside, 1, config)
    ours, _ = parameters(config, build_family(config.model, 1000).vocab.size, beside)
    assert ours == pytest.approx(built, rel=0.05)


@pytest.mark.parametrize("expert_ranks", [1, 2])
def test_weights_of_experts_are_those_of_the_model(expert_ranks):
    config = compose(
        [
            "model=chameleon_tiny", "run.name=test", "data.path=none", "model.trunk.hidden_size=128",
            "model.trunk.num_experts=4", "model.trunk.moe_layer_freq=3", "parallel.tensor_model_parallel_size=2",
            "parallel.sequence_parallel=true", f"parallel.expert_model_parallel_size={expert_ranks}",
        ]
    )  # fmt: skip
    counts = run_ranks(_built, 2, config)
    ours, _ = parameters(config, build_family(config.model, 1000).vocab.size)
    assert ours == pytest.approx(counts[0], rel=0.02) and ours < counts[0]


def test_seven_billion():
    """Llama 2 7B, whose trunk this is, has 6.74 billion weights with a vocabulary of 32000."""
    _, whole = parameters(compose(LONG), 32000)
    assert whole == pytest.approx(6.738e9, rel=1e-3)


def test_memory_of_a_million_tokens_by_hand():
    memory = estimate(compose(LONG), 32000, 256)
    assert memory.weights == pytest.approx(2 * 6.738e9 / 8, rel=1e-3)
    assert memory.gradients == 2 * memory.weights
    assert memory.optimizer == pytest.approx(12 * 6.738e9 / 256, rel=1e-3)
    assert memory.kept == 32 * 2**20 / 32 * 4096 / 8 * 2, "the inputs of 32 layers, in bf16, cut by 8 and by 32"
    assert memory.logits == LOGITS_BYTES
    assert memory.total == pytest.approx(sum(vars(memory).values()))
    averaged = estimate(compose([*LONG, "optim.ema_decay=0.999"]), 32000, 256)
    assert averaged.optimizer == pytest.approx(16 * 6.738e9 / 256, rel=1e-3)


def test_activations_of_a_phi_layer_by_hand():
    """Kept of a token: the norm's input and output; q, k, v, the turned q and k, attention's output; fc1 and GELU."""
    options = ("activation=gelu", "parallel_block=true", "hidden_size=64", "num_query_groups=4")
    tiny = ["model=chameleon_tiny", "run.name=test", "data.path=none", *(f"model.trunk.{o}" for o in options)]
    assert layer_activations(compose(tiny)) == 2 * 64 + 6 * 64 + 2 * 256
    assert layer_activations(compose([*tiny, "parallel.feed_forward_block=16"])) == 2 * 64 + 6 * 64


def test_memory_stays_flat_as_ranks_and_context_grow_together():
    sizes = [
        estimate(compose([*LONG, f"data.seq_length={2**15 * ranks}", f"{CP}={ranks}"]), 32000, 8 * ranks)
        for ranks in (8, 16, 32)
    ]
    assert len({(size.kept, size.layer, size.weights) for size in sizes}) == 1
    without = estimate(compose([*LONG, f"{CP}=32", "parallel.recompute_granularity=null"]), 32000, 256)
    assert without.kept > 4 * sizes[-1].kept


CP = "parallel.context_parallel_size"


def test_time_of_one_part_by_hand():
    """No context parallelism: products and pairs at their rates."""
    config = compose(
        ["model=chameleon_7b", "run.name=test", "data.path=none", "data.seq_length=4096", "train.precision=bf16"]
    )
    length = 4096
    mask = np.stack([np.zeros(length), np.arange(1, length + 1)]).astype(np.int32)[None]
    hardware = Hardware(tflops=500, launch_microseconds=0)
    made = step_time(config, 65536, 8, mask, hardware, 600)
    pairs = length * (length + 1) / 2
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 65536
    assert made.pairs == pairs and made.imbalance == 1 and made.received_bytes == 0
    assert made.attention == pytest.approx(3.5 * 32 * 4 * 4096 * pairs / 500e12, rel=1e-6)
    # The head computes its product once more in the backward pass.
    assert made.products == pytest.approx((6 * weights + 2 * 4096 * 65536) * length / 600e12, rel=1e-6)


@pytest.mark.slow
def test_the_command():
    command = [sys.executable, "-m", "megatron_mm.plan", *LONG, "masks=docs"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    length = "1,048,576 tokens a row, 32,768 on each"
    for said in ("6.74B weights", "embedding", length, "fits 80 GB", "MB received a layer"):
        assert said in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["masks=ragged"], "masks=ragged is unknown; masks: full, causal"),
        (["world_size=100"], "context_parallel_size=32 needs a multiple of 256 processes, but the world size is 100"),
        (["product_tflops=fast"], "product_tflops=fast"),
        (["model.trunk.hidden=64"], "model.trunk.hidden is not a known key"),
        (["rehearse=true", "rank=256"], "rank=256 is not one of the 256 ranks: give 0 to 255"),
        (["rank=3"], "rank=3 is the rank to rehearse: give rehearse=true"),
        (["rehearse=true", "search=true"], "give one of them"),
        (["search=true", "trials=0"], "trials=0 must be 1 or more"),
        (["search=true", "gpu_gigabytes=1"], "No layout over world_size=256 comes near 1 GB a GPU: give more GPUs"),
        (["out=layouts.csv"], "out=layouts.csv is the table of a search"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        main([*LONG, *arguments])


def test_a_table_of_other_columns_is_refused_before_the_search(tmp_path):
    (tmp_path / "other.csv").write_text("run,ms\ndemo,1\n")
    with pytest.raises(ValueError, match="other.csv has other columns"):
        main([*LONG, "search=true", f"out={tmp_path}/other.csv"])
