"""What a user sees of a run that is started from the command line."""

import os
import subprocess
import sys

import pytest
from tiny_runs import overrides_for


@pytest.mark.slow
def test_the_log_says_once_what_computes(shards, tmp_path):
    overrides = overrides_for("transfusion", shards, tmp_path / "run", "train.train_iters=3", "logging.log_interval=1")
    command = [sys.executable, "-m", "megatron_mm.train", *overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    said = run.stdout + run.stderr
    for once in ("attention backend: reference (CPU", "elementwise parts: ", "> test: transfusion on cpu, world 1"):
        assert said.count(once) == 1, said
    assert said.count("elapsed time per iteration") == 3
