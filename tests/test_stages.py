"""A chain of stages: weights are handed over, what is frozen stays, and a kill costs nothing."""

import fnmatch
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from distributed import kill_when, run_ranks
from plain_ops import PlainOps
from tiny_runs import make_shards, overrides_for, saved_weights

from megatron_mm.config.compose import Config, ConfigError, compose
from megatron_mm.config.schema import ParallelConfig
from megatron_mm.config.validate import validate
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.distributed import job
from megatron_mm.report.metrics import read_metrics
from megatron_mm.stages import compose_stages, run_stages
from megatron_mm.train import StopSignal

STAGE_FILES = Path(__file__).parents[1] / "configs" / "stage"
STAGES = "stages=[transfusion/patches,transfusion/all]"
KEYS = [STAGES, "checkpoint.save=${run.dir}/checkpoints", "checkpoint.save_interval=1", "train.train_iters=4"]


SELDOM = "checkpoint.save_interval=6"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder)
    return folder


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> Path:
    """The run.dir of a chain that nothing interrupted, on one rank."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_chain(overrides_for("transfusion", shards, folder, *KEYS))
    return folder


def staged(overrides: list[str]) -> list[Config]:
    return compose_stages(compose(overrides), overrides)


def run_chain(overrides: list[str], world_size: int = 1, stages: list[Config] | None = None) -> list[list[dict]]:
    """The steps of each stage that was trained."""
    stages = staged(overrides) if stages is None else stages
    for stage in stages:
        validate(stage, world_size)
    ranks = run_ranks(_run_chain, world_size, stages)
    assert all(rank == ranks[0] for rank in ranks)
    return ranks[0]


def _run_chain(init_kwargs: dict, stages: list[Config]) -> list[list[dict]]:
    device = torch.device("cpu")
    with job(device, **init_kwargs):
        steps: dict[str, list[dict]] = {}
        told = lambda stage, step: steps.setdefault(stage.run.name, []).append(asdict(step))  # noqa: E731
        run_stages(stages, device, StopSignal(), told)
        return list(steps.values())


def losses(run_dir: Path, stage: str) -> list[float]:
    rows = read_metrics(run_dir / stage / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.mark.slow
def test_the_second_stage_starts_from_the_weights_of_the_first(whole):
    """Warmup starts at a learning rate of 0, so each stage's first iteration moves nothing."""
    start, first = (saved_weights(whole / "patches", iteration) for iteration in (1, 4))
    handed, last = (saved_weights(whole / "all", iteration) for iteration in (1, 4))
    patches = {name for name in start if ".patch_" in name}
    assert 0 < len(patches) < len(start) / 2
    assert {name for name in start if not torch.equal(start[name], first[name])} == patches
    assert all(torch.equal(handed[name], first[name]) for name in first)
    assert all((last[name] != handed[name]).any() for name in handed)
    rows = read_metrics(whole / "all/metrics.jsonl")
    assert rows[0]["consumed_samples"] == read_metrics(whole / "patches/metrics.jsonl")[0]["consumed_samples"]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 1), (2, 1), (1, 2)])
def test_a_chain_that_is_killed_in_its_second_stage_goes_on(first, then, whole, shards, tmp_path):
    overrides = overrides_for("transfusion", shards, tmp_path / "run", *KEYS)
    metrics = tmp_path / "run/all/metrics.jsonl"
    kill_when(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, run_chain, overrides, first)
    untouched = (tmp_path / "run/patches/metrics.jsonl").read_bytes()
    (steps,) = run_chain(overrides, then)
    assert len(steps) < 4, "the second stage was not resumed"
    assert (tmp_path / "run/patches/metrics.jsonl").read_bytes() == untouched
    for stage in ("patches", "all"):
        assert losses(tmp_path / "run", stage) == pytest.approx(losses(whole, stage), rel=1e-5)
    assert run_chain(overrides, then) == [], "nothing was left to do"


@pytest.mark.slow
def test_stages_may_have_their_own_layouts(whole, shards, tmp_path):
    stages = staged(overrides_for("transfusion", shards, tmp_path / "run", *KEYS))
    layouts = ParallelConfig(tensor_model_parallel_size=2), ParallelConfig(pipeline_model_parallel_size=2)
    run_chain([], 2, [replace(stage, parallel=layout) for stage, layout in zip(stages, layouts, strict=True)])
    for stage in ("patches", "all"):
        assert losses(tmp_path / "run", stage) == pytest.approx(losses(whole, stage), rel=1e-5)


@pytest.mark.slow
def test_a_stage_that_stops_early_ends_the_chain(shards, tmp_path):
    overrides = overrides_for("transfusion", shards, tmp_path / "run", *KEYS)
    (steps,) = run_chain([*overrides, "train.exit_interval=2"])
    assert len(steps) == 2 and not (tmp_path / "run/all").exists()
    with pytest.raises(AssertionError, match=r"run/patches was started with optim\.lr=0\.001, now it is 0\.5"):
        run_chain([*overrides, "optim.lr=0.5"])


@pytest.mark.slow
def test_from_the_command_line_under_a_signal(whole, shards, tmp_path):
    """SIGUSR1 to one of two ranks in the second stage: both save and leave with 0; the same command again finishes."""
    overrides = overrides_for("transfusion", shards, tmp_path / "run", *KEYS, "train.train_iters=12", SELDOM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_mm.stages", *overrides]
    metrics = tmp_path / "run/all/metrics.jsonl"
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.01)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGUSR1)
        assert process.wait(120) == 0, (tmp_path / "log").read_text()
    assert 2 <= len(losses(tmp_path / "run", "all")) < 12
    run_chain(overrides)
    assert len(losses(tmp_path / "run", "patches")) == len(losses(tmp_path / "run", "all")) == 12


BASE = ["experiment=demo"]


def test_stages_compose_over_the_experiment_and_under_the_command_line():
    patches, everything = staged([*BASE, STAGES, "optim.clip_grad=2", "checkpoint.load=start"])
    assert patches.optim.trainable == ("front.patch_in.*", "back.patch_out.*") and everything.optim.trainable == ()
    assert everything.optim.lr_multipliers == {"*.patch_*": 0.5}
    assert patches.optim.clip_grad == everything.optim.clip_grad == 2.0 and patches.optim.lr == everything.optim.lr
    assert (patches.run.dir, everything.run.dir) == ("runs/demo/patches", "runs/demo/all")
    assert patches.checkpoint.load == "start" and everything.checkpoint.load == patches.checkpoint.save
    assert everything.run.name == "demo-all" and everything.run.if_exists == "resume"
    (alone,) = (compose([*BASE, "stage=transfusion/all"]),)
    assert alone.optim == replace(everything.optim, clip_grad=alone.optim.clip_grad) and alone.run.dir == "runs/demo"
    assert [stage.run.if_exists for stage in staged([*BASE, STAGES, "run.if_exists=restart"])] == ["restart"] * 2


def test_names_with_all_kinds_of_letters():
    _, second = staged([*BASE, STAGES, "run.dir='it\\'s a, {dir}=1'"])
    assert second.run.dir == "it's a, {dir}=1/all" and second.checkpoint.load == "it's a, {dir}=1/patches/checkpoints"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], r"stages is empty: add stages=\[FAMILY/STAGE,\.\.\.\]"),
        (["stages=transfusion/all"], r"stages=transfusion/all must be a list"),
        (
            ["stages=[transfusion/patch]"],
            r"stage=transfusion/patch does not exist \(did you mean .*transfusion/patches\?",
        ),
        (["stages=[transfusion/all,transfusion/all]"], r"stages lists two named all"),
        ([STAGES, "stage=transfusion/all"], r"stage=transfusion/all names one stage alone"),
        ([STAGES, "checkpoint.save=null"], r"checkpoint\.save=null gives stage transfusion/patches no folder"),
        ([STAGES, "checkpoint.save=one"], r"checkpoint\.save=one gives stage transfusion/all no folder of its own"),
    ],
)
def test_mistakes_are_one_sentence(overrides, said):
    with pytest.raises(ConfigError, match=said) as error:
        staged([*BASE, *overrides])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path", sorted(STAGE_FILES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_stage_composes_and_names_parameters_that_there_are(path):
    """A pattern that matches nothing would only be told when the stage begins."""
    family = path.parent.name
    config = compose([f"model={family}_tiny", f"stage={family}/{path.stem}", "run.name=x", "run.dir=x"])
    given = build_family(config.model, 256)
    names = [
        *(f"front.{name}" for name, _ in given.build_front(PlainOps()).named_parameters()),
        *(f"back.{name}" for name, _ in given.build_back(PlainOps()).named_parameters()),
        "decoder.layers.0.mlp.linear_fc1.weight",
    ]
    for pattern in (*config.optim.trainable, *config.optim.frozen, *(config.optim.lr_multipliers or {})):
        assert fnmatch.filter(names, pattern), pattern
    assert not config.data.sources or config.data.path is None
