"""A run that is killed with SIGKILL and resumed, under the same or another layout, gives the uninterrupted curve."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from distributed import kill_when
from tiny_runs import overrides_for, run_training

from megatron_mm.engines.format import latest_iteration, resolve
from megatron_mm.engines.reading import CheckpointError
from megatron_mm.parallel import init
from megatron_mm.report.metrics import read_metrics
from megatron_mm.run_lock import LOCK

pytestmark = pytest.mark.slow
EXHAUSTIVE = pytest.mark.exhaustive

TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
CP2 = ["parallel.context_parallel_size=2"]
GROUPED = ["model.trunk.moe_grouped_gemm=true"]
EP2, PLAIN = ["parallel.expert_model_parallel_size=2"], ["parallel.use_distributed_optimizer=false"]


ITERATIONS = 8


@pytest.fixture
def whole(one_process):
    """Call with a family and further overrides: the uninterrupted curve."""
    return lambda family, *overrides: one_process(family, f"train.train_iters={ITERATIONS}", *overrides)


@pytest.fixture
def run(shards, tmp_path):
    """Call with a family and further overrides: the overrides of a run in tmp_path that saves every 3 iterations."""

    def make(family, *overrides, folder="run"):
        save = [
            "checkpoint.save=${run.dir}/checkpoints",
            "checkpoint.save_interval=3",
            f"train.train_iters={ITERATIONS}",
        ]
        return overrides_for(family, shards, tmp_path / folder, *save, *overrides)

    return make


def kill_training_when(overrides: list[str], world_size: int, condition) -> None:
    kill_when(condition, run_training, overrides, world_size)


def assert_joins(folder: Path, expected: list[dict], tolerance: float) -> None:
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, ITERATIONS + 1))
    for row, step in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(step["loss"], rel=tolerance), f"iteration {row['iteration']}"
        assert {name: row[f"count/{name}"] for name in step["counts"]} == step["counts"]


@pytest.mark.parametrize(
    ("family", "first", "then", "world_size", "tolerance"),
    [
        pytest.param("transfusion", [], [], 2, 1e-6, id="same-layout"),
        pytest.param("transfusion", [], TP2, 2, 1e-5, id="dp2-to-tp2", marks=EXHAUSTIVE),
        pytest.param("chameleon", TP2, PP2, 2, 1e-5, id="tp2-to-pp2", marks=EXHAUSTIVE),
        pytest.param("transfusion", CP2, TP2, 2, 1e-5, id="cp2-to-tp2"),
        pytest.param("janus", CP2, PP2, 2, 1e-5, id="janus-cp2-to-pp2", marks=EXHAUSTIVE),
        pytest.param("showo", TP2, [], 2, 1e-5, id="showo-tp2-to-dp2", marks=EXHAUSTIVE),
        pytest.param("mmada", PP2, CP2, 2, 1e-5, id="mmada-pp2-to-cp2"),
        pytest.param("showo_flow", CP2, TP2, 2, 1e-5, id="showo_flow-cp2-to-tp2", marks=EXHAUSTIVE),
        pytest.param(
            "chameleon",
            ["checkpoint.async_save=true"],
            [],
            1,
            1e-5,
            id="async-dp2-to-one",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param("unimoe", EP2, PP2, 2, 1e-5, id="unimoe-ep2-to-pp2"),
        pytest.param("transfusion_experts", EP2, [], 1, 1e-5, id="ep2-to-one", marks=EXHAUSTIVE),
        pytest.param(
            "transfusion_experts", EP2, [*EP2, *TP2], 2, 1e-5, id="ep2-to-ep2-tp2", marks=pytest.mark.exhaustive
        ),
        pytest.param(
            "transfusion_experts",
            [*EP2, *PLAIN],
            [*TP2, *PLAIN],
            2,
            1e-5,
            id="plain-ep2-to-tp2",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "transfusion_experts",
            [*EP2, *GROUPED],
            GROUPED,
            1,
            1e-5,
            id="grouped-ep2-to-one",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_kill_at_a_random_moment(family, first, then, world_size, tolerance, run, whole, tmp_path):
    folder = tmp_path / "run"
    moment = random.randint(4, ITERATIONS - 1)
    metrics = folder / "metrics.jsonl"
    kill_training_when(run(family, *first), 2, lambda: metrics.exists() and metrics.read_text().count("\n") >= moment)
    run_training(run(family, "run.if_exists=resume", *then), world_size)
    assert_joins(folder, whole(family), tolerance)


@pytest.mark.parametrize("start", ["run.if_exists=resume", "checkpoint.load"])
def test_weights_of_a_checkpoint_are_not_drawn(start, run, whole, tmp_path, monkeypatch):
    expected = whole("chameleon")
    run_training(run("chameleon", "train.exit_interval=3"))
    monkeypatch.setattr(init, "draw", None)  # who draws calls it
    with pytest.raises(AssertionError, match="'NoneType' object is not callable"):
        run_training(run("chameleon", folder="new"))
    if start == "checkpoint.load":
        run_training(run("chameleon", f"checkpoint.load={tmp_path}/run/checkpoints", folder="loaded"))
    else:
        run_training(run("chameleon", start))
        assert_joins(tmp_path / "run", expected, 1e-5)


def test_kill_in_the_middle_of_a_save(run, whole, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    kill_training_when(run("chameleon"), 2, (checkpoints / "iter_0000006").exists)
    assert latest_iteration(checkpoints) in (3, 6)
    run_training(run("chameleon", "run.if_exists=resume"), 2)
    assert_joins(tmp_path / "run", whole("chameleon"), 1e-5)


def test_a_worker_that_outlived_its_launcher_keeps_a_second_run_out(run, whole, tmp_path):
    """The launcher is killed and its worker is not: resuming names the worker, and works as soon as it is gone."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    launcher = multiprocessing.get_context("fork").Process(target=run_training, args=(run("chameleon"),))
    launcher.start()
    while not metrics.exists() or metrics.read_text().count("\n") < 4:
        assert launcher.is_alive()
        time.sleep(0.002)
    worker = json.loads((tmp_path / "run" / LOCK).read_text())["process"]
    os.kill(worker, signal.SIGSTOP)
    launcher.kill()
    with pytest.raises(AssertionError, match=rf"run\.dir=\S+ is in use by process {worker} on "):
        run_training(run("chameleon", "run.if_exists=resume"))
    os.kill(worker, signal.SIGKILL)
    run_training(run("chameleon", "run.if_exists=resume"))
    assert_joins(tmp_path / "run", whole("chameleon"), 1e-5)


def test_usr1_saves_and_stops(run, whole, tmp_path):
    """SIGUSR1 to one of two ranks: both save at the same iteration and leave with exit code 0."""
    overrides = run("chameleon", "checkpoint.save_interval=1000")
    process = multiprocessing.get_context("fork").Process(target=_run_with_usr1_at, args=(overrides, tmp_path, 2))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    saved = latest_iteration(tmp_path / "run" / "checkpoints")
    assert saved is not None and 2 <= saved < ITERATIONS
    run_training(run("chameleon", "run.if_exists=resume"), 1)
    assert_joins(tmp_path / "run", whole("chameleon"), 1e-5)


def _run_with_usr1_at(overrides: list[str], tmp_path: Path, iteration: int) -> None:
    import threading

    metrics = tmp_path / "run" / "metrics.jsonl"

    def signal_a_rank() -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < iteration:
            time.sleep(0.002)
        ranks = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGUSR1)

    threading.Thread(target=signal_a_rank, daemon=True).start()
    run_training(overrides, 2)


def test_corrupt_and_missing_checkpoints_are_named(run, tmp_path):
    run_training(run("chameleon", "train.train_iters=3"))
    checkpoints = tmp_path / "run" / "checkpoints"
    data = next((checkpoints / "iter_0000003").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(AssertionError, match=r"cannot load .*iter_0000003: .*corrupt"):
        run_training(run("chameleon", "run.if_exists=resume", "train.train_iters=3"))
    (checkpoints / "iter_0000003" / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000003 is not a complete checkpoint"):
        resolve(checkpoints)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        resolve(tmp_path)


def test_disk_full_keeps_the_previous_checkpoint(run, tmp_path):
    """The second save hits the end of a small file system: one sentence, and the first checkpoint is still there."""
    run_training(run("chameleon", "train.train_iters=3", folder="measure"))
    one = sum(file.stat().st_size for file in (tmp_path / "measure" / "checkpoints").rglob("*") if file.is_file())
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size={1.5 * one / 1024:.0f}k tmpfs {small} 2>/dev/null"):
        pytest.skip("mounting a small tmpfs needs privileges")
    try:
        with pytest.raises(AssertionError, match=r"could not save .*No space left on device.*iter_0000003 is still"):
            run_training(run("chameleon", f"checkpoint.save={small}"))
        assert latest_iteration(small) == 3 and resolve(small).name == "iter_0000003"
        assert [path.name for path in small.glob("iter_*")] == ["iter_0000003"]
    finally:
        os.system(f"umount {small}")
