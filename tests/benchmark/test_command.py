"""The command from end to end with tiny models, and its user's mistakes."""

import csv
import os
import subprocess
import sys

import pytest

from megatron_mm.benchmark.arguments import parse
from megatron_mm.benchmark.profiling import GROUPS
from megatron_mm.config.compose import ConfigError
from megatron_mm.config.model import TrunkConfig
from megatron_mm.report.mfu import trunk_flops

TINY = [
    "text_vocab_size=100", "train.precision=fp32", "data.seq_length=256", "model.trunk.num_layers=2",
    "model.trunk.hidden_size=32", "model.trunk.num_attention_heads=2", "model.trunk.ffn_hidden_size=64",
    "model.image.height=8", "model.image.width=8", "model.trunk.init_method_std=0.2",
]  # fmt: skip


@pytest.mark.slow
def test_command(tmp_path):
    variants = ["ours", "flash", "dense", "causal-sdpa", "recompute-full"]
    arguments = [f"out={tmp_path}", "warmup=1", "steps=4", f"variants={','.join(variants)}", "trace=true", *TINY]
    command = [sys.executable, "-m", "megatron_mm.benchmark", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    results = list(csv.DictReader((tmp_path / "results.csv").open()))
    shares = list(csv.DictReader((tmp_path / "profile.csv").open()))
    assert (tmp_path / "step.png").stat().st_size > 10_000
    for experiment in ("benchmark_transfusion", "benchmark_chameleon"):
        rows = {row["variant"]: row for row in results if row["experiment"] == experiment}
        assert list(rows) == variants
        assert "attention.backend=flash cannot run" in rows["flash"]["note"] and not rows["flash"]["loss"]
        ours = rows["ours"]
        for name in ("dense", "recompute-full"):  # the same computation
            assert float(rows[name]["loss"]) == pytest.approx(float(ours["loss"]), rel=1e-5)
            assert rows[name]["pairs_of_causal"] == ours["pairs_of_causal"] and float(ours["pairs_of_causal"]) < 0.9
        assert rows["causal-sdpa"]["loss"] != ours["loss"] and rows["causal-sdpa"]["pairs_of_causal"] == "1"

        seconds = float(ours["ms_per_step"]) / 1e3
        assert float(ours["ms_fastest"]) <= 1e3 * seconds <= float(ours["ms_slowest"])
        assert float(ours["tokens_per_second"]) * seconds == pytest.approx(float(ours["tokens"]), rel=1e-4)
        trunk = TrunkConfig(2, 32, 2, ffn_hidden_size=64)
        vocabulary = 105 if experiment == "benchmark_transfusion" else 65536
        pairs = float(ours["pairs_of_causal"]) * 256 * 257 / 2
        flops = trunk_flops(trunk, vocabulary, float(ours["tokens"]), pairs)
        assert float(ours["tflops"]) * 1e12 * seconds == pytest.approx(flops, rel=1e-4)

        for name in variants:
            profile = [row for row in shares if (row["experiment"], row["variant"]) == (experiment, name)]
            if name == "flash":
                assert not profile
                continue
            assert [row["group"] for row in profile] == list(GROUPS)
            assert all(float(row["ms_per_step"]) > 0 for row in profile[:-1])
            assert sum(float(row["share"]) for row in profile) == pytest.approx(1, abs=1e-4)
            assert (tmp_path / f"trace_{experiment}_{name}.json.gz").exists()

    # Killed behind the fifth row, in the middle of writing the sixth; only what is not there is measured again.
    files = [tmp_path / name for name in ("results.csv", "profile.csv")]
    lines = files[0].read_text().splitlines(keepends=True)
    files[0].write_text("".join(lines[:6]) + lines[6][:30])
    (tmp_path / "step.png").unlink()
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0 and (tmp_path / "step.png").exists(), run.stderr
    assert files[0].read_text().splitlines(keepends=True)[:6] == lines[:6]
    again = list(csv.DictReader(files[0].open()))
    assert [(row["experiment"], row["variant"]) for row in again] == [(r["experiment"], r["variant"]) for r in results]
    assert [row["loss"] for row in again] == [row["loss"] for row in results]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["variants=ours,fast"], "variants=fast is unknown; variants: ours, flex"),
        (["experiment=benchmark_nothing"], "experiment=benchmark_nothing does not exist"),
        (["steps=0"], "steps=0 must be 1 or more"),
        (["profile=maybe"], "profile=maybe must be true or false"),
        (["model.trunk.hidden=64"], "model.trunk.hidden is not a known key"),
        (["train.global_batch_size=3", "train.micro_batch_size=2"], "train.global_batch_size=3 must be a multiple"),
        (["parallel.tensor_model_parallel_size=2"], "needs a multiple of 2 processes"),
    ],
)
def test_mistakes_are_told_before_anything_is_built(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse(arguments, 1)


def test_one_process():
    with pytest.raises(ConfigError, match="measures one process, but the world size is 2"):
        parse([], 2)


def test_the_models_that_are_measured():
    benchmark, runs = parse([], 1)
    assert (benchmark.warmup, benchmark.steps) == (3, 10)
    models = {run.experiment: run.config for run in runs}
    transfusion, chameleon = models["benchmark_transfusion"], models["benchmark_chameleon"]
    assert (transfusion.model.trunk.num_layers, transfusion.model.trunk.hidden_size) == (24, 2048)
    assert (chameleon.model.trunk.num_layers, chameleon.model.trunk.hidden_size) == (8, 4096)
    for config in models.values():
        assert config.data.seq_length == 8192 and config.train.precision == "bf16" and config.optim.lr == 0.0
