"""Losses on held-out data: exact under every layout, the same noise each time, and training does not notice."""

import json

import pytest
from tiny_runs import make_shards, overrides_for, run_training

from megatron_mm.config.compose import ConfigError, compose
from megatron_mm.config.validate import validate

TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
LAYOUTS = {
    "tp2_sp": (2, [TP, "parallel.sequence_parallel=true"]),
    "pp2_interleaved": (2, [PP, "parallel.virtual_pipeline_model_parallel_size=2"]),
    "dp2_overlap": (2, ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
    "cp2": (2, ["parallel.context_parallel_size=2", "train.micro_batch_size=2"]),
}
SHORT = ["train.exit_interval=4"]
EVALUATED = ["train.eval_interval=3", "train.eval_iters=3"]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    make_shards(folder, ((8, 8), (6, 9)))
    return folder / "train"


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def evaluations(run_dir):
    return {
        row["iteration"]: {name: value for name, value in row.items() if name.startswith("validation/")}
        for row in rows(run_dir)
        if "validation/loss" in row
    }


def run(family, shards, held_out, folder, *overrides, world_size=1):
    given = [*SHORT, *EVALUATED, f"data.validation.path={held_out}", *overrides]
    run_training(overrides_for(family, shards, folder, *given), world_size)
    return evaluations(folder)


@pytest.mark.parametrize("family", ["transfusion", pytest.param("showo_flow", marks=pytest.mark.slow),
                                    pytest.param("mmada", marks=pytest.mark.slow)])  # fmt: skip
def test_layouts_agree(family, shards, held_out, tmp_path):
    alone = run(family, shards, held_out, tmp_path / "alone")
    assert list(alone) == [3, 4] and all("validation/loss/" in "".join(found) for found in alone.values())
    for name, (world_size, overrides) in LAYOUTS.items():
        found = run(family, shards, held_out, tmp_path / name, *overrides, world_size=world_size)
        assert list(found) == list(alone)
        for iteration, losses in alone.items():
            assert found[iteration] == pytest.approx(losses, rel=1e-6), f"{name}, iteration {iteration}"


@pytest.mark.slow
def test_experts_route_as_in_training_alone(shards, held_out, tmp_path):
    """What an evaluation routes is not counted as the next step's."""
    plain = run_training(overrides_for("transfusion_experts", shards, tmp_path / "plain", *SHORT))
    run("transfusion_experts", shards, held_out, tmp_path / "with")
    for ours, theirs in zip(rows(tmp_path / "with"), plain, strict=True):
        assert {name[7:]: value for name, value in ours.items() if name.startswith("router/")} == theirs["router"]


def test_an_evaluation_repeats_itself_and_training_does_not_notice(shards, held_out, tmp_path):
    still = run("transfusion", shards, held_out, tmp_path / "still", "optim.lr=0", "train.eval_interval=1")
    assert len(still) == 4 and all(found == still[1] for found in still.values())
    plain = run_training(overrides_for("transfusion", shards, tmp_path / "plain", *SHORT))
    run("transfusion", shards, held_out, tmp_path / "with")
    with_it = rows(tmp_path / "with")
    assert [row["loss"] for row in with_it] == [step["loss"] for step in plain]
    assert with_it[0].keys() < with_it[2].keys() and (tmp_path / "with/loss.png").is_file()


def test_means_are_over_labels_not_over_batches(shards, held_out, tmp_path):
    """One evaluation of three batches is that of its batches, each weighted by its own labels."""
    still = ["optim.lr=0", "train.exit_interval=1", "train.global_batch_size=2"]
    whole = run("transfusion", shards, held_out, tmp_path / "whole", *still)[1]
    firsts = [
        run("transfusion", shards, held_out, tmp_path / f"{n}", *still, f"train.eval_iters={n}")[1] for n in (1, 2)
    ]
    assert len({tuple(found.values()) for found in (whole, *firsts)}) == 3
    at_once = run("transfusion", shards, held_out, tmp_path / "at_once", "optim.lr=0", "train.exit_interval=1",
                  "train.global_batch_size=6", "train.eval_iters=1")[1]  # fmt: skip
    assert whole == pytest.approx(at_once, rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.eval_interval=5"], r"train\.eval_interval=5 has nothing to evaluate on: set data\.validation\.path"),
        (["data.validation.path=x"], r"data\.validation is read at every train\.eval_interval iterations"),
        (["train.eval_iters=0"], r"train\.eval_iters=0 must be 1 or more"),
        (
            ["data.validation.path=x", "data.validation.sources=[{path: a}]"],
            r"data\.validation\.path=x and data\.validation\.sources exclude each other",
        ),
    ],
)
def test_contradictions_are_named(overrides, said):
    with pytest.raises(ConfigError, match=said):
        validate(compose(["model=transfusion_tiny", "run.name=test", "data.path=data/none", *overrides]), 1)


def test_missing_shards_are_named_before_there_is_a_run(shards, tmp_path):
    given = ["data.validation.path=nowhere", *EVALUATED]
    with pytest.raises(AssertionError, match=r"data\.validation\.path=nowhere is no folder"):
        run_training(overrides_for("transfusion", shards, tmp_path / "run", *given))
    assert not (tmp_path / "run").exists()
