"""Freezing and learning rates by name: frozen weights stay, and the curve is the same under every layout and resume."""

import pytest
from tiny_runs import overrides_for, run_training, saved_weights

from megatron_mm.report.metrics import read_metrics

TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
SP, VPP = "parallel.sequence_parallel=true", "parallel.virtual_pipeline_model_parallel_size=2"
PLAIN, FULL = "parallel.use_distributed_optimizer=false", "parallel.recompute_granularity=full"
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
LAYOUTS = {
    "tp2_sp": (2, [TP, SP]),
    "pp2": (2, [PP]),
    "pp2_plain_optimizer": (2, [PP, PLAIN]),
    "pp2_interleaved": (2, [PP, VPP]),
    "dp2_overlap": (2, OVERLAP),
    "recompute_full": (1, [FULL]),
    "recompute_full_micro_batch_2": (1, [FULL, "train.micro_batch_size=2"]),
    "recompute_selective": (1, ["parallel.recompute_granularity=selective"]),
    "cp2": (2, ["parallel.context_parallel_size=2"]),
    "tp2_pp2": (4, [TP, PP]),
}
CASES = {
    # Under PP 2 and with two chunks a stage the first chunk trains nothing at all.
    "late_layers": ["optim.frozen=[front.*,'decoder.layers.[01].*']", "optim.lr_multipliers={decoder.*: 0.5}"],
    "patches": ["optim.trainable=[front.patch_in.*,back.patch_out.*]"],
    "middle": ["optim.trainable=[decoder.layers.1.*]", "optim.frozen=[*norm*]"],
}
SHORT = ["train.train_iters=4"]
SAVE = ["checkpoint.save_interval=2", "checkpoint.save=${run.dir}/checkpoints"]


@pytest.fixture(scope="module")
def baseline(shards, tmp_path_factory):
    runs = {}

    def get(case):
        if case not in runs:
            folder = tmp_path_factory.mktemp(case) / "run"
            overrides = overrides_for("transfusion", shards, folder, *SHORT, *SAVE, *CASES[case])
            runs[case] = folder, run_training(overrides)
        return runs[case]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_only_what_is_named_moves(case, baseline):
    folder, _ = baseline(case)
    first, last = saved_weights(folder, 2), saved_weights(folder, 4)
    moved = {name for name in first if (first[name] != last[name]).any()}
    layer = {name for name in first if name.startswith("decoder.layers.")}
    early = {name for name in layer if name.startswith(("decoder.layers.0.", "decoder.layers.1."))}
    front = {name for name in first if name.startswith("front.")}
    assert len(first) > 40 and len(early) == len(layer) / 2
    assert (
        moved
        == {
            "late_layers": set(first) - front - early,
            "patches": {name for name in first if ".patch_" in name},
            "middle": {name for name in layer if name.startswith("decoder.layers.1.") and "norm" not in name},
        }[case]
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_curve(layout, case, shards, tmp_path, baseline):
    ranks, overrides = LAYOUTS[layout]
    _, expected = baseline(case)
    steps = run_training(overrides_for("transfusion", shards, tmp_path, *SHORT, *CASES[case], *overrides), ranks)
    for ours, theirs in zip(steps, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("first", "then"),
    [([PP], []), ([], [PP]), ([PP, PLAIN], [TP, PLAIN]), ([TP, SP], [PP, VPP])],
    ids=["pp2-to-dp2", "dp2-to-pp2", "plain-pp2-to-tp2", "tp2-to-pp2"],
)
def test_resume(first, then, case, shards, tmp_path, baseline):
    def train(*overrides):
        run_training(overrides_for("transfusion", shards, tmp_path / "run", *SHORT, *SAVE, *CASES[case], *overrides), 2)

    train(*first, "train.exit_interval=2")
    train(*then, "run.if_exists=resume")
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx([s["loss"] for s in baseline(case)[1]], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["distributed", "plain"])
def test_resume_in_bf16_where_a_stage_trains_nothing(optimizer, shards, tmp_path):
    """Master weights are stored beside the weights, by group; the first stage's groups are empty."""
    keys = [
        *SHORT,
        *SAVE,
        *CASES["late_layers"],
        "train.precision=bf16",
        PP,
        *([PLAIN] if optimizer == "plain" else []),
    ]
    expected = run_training(overrides_for("transfusion", shards, tmp_path / "whole", *keys), 2)
    run = overrides_for("transfusion", shards, tmp_path / "run", *keys)
    run_training([*run, "train.exit_interval=2"], 2)
    steps = run_training([*run, "run.if_exists=resume"], 2)
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in expected[2:]], rel=1e-6)


def test_a_pattern_without_a_parameter_is_named_before_there_is_a_run(shards, tmp_path):
    """Layer 3 is on the second stage only, which is no mistake; layer 4 does not exist."""
    run = overrides_for("transfusion", shards, tmp_path / "run", PP)
    patterns = "optim.frozen=[decoder.layers.3.*,decoder.layers.4.*]"
    with pytest.raises(AssertionError, match=r"optim\.frozen: decoder\.layers\.4\.\* matches none of the \d+ .*layers"):
        run_training([*run, patterns], 2)
    assert not (tmp_path / "run").exists()
    with pytest.raises(AssertionError, match="leave no parameter to train"):
        run_training([*run, "optim.frozen=[*]"], 2)
