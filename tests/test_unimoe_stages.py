"""Uni-MoE's three stages on tiny models: connector, an expert each by adapters, assembly, all together; then text."""

import pytest
import torch
from distributed import run_ranks
from PIL import Image
from tiny_runs import make_shards, overrides_for, run_training

from megatron_mm.config.generate import SamplingConfig
from megatron_mm.convert import main
from megatron_mm.engines.whole_weights import load_whole_weights
from megatron_mm.parallel.distributed import single_process
from megatron_mm.sampling.generation import generate
from megatron_mm.sampling.model import SamplingModel

pytestmark = pytest.mark.slow

SAVE = ["checkpoint.save=${run.dir}/checkpoints", "train.train_iters=3", "optim.lr=1e-2", "optim.lr_warmup_iters=1"]
EP2 = ["parallel.expert_model_parallel_size=2", "parallel.tensor_model_parallel_size=2",
       "parallel.sequence_parallel=true"]  # fmt: skip


def weights_of(init, *folders):
    with single_process(torch.device("cpu")):
        return [load_whole_weights(folder) for folder in folders]


def changed(before, after) -> set[str]:
    """Names of `before` whose weights are others in `after`."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def say(init, checkpoint):
    with SamplingModel.load(checkpoint) as model:
        image = model.read_image(Image.new("RGB", (8, 8), "red"))
        texts = generate(model, [[image]], "text", SamplingConfig(max_new_tokens=4))
        with pytest.raises(ValueError, match="write=image is not what a unimoe model is trained for"):
            generate(model, [[]], "image")
        return [[len(segment.ids) for segment in continuation] for continuation in texts]


def test_the_three_stages(tmp_path):
    make_shards(tmp_path)

    def run(name, *overrides, load=None, world_size=1):
        given = [f"checkpoint.load={tmp_path}/{load}"] if load else []
        # SAVE last: an experiment's checkpoint.save=null is in what it overrides.
        run_training(overrides_for("unimoe", tmp_path, tmp_path / name, *overrides, *SAVE, *given), world_size)
        return f"{name}/checkpoints"

    dense = ["model.trunk.moe_layer_freq=1"]
    aligned = run("aligned", "stage=unimoe/alignment", *dense)
    experts = [
        run(f"expert{seed}", "stage=unimoe/expert", *dense, f"train.seed={seed}", "lora.rank=2", load=aligned)
        for seed in (1, 2)
    ]
    folders = ",".join(str(tmp_path / expert) for expert in experts)
    run_ranks(lambda init: main(["assemble_experts", f"checkpoints=[{folders}]", f"out={tmp_path}/assembled",
                                 "model.trunk.moe_layer_freq=2"]), 1)  # fmt: skip
    unified = run("unified", "stage=unimoe/unify", "model.trunk.num_experts=2", *EP2, load="assembled", world_size=2)
    first, one, assembled, last = run_ranks(
        weights_of, 1, *(tmp_path / name for name in (aligned, experts[0], "assembled", unified))
    )[0]
    connector = {"front.vision.adaptor.weight", "front.vision.adaptor.bias"}
    assert changed(first, one) == connector, "beside what is new: adapters"
    assert {name for name in one if name.endswith("lora_B") and one[name].any()} >= {
        f"decoder.layers.{n}.mlp.{part}.lora_B" for n in range(4) for part in ("linear_fc1", "linear_fc2")
    }
    routers = {f"decoder.layers.{n}.mlp.router.weight" for n in (0, 2)}
    assert changed(assembled, last) == connector | routers
    assert last["decoder.layers.0.mlp.experts.experts.linear_fc1.lora_B"].any(), "experts have adapters of their own"
    assert "decoder.layers.1.self_attention.linear_qkv.lora_A" in last and "back.head.lora_A" not in last
    (written,) = run_ranks(say, 1, tmp_path / unified)[0]
    assert len(written) <= 1
