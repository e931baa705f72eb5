"""`python -m megatron_mm.plan` with rehearse=true and search=true, as users call it."""

import csv
import os
import re
import subprocess
import sys

import pytest

TINY = [
    "model=transfusion_tiny", "run.name=tiny", "data.path=none", "data.seq_length=512", "train.precision=bf16",
    "train.global_batch_size=8", "world_size=4", "text_vocab_size=500",
]  # fmt: skip


def _plan(*arguments: str) -> str:
    """What it prints, in a process in which Triton's kernels are compiled ones."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "megatron_mm.plan", *TINY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"COLUMNS": "160"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def _cells(output: str, name: str) -> list[str]:
    """Of the table's line that begins with `name`."""
    (line,) = (line for line in output.splitlines() if re.match(rf"[│┃] *{re.escape(name)}", line))
    return [cell.strip() for cell in re.split("[│┃]", line)[2:-1]]


def test_first_and_last_stage():
    said = _plan("rehearse=true", "parallel.pipeline_model_parallel_size=2")
    assert "512 tokens a row" in said and "tensor 1 x pipeline 2 x context 1 x data 2" in said
    assert _cells(said, "peak memory, GB") == ["first stage", "last stage"]
    assert _cells(said, "inside micro-batches") == ["0", "0"] and _cells(said, "copy to the host") == ["1", "1"]
    assert all(float(seconds.split()[0]) > 0 for seconds in (*_cells(said, "total  "), *_cells(said, "bubble")))


@pytest.mark.slow
def test_one_rank():
    said = _plan("rehearse=true", "rank=3", "parallel.tensor_model_parallel_size=2")
    assert _cells(said, "peak memory, GB") == ["rank 3"]


@pytest.mark.slow
def test_search(tmp_path):
    arguments = ("search=true", "trials=2", f"out={tmp_path}/tables/layouts.csv")
    said = _plan(*arguments)
    assert _plan(*arguments) == said, "and adds no row a second time"
    with (tmp_path / "tables" / "layouts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all(row["fits"] == "True" and row["gpus"] == "4" for row in rows)
    assert float(rows[0]["step_s"]) <= float(rows[1]["step_s"])
    assert all(row["layout"] in said for row in rows)
