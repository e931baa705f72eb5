"""`benchmarks/gpu.sh` itself, dry: slices, their limit, and going on."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def gpu_sh(*arguments) -> subprocess.CompletedProcess:
    own = {"PYTHON": sys.executable, "MM_COMMIT": "abc", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = ["bash", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False)


def test_mistakes_and_a_list(tmp_path):
    slices = [line.split()[0] for line in gpu_sh("--list").stdout.splitlines()]
    assert slices[:5] == ["tests", "kernels", "step", "vocab_loss", "tiles"]
    assert gpu_sh().returncode == 2
    unknown = gpu_sh(tmp_path, "--slice", "everything")
    assert unknown.returncode == 2 and "no slice everything: tests kernels" in unknown.stderr
    blind = gpu_sh(tmp_path)
    assert blind.returncode == 2 and "sees no GPU" in blind.stderr


@pytest.mark.slow
def test_a_slice_that_was_cut_goes_on(tmp_path):
    cut = gpu_sh(tmp_path, "--dry", "--slice", "kernels", "--limit", 1)
    assert cut.returncode == 3 and "call again to go on: kernels" in cut.stderr
    assert not (tmp_path / "kernels.done").exists()
    assert gpu_sh(tmp_path, "--dry", "--slice", "kernels").returncode == 0
    assert (tmp_path / "kernels.done").read_text() == "abc\n"
    assert gpu_sh(tmp_path, "--dry", "--slice", "kernels").stdout == "== kernels: done\n"
    first = (tmp_path / "attention" / "attention.csv").read_text()
    assert gpu_sh(tmp_path, "--dry", "--slice", "all_kernels").returncode == 0
    path = tmp_path / "attention" / "attention.csv"
    assert path.read_text().startswith(first), "what was measured is neither lost nor measured again"
    rows = list(csv.DictReader(path.open()))
    measured = [row["distribution"] for row in rows if not row["note"]]  # a peer that is not installed has a note
    assert measured == ["docs"] * 2 + ["t2i"] * 2
    assert all(row["commit"] == "abc" and row["torch"] and row["device"].startswith("CPU") for row in rows)


@pytest.mark.slow
def test_every_slice_starts(tmp_path):
    """But for the kernel table: above."""
    for name in ("tests", "step", "vocab_loss", "tiles"):
        done = gpu_sh(tmp_path, "--dry", "--slice", name)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "tests.passed").read_text().count("test_mask.py::") > 5
    for table in ("step/results.csv", "step/profile.csv", "vocab_loss/vocab_loss.csv", "tiles/tiles.csv"):
        assert list(csv.DictReader((tmp_path / table).open())), table
