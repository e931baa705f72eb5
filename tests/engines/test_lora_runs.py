"""Runs with adapters: one curve under every layout, dropout of the adapters on; only what is named moves."""

from functools import partial

import pytest
from tiny_runs import overrides_for, run_training

TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
SP, VPP = "parallel.sequence_parallel=true", "parallel.virtual_pipeline_model_parallel_size=2"
LAYOUTS = {
    "tp2": (2, [TP]),
    "tp2_sp": (2, [TP, SP]),
    "pp2_interleaved": (2, [PP, VPP]),
    "dp2_overlap": (2, ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
    "cp2": (2, ["parallel.context_parallel_size=2"]),
    "recompute_full": (1, ["parallel.recompute_granularity=full"]),
    "micro_batch_2": (1, ["train.micro_batch_size=2"]),
    "tp2_sp_pp2": (4, [TP, SP, PP]),
}
FAST = ("tp2_sp", "pp2_interleaved")
LORA = [
    "lora.rank=3",
    "lora.dropout=0.2",
    "lora.targets=[decoder.layers.*.mlp.*,'decoder.layers.[13].self_attention.*',front.patch_*,back.patch_*]",
    "lora.also_train=[front.embedding.*]",
    "train.train_iters=5",
    "optim.lr=1e-2",
]
FP64 = ["train.precision=fp64", "parallel.use_distributed_optimizer=false"]


@pytest.fixture(scope="module")
def baseline(one_process):
    return partial(one_process, "transfusion", *LORA)


def assert_same_curve(steps, expected, tolerance, norm_tolerance):
    for ours, theirs in zip(steps, expected, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=norm_tolerance)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in LAYOUTS])
def test_one_curve(name, precision, shards, tmp_path, baseline):
    world_size, overrides = LAYOUTS[name]
    if precision == "fp64" and name == "dp2_overlap":
        pytest.skip("fp64 has no distributed optimizer, and overlap needs it")
    extra = FP64 if precision == "fp64" else []
    steps = run_training(overrides_for("transfusion", shards, tmp_path, *LORA, *overrides, *extra), world_size)
    assert_same_curve(steps, baseline(*extra), *((1e-9, 1e-9) if extra else (1e-5, 1e-4)))


EXPERTS = ["lora.targets=[decoder.layers.*]", "lora.also_train=[decoder.layers.*.router.weight]"]
EP2 = "parallel.expert_model_parallel_size=2"


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [[EP2, TP, SP], [TP, SP], [EP2]],
    ids=["ep2_in_tp2", "tp2", "ep2"],
)
def test_adapters_of_experts(overrides, shards, tmp_path, one_process):
    run = [*LORA, *FP64, *EXPERTS]
    steps = run_training(overrides_for("transfusion_experts", shards, tmp_path, *run, *overrides), 2)
    assert_same_curve(steps, one_process("transfusion_experts", *run), 1e-9, 1e-9)


def test_the_curve_depends_on_the_adapters_dropout(shards, tmp_path, baseline):
    steps = run_training(overrides_for("transfusion", shards, tmp_path, *LORA, "lora.dropout=0.0"))
    with pytest.raises(AssertionError):
        assert_same_curve(steps, baseline(), 1e-5, 1e-4)
