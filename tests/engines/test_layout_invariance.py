"""The promise: one run gives one loss curve under every layout, recompute setting and micro-batch size.

fp32, 20 iterations, dropout on: every logged loss to 1e-5 relative and the grad norm to 1e-4. In fp64 rounding is out
of the way and 1e-9 must hold, so that a real difference cannot hide behind fp32's.
"""

import pytest
from tiny_runs import FAMILIES, SIZES, make_shards, overrides_for, run_training

from megatron_mm.parallel.context import assignment

TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
SP, VPP = "parallel.sequence_parallel=true", "parallel.virtual_pipeline_model_parallel_size=2"
CP, CP4, COMM = (f"parallel.context_parallel_{key}" for key in ("size=2", "size=4", "comm"))
LAYOUTS = {
    "tp2": (2, [TP]),
    "tp2_sp": (2, [TP, SP]),
    "pp2": (2, [PP]),
    "pp2_interleaved": (2, [PP, VPP]),
    "dp2": (2, []),
    "dp2_overlap": (2, ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
    "dp2_plain_optimizer": (2, ["parallel.use_distributed_optimizer=false"]),
    "tp2_pp2": (4, [TP, PP]),
    "tp2_dp2": (4, [TP]),
    "tp2_sp_pp2_interleaved": (4, [TP, SP, PP, VPP]),
    "recompute_full": (1, ["parallel.recompute_granularity=full"]),
    "recompute_selective": (1, ["parallel.recompute_granularity=selective"]),
    "tp2_sp_recompute_full": (2, [TP, SP, "parallel.recompute_granularity=full"]),
    "micro_batch_2": (1, ["train.micro_batch_size=2"]),
    "cp2_ring": (2, [CP, f"{COMM}=ring"]),
    "cp2_exchange": (2, [CP, f"{COMM}=exchange"]),
    "cp2_ulysses": (2, [CP, f"{COMM}=ulysses"]),
    "cp2_auto": (2, [CP]),
    "cp4_hybrid": (4, [CP4, f"{COMM}=hybrid", "parallel.ulysses_size=2"]),
    "cp4_ring": (4, [CP4, f"{COMM}=ring"]),
    "cp2_tp2_sp": (4, [CP, TP, SP]),
    "cp2_pp2_interleaved": (4, [CP, PP, VPP]),
    "cp2_dp2": (4, [CP]),
    "cp2_recompute_full": (2, [CP, "parallel.recompute_granularity=full"]),
    "cp2_recompute_selective": (2, [CP, "parallel.recompute_granularity=selective"]),
    "cp2_micro_batch_2": (2, [CP, "train.micro_batch_size=2"]),
    "feed_forward_blocks": (1, ["parallel.feed_forward_block=40"]),
    "cp2_tp2_sp_feed_forward_blocks": (4, [CP, TP, SP, "parallel.feed_forward_block=20"]),
    "one_worker": (1, ["data.num_workers=1", "data.prefetch=0"]),
}
FAST = ("tp2", "pp2_interleaved", "cp2_ring")
"""Layouts of the fast subset; the others only run in the whole suite."""
THOROUGH = ("transfusion", "chameleon")
"""Families that run under every layout: between them they have a bidirectional and a causal mask, codes and patches."""
OF_EACH = ("tp2_sp", "pp2_interleaved", "dp2", "cp2_ring", "cp4_ring")
"""Layouts of every other family, which shares all else with these."""
LONG = ("tp2_sp", "pp2_interleaved", "dp2", "dp2_overlap", "tp2_sp_pp2_interleaved")
"""Layouts under which these families run all 20 iterations."""
FEWER = 5
FEWER_ITERATIONS = [f"train.exit_interval={FEWER}"]
"""All else stops earlier, on the same schedule."""
IN_FP64 = (
    "tp2_sp", "pp2_interleaved", "dp2", "tp2_pp2", "micro_batch_2", "recompute_full", "cp2_micro_batch_2",
    "cp4_hybrid", "cp4_ring",
)  # fmt: skip
FP64 = ["train.precision=fp64", "parallel.use_distributed_optimizer=false"]


def cases(layouts, of_each):
    """(layout, family), the slow ones marked."""
    found = []
    for family in FAMILIES:
        for name in layouts if family in THOROUGH else of_each:
            fast = family in THOROUGH and name in FAST
            found.append(pytest.param(name, family, marks=() if fast else pytest.mark.slow))
    return found


def run_layout(name, family, shards, folder, *further):
    """(steps, how many there must be)."""
    ranks, overrides = LAYOUTS[name]
    fewer = family not in THOROUGH or name not in LONG
    overrides = [*overrides, *(FEWER_ITERATIONS if fewer else ()), *further]
    return run_training(overrides_for(family, shards, folder, *overrides), ranks), FEWER if fewer else 20


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 6 to 12 positions, so that short rows are cut and swapped, in the middle of images too."""
    monkeypatch.setattr(assignment, "FINEST", 6)


@pytest.fixture(scope="module")
def baseline(one_process):
    def get(family, precision):
        """As many iterations as a layout of the family may run."""
        length = () if family in THOROUGH else FEWER_ITERATIONS
        return one_process(family, *length, *(FP64 if precision == "fp64" else ()))

    return get


def assert_same_curve(steps, expected, loss_tolerance, norm_tolerance, iterations=20):
    assert len(expected) >= iterations
    for iteration, (ours, theirs) in enumerate(zip(steps, expected[:iterations], strict=True), 1):
        assert ours["counts"] == theirs["counts"] and ours["tokens"] == theirs["tokens"], f"iteration {iteration}"
        assert not ours["skipped"]
        for name, loss in theirs["losses"].items():
            assert ours["losses"][name] == pytest.approx(loss, rel=loss_tolerance), f"iteration {iteration}, {name}"
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=norm_tolerance), f"iteration {iteration}"


@pytest.mark.parametrize(("name", "family"), cases(LAYOUTS, OF_EACH))
def test_fp32(name, family, shards, tmp_path, baseline):
    steps, iterations = run_layout(name, family, shards, tmp_path)
    assert_same_curve(steps, baseline(family, "fp32"), 1e-5, 1e-4, iterations)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), cases(IN_FP64, ("tp2_sp", "pp2_interleaved", "cp4_ring")))
def test_fp64(name, family, shards, tmp_path, baseline):
    steps, iterations = run_layout(name, family, shards, tmp_path, *FP64)
    assert_same_curve(steps, baseline(family, "fp64"), 1e-9, 1e-9, iterations)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2_sp", "pp2_interleaved", "dp2", "micro_batch_2", "cp2_micro_batch_2", "cp4_ring"])
def test_unet_patches(name, shards, tmp_path, baseline):
    steps, iterations = run_layout(name, "transfusion_unet", shards, tmp_path)
    assert_same_curve(steps, baseline("transfusion_unet", "fp32"), 1e-5, 1e-4, iterations)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["transfusion_native", "transfusion_unet_native", "showo_flow_native"])
def test_images_of_many_sizes(family, tmp_path):
    """Rows are cut in the middle of images of several grids."""
    make_shards(tmp_path, SIZES)
    alone = run_training(overrides_for(family, tmp_path, tmp_path / "alone", *FEWER_ITERATIONS, *FP64))
    for name in ("tp2_sp", "pp2_interleaved", "cp2_ring"):
        steps, iterations = run_layout(name, family, tmp_path, tmp_path / name, *FP64)
        assert_same_curve(steps, alone, 1e-9, 1e-9, iterations)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["transfusion_phi", "chameleon_phi"])
@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, "fp64") for name in ("tp2_sp", "pp2_interleaved", "cp2_ring", "recompute_full", "feed_forward_blocks")]
    + [("dp2_overlap", "fp32")],
)
def test_phi_trunk(name, precision, family, shards, tmp_path, baseline):
    """Norms and biases with more to sum over ranks, and a block with one norm."""
    steps, iterations = run_layout(name, family, shards, tmp_path, *(FP64 if precision == "fp64" else ()))
    tolerances = (1e-9, 1e-9) if precision == "fp64" else (1e-5, 1e-4)
    assert_same_curve(steps, baseline(family, precision), *tolerances, iterations)


@pytest.mark.slow
def test_adapters_of_layers_behind_the_trunk(shards, tmp_path):
    """Of what they read, and of what modulates them; with dropout, which tensor ranks draw alike."""
    lora = ["lora.rank=2", "lora.dropout=0.2", "lora.targets=[back.flow.*]", *FEWER_ITERATIONS, *FP64]
    runs = [
        run_training(overrides_for("showo_flow", shards, tmp_path / name, *LAYOUTS[name][1], *lora), LAYOUTS[name][0])
        for name in ("one_worker", "tp2_sp", "cp2_ring")
    ]
    for run in runs[1:]:
        assert_same_curve(run, runs[0], 1e-9, 1e-9, FEWER)


@pytest.mark.slow
def test_frozen_encoder(shards, tmp_path, baseline):
    """Its weights have no gradients that a rank could wait for, and the run is another one."""
    runs = []
    for name in ("one_worker", "dp2_overlap", "tp2_sp_pp2_interleaved"):
        world_size, overrides = LAYOUTS[name]
        frozen = [*overrides, "model.freeze_encoder=true", *FEWER_ITERATIONS]
        runs.append(run_training(overrides_for("janus", shards, tmp_path / name, *frozen), world_size))
    for run in runs[1:]:
        for ours, theirs in zip(run, runs[0], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert runs[0][-1]["loss"] != pytest.approx(baseline("janus", "fp32")[FEWER - 1]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", THOROUGH)
def test_the_curve_depends_on_what_it_should(family, shards, tmp_path, baseline):
    """The comparison above would see a change: another seed, or no dropout, gives another curve; and it learns."""
    expected = baseline(family, "fp32")
    for number, override in enumerate(["train.seed=7", "model.trunk.hidden_dropout=0.0"]):
        steps = run_training(overrides_for(family, shards, tmp_path / str(number), override))
        with pytest.raises(AssertionError):
            assert_same_curve(steps, expected, 1e-5, 1e-4)
    assert expected[-1]["loss"] < 0.95 * expected[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), cases(("one_worker", "cp2_ring"), ()))
def test_bf16_stays_beside_fp32(name, family, shards, tmp_path, baseline):
    """bf16 keeps 8 bits: a step's loss may differ by a few times 2**-8."""
    steps, iterations = run_layout(name, family, shards, tmp_path, "train.precision=bf16")
    for ours, theirs in zip(steps, baseline(family, "fp32")[:iterations], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.03)
