"""What is saved is what was trained, whoever gathers and writes it when; and nothing that was published is lost."""

import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
from tiny_runs import overrides_for, run_training, saved_weights

from megatron_mm.engines.format import latest_iteration, resolve
from megatron_mm.engines.reading import read_shapes

pytestmark = pytest.mark.slow

OVERLAPPED = ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"]
ASYNC = ["checkpoint.async_save=true"]
BF16 = ["train.precision=bf16"]
SHORT = ["train.train_iters=4", "optim.lr=1e-2"]


@pytest.fixture
def run(shards, tmp_path):
    """Call with a number of processes and overrides: the losses of a run in tmp_path/<folder> that saves every 2
    iterations."""

    def make(world_size, *overrides, folder="run"):
        save = ["checkpoint.save=${run.dir}/checkpoints", "checkpoint.save_interval=2", *SHORT]
        steps = run_training(overrides_for("transfusion", shards, tmp_path / folder, *save, *overrides), world_size)
        return [step["loss"] for step in steps]

    return make


def test_overlaps_and_asynchronous_saves_in_bf16(run, tmp_path):
    """Options as they are set together: the saved weights are those of a run without them, and both join its curve."""
    together = [*OVERLAPPED, *ASYNC, *BF16]
    plain = run(2, *BF16, folder="plain")
    assert run(2, *together, "train.exit_interval=2") == plain[:2]
    weights, expected = saved_weights(tmp_path / "run", 2), saved_weights(tmp_path / "plain", 2)
    assert weights.keys() == expected.keys() and len(weights) > 40
    assert [name for name, weight in weights.items() if not weight.equal(expected[name])] == []
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    assert run(2, *together, "run.if_exists=resume") == plain[2:]
    assert run(1, *BF16, "run.if_exists=resume", folder="one")[0] == pytest.approx(plain[2], rel=1e-6)


def test_asynchronous_saves_of_weights_that_are_trained_on(run, tmp_path):
    """Without the distributed optimizer the weights themselves are handed to the writer."""
    plain = ["parallel.use_distributed_optimizer=false"]
    run(1, *plain, *ASYNC)
    run(1, *plain, folder="plain")
    weights, expected = saved_weights(tmp_path / "run", 2), saved_weights(tmp_path / "plain", 2)
    assert all(weights[name].equal(expected[name]) for name in expected)


def test_only_complete_checkpoints_before_the_published_one_are_dropped(run, tmp_path):
    """keep=1 beside what a kill during a save and another run left: a half-written folder and higher numbers."""
    checkpoints = tmp_path / "run/checkpoints"
    for name in ("iter_0000001", "iter_0000009", "iter_0000010", "iter_0000001.copy"):
        (checkpoints / name).mkdir(parents=True)
    for name in ("iter_0000010", "iter_0000001.copy"):
        (checkpoints / name / "metadata.json").write_text("{}")
    run(1, "checkpoint.keep=1")
    assert latest_iteration(checkpoints) == 4 and read_shapes(resolve(checkpoints))
    assert sorted(path.name for path in checkpoints.glob("iter_*")) == [
        "iter_0000001", "iter_0000001.copy", "iter_0000004", "iter_0000009", "iter_0000010",
    ]  # fmt: skip


def written_by(checkpoint: Path) -> Counter:
    """Bytes that each rank wrote."""
    files = checkpoint.glob("*.distcp")
    return sum((Counter({int(file.name.split("_")[2]): file.stat().st_size}) for file in files), Counter())


def test_replicas_share_the_writing(run, tmp_path):
    """Each of two replicas writes half the weights; the optimizer, gathered on the first alone, is written by it."""
    run(2, "parallel.use_distributed_optimizer=false", "train.exit_interval=2", folder="plain")
    first, second = (written_by(tmp_path / "plain/checkpoints/iter_0000002")[rank] for rank in (0, 1))
    assert 0.8 < first / second < 1.25
    run(2, "train.exit_interval=2", *BF16)
    index = read_shapes(tmp_path / "run/checkpoints/iter_0000002")
    weights = sum(
        2 * math.prod(entry.global_shape) for name, entry in index.items() if not name.startswith("optimizer.")
    )
    second = written_by(tmp_path / "run/checkpoints/iter_0000002")[1]
    assert 0.9 < second / (weights / 2) < 4, "with what is written around tensors; half of the optimizer would make 8"
