"""Runs with experts: one curve and one router load under every layout, dropout on."""

from functools import partial

import pytest
from tiny_runs import overrides_for, run_training

TP = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PP, VPP = "parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"
EP, EP4 = "parallel.expert_model_parallel_size=2", "parallel.expert_model_parallel_size=4"
CP, FULL = "parallel.context_parallel_size=2", "parallel.recompute_granularity=full"
PLAIN = "parallel.use_distributed_optimizer=false"
GROUPED = "model.trunk.moe_grouped_gemm=true"
GATHER = "model.trunk.moe_token_dispatcher_type=allgather"
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
LAYOUTS = {
    "ep2": (2, [EP]),
    "ep2_allgather": (2, [EP, GATHER]),
    "ep2_plain_optimizer": (2, [EP, PLAIN]),
    "ep2_overlap": (2, [EP, *OVERLAP]),
    "ep4": (4, [EP4]),
    "dp2": (2, []),
    "tp2": (2, TP),
    "ep2_in_tp2": (2, [EP, *TP]),
    "ep2_tp2": (4, [EP, *TP]),
    "ep2_tp2_allgather": (4, [EP, *TP, GATHER]),
    "ep4_tp2": (4, [EP4, *TP]),
    "ep2_pp2_interleaved": (4, [EP, PP, VPP]),
    "pp2": (2, [PP]),
    "ep2_in_cp2": (2, [EP, CP]),
    "ep2_cp2": (4, [EP, CP]),
    "recompute_full": (1, [FULL]),
    "ep2_tp2_recompute_full": (2, [EP, *TP, FULL]),
    "grouped": (1, [GROUPED]),
    "ep2_tp2_grouped": (2, [EP, *TP, GROUPED]),
    "ep2_grouped_overlap": (2, [EP, GROUPED, *OVERLAP]),
    "micro_batch_2": (1, ["train.micro_batch_size=2"]),
}
FAST = ("ep2", "ep2_in_tp2")
IN_FP64 = ("ep2_tp2", "ep2_pp2_interleaved", "ep2_in_cp2")
"""Layouts of the suite that are checked in fp64, too; the others in the exhaustive one."""
# In fp32 a token near a tie takes either expert, by how its row was summed: this seed's runs have none.
SHORT = ["train.train_iters=5", "optim.lr=1e-2", "train.seed=7"]
FP64 = ["train.precision=fp64", PLAIN]


@pytest.fixture(scope="module")
def baseline(one_process):
    return partial(one_process, "transfusion_experts", *SHORT)


def assert_same_curve(steps, expected, tolerance, norm_tolerance):
    for iteration, (ours, theirs) in enumerate(zip(steps, expected, strict=True), 1):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance), f"iteration {iteration}"
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=norm_tolerance), f"iteration {iteration}"
        assert ours["router"] == theirs["router"], f"iteration {iteration}"


def cases():
    """(layout, precision). What fp64 has not: the distributed optimizer's overlap, and grouped products."""
    for name in LAYOUTS:
        yield pytest.param(name, "fp32", marks=() if name in FAST else pytest.mark.slow)
        if "overlap" not in name and "grouped" not in name:
            yield pytest.param(name, "fp64", marks=pytest.mark.slow if name in IN_FP64 else pytest.mark.exhaustive)


@pytest.mark.parametrize(("name", "precision"), cases())
def test_one_curve(name, precision, shards, tmp_path, baseline):
    world_size, overrides = LAYOUTS[name]
    extra = FP64 if precision == "fp64" else []
    steps = run_training(overrides_for("transfusion_experts", shards, tmp_path, *SHORT, *overrides, *extra), world_size)
    assert_same_curve(steps, baseline(*extra), *((1e-9, 1e-9) if extra else (1e-5, 1e-4)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ep2_in_tp2", "tp2", "ep2_pp2_interleaved"])
def test_experts_with_biases(name, shards, tmp_path, one_process):
    world_size, overrides = LAYOUTS[name]
    run = [*SHORT, *FP64, "model.trunk.add_bias_linear=true", "model.trunk.activation=gelu"]
    steps = run_training(overrides_for("transfusion_experts", shards, tmp_path, *run, *overrides), world_size)
    assert_same_curve(steps, one_process("transfusion_experts", *run), 1e-9, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ep2_in_tp2", "ep2_in_cp2", "ep2_pp2_interleaved", "micro_batch_2"])
def test_unimoe(name, shards, tmp_path, one_process):
    """Its encoder reads whole images, wherever their positions are."""
    world_size, overrides = LAYOUTS[name]
    run = [*SHORT, *FP64, "model.trunk.moe_aux_loss_coeff=0.05"]
    steps = run_training(overrides_for("unimoe", shards, tmp_path, *run, *overrides), world_size)
    assert_same_curve(steps, one_process("unimoe", *run), 1e-9, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "loaded"), [([GROUPED], [EP]), ([EP], [GROUPED])])
def test_checkpoints_do_not_tell_how_experts_are_multiplied(saved, loaded, shards, tmp_path):
    """Weights of one run, under another layout, in the next: the same as where neither is grouped."""
    curves = []
    for name, first, then in (("plain", [], []), ("grouped", saved, loaded)):
        ranks = [2 if EP in overrides else 1 for overrides in (first, then)]
        folders = [tmp_path / f"{name}{number}" for number in range(2)]
        save = f"checkpoint.save={folders[0]}/checkpoints"
        run_training(overrides_for("transfusion_experts", shards, folders[0], *SHORT, *first, save), ranks[0])
        load = f"checkpoint.load={folders[0]}/checkpoints"
        curves.append(
            run_training(overrides_for("transfusion_experts", shards, folders[1], *SHORT, *then, load), ranks[1])
        )
    assert_same_curve(*curves, 1e-5, 1e-4)


def test_load_is_logged_by_modality_and_layer(baseline):
    router = baseline()[0]["router"]
    assert {name.split("/")[0] for name in router} == {"layer_0", "layer_2", "mean"}
    for row in ("layer_0", "layer_2", "mean"):
        for modality in ("text", "image"):
            assert sum(router[f"{row}/{modality}/{expert}"] for expert in range(4)) == pytest.approx(1)
    assert len(router) == 3 * 2 * 4
    assert 1 <= baseline()[0]["losses"]["load_balancing"] < 2
