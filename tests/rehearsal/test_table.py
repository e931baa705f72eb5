"""Launches, bytes and memory of a layer are those of the checked-in table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mm.rehearsal.table import FAMILIES, TORCH

TABLE = Path(__file__).parents[2] / "docs" / "rehearsal" / "layers.csv"
COMMAND = (sys.executable, "-W", "ignore", "-m", "megatron_mm.rehearsal.table")


def _run(*arguments: str) -> subprocess.CompletedProcess:
    """The command, in a process in which Triton's kernels are compiled ones."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.skipif(not torch.__version__.startswith(TORCH), reason=f"the table counts torch {TORCH}'s operations")
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_table(tmp_path, family):
    done = _run(f"out={tmp_path}/layers.csv", f"families={family}")
    assert done.returncode == 0, done.stderr
    head, *lines = TABLE.read_text().splitlines()
    held = [head, *(line for line in lines if line.startswith(f"{family},"))]
    found = (tmp_path / "layers.csv").read_text().splitlines()
    assert found == held, "if that is meant: python -m megatron_mm.rehearsal.table, and say why in the change"


def test_an_unknown_family_is_one_sentence(tmp_path):
    done = _run(f"out={tmp_path}/layers.csv", "families=llama")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "families=llama is unknown" in done.stderr
