"""Runs of every family on each device: bf16 by the parts that the device is given, and fp32, beside fp32 on a CPU."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from tiny_runs import FAMILIES, overrides_for, run_training

from megatron_mm.config.compose import compose
from megatron_mm.config.schema import ParallelConfig
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.build import select_parts
from megatron_mm.parallel.distributed import agree, gather, on_first_rank, process_groups
from megatron_mm.report.metrics import read_metrics

EVERY = [*FAMILIES, "unimoe", "transfusion_unet", "transfusion_experts", "showo_phi"]
STEPS = 6
BF16 = "train.precision=bf16"
TOLERANCE = {"bf16": 2**-8, "fp32": 2**-11}
"""Of a loss. bf16 keeps 8 bits; a loss is a mean over hundreds of tokens, and on a CPU off by 1.3e-3 at most. In fp32
torch computes convolutions on CUDA in TF32, which keeps 11 bits: encoders and the U-Net have some."""


def run_of(family: str, shards, folder, *overrides: str) -> list[str]:
    """The same few rows again and again, so that the loss must fall."""
    short = ("data.window=4", "optim.lr=3e-3", "model.trunk.hidden_dropout=0.1", f"train.train_iters={STEPS}")
    return overrides_for(family, shards, folder, *short, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY)
def test_every_family_trains(family, device, shards, tmp_path):
    truth = run_training(run_of(family, shards, tmp_path / "truth"))
    for precision in ("bf16", "fp32") if device.type == "cuda" else ("bf16",):
        steps = run_training(run_of(family, shards, tmp_path / precision, f"train.precision={precision}"), 1, device)
        tolerance = TOLERANCE[precision]
        for step, true in zip(steps, truth, strict=True):
            assert step["loss"] == pytest.approx(true["loss"], rel=tolerance)
            assert step["counts"] == true["counts"] and not step["skipped"] and math.isfinite(step["grad_norm"])
            assert (step["pairs"] is None) == (device.type == "cpu")
        assert steps[0]["grad_norm"] == pytest.approx(truth[0]["grad_norm"], rel=5 * tolerance)
        first, last = (np.mean([step["loss"] for step in part]) for part in (steps[:3], steps[-3:]))
        assert last < 0.97 * first, "means, since a masked text weighs 1 / p"


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputed_layers_give_the_same_run(granularity, device, shards, tmp_path):
    plain, recomputed = (
        run_training(run_of("transfusion", shards, tmp_path / name, BF16, *extra), 1, device)
        for name, extra in (("plain", ()), ("again", (f"parallel.recompute_granularity={granularity}",)))
    )
    for step, true in zip(recomputed, plain, strict=True):
        assert step["loss"] == pytest.approx(true["loss"], rel=2**-8)


@pytest.mark.parametrize("family", EVERY)
def test_the_device_gets_its_own_parts(family, device, shards, tmp_path, monkeypatch):
    """Exactly those that a run takes; that they were fast is the benchmark's to say."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    config = compose(run_of(family, shards, tmp_path, BF16))
    parts = select_parts(config, build_family(config.model, 256), device)
    fastest = ("span", "compile") if device.type == "cuda" else ("reference", "eager")
    assert (parts.attention, parts.fusion.elementwise) == fastest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "use_async", "tolerance"), [("fp32", "false", 1e-5), ("fp32", "true", 1e-5), ("bf16", "true", 2**-8)]
)
def test_a_run_that_is_resumed_goes_on(precision, use_async, tolerance, device, shards, tmp_path):
    """Saved in the middle, once by a process in the background; and its own checkpoint gives a CPU the same."""
    keys = (f"train.precision={precision}", f"checkpoint.async_save={use_async}", "checkpoint.save_interval=2")

    def run(folder, *overrides, on=device):
        save = "checkpoint.save=${run.dir}/checkpoints"
        return run_training(run_of("chameleon", shards, tmp_path / folder, *keys, save, *overrides), 1, on)

    whole = run("whole")
    run("run", "train.exit_interval=4")
    rest = run("run", "run.if_exists=resume")
    assert len(rest) == STEPS - 4
    for step, true in zip(rest, whole[4:], strict=True):
        assert step["loss"] == pytest.approx(true["loss"], rel=tolerance)
    load = f"checkpoint.load={tmp_path}/whole/checkpoints"
    here, there = (
        run(folder, load, "train.exit_interval=1", on=on)
        for folder, on in (("here", device), ("there", torch.device("cpu")))
    )
    assert here[0]["loss"] == pytest.approx(there[0]["loss"], rel=TOLERANCE[precision])
    assert here[0]["loss"] < whole[0]["loss"], "trained weights"


@pytest.mark.slow
def test_from_the_command_line(device, shards, tmp_path):
    """Train, resume and generate, as a user starts them; with the optimizer sharded and everything on its defaults."""
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {})
    run, save = tmp_path / "run", "checkpoint.save=${run.dir}/checkpoints"

    def call(module: str, *arguments: str) -> str:
        command = [sys.executable, "-m", f"megatron_mm.{module}", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    training = run_of("transfusion", shards, run, save, BF16)
    said = call("train", *training, "train.exit_interval=3")
    assert f"transfusion on {device.type}" in said
    call("train", *training, "run.if_exists=resume")
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
    assert all(math.isfinite(row["loss"]) for row in rows)
    out = tmp_path / "samples"
    call("generate", f"checkpoint={run}/checkpoints", "prompt=a picture", "steps=3", "num_samples=2", f"out={out}")
    assert len(list(out.glob("*.png"))) == 2


def _collectives(init_kwargs, device):
    with process_groups(ParallelConfig(), 0, device, **init_kwargs):
        rank = dist.get_rank()
        answers = agree(rank == 0, device), gather(1.5 + rank, device), on_first_rank(lambda: "one")
        return dist.get_backend(), answers


def test_ranks_talk_by_the_devices_own_library(device):
    """gloo on a CPU; NCCL, with one rank, on CUDA."""
    backend, ranks = ("nccl", 1) if device.type == "cuda" else ("gloo", 2)
    values = [1.5 + rank for rank in range(ranks)]
    assert run_ranks(_collectives, ranks, device) == [(backend, (True, values, "one"))] * ranks
