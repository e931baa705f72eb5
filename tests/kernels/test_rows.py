"""Rows of measurements: appended at once, known again, and whole after a kill."""

import subprocess
import sys

import pytest
import torch
from mm_kernels.rows import AROUND, Rows, around


def test_a_row_is_known_by_its_key(tmp_path):
    rows = Rows(tmp_path / "new" / "rows.csv", ("name", "size", "ms"), ("name", "size"))
    rows.append({"name": "ours", "size": 0.5, "ms": 1 / 3, "more": 1})
    again = Rows(rows.path, ("name", "size", "ms"), ("name", "size"))
    assert {"name": "ours", "size": 0.5} in again and {"name": "ours", "size": 1} not in again
    again.append({"name": "ours", "size": 1, "ms": None})
    assert rows.path.read_text() == "name,size,ms\nours,0.5,0.333333\nours,1,\n"
    with pytest.raises(ValueError, match="rows.csv has other columns"):
        Rows(rows.path, ("name", "ms"), ("name",))


@pytest.mark.parametrize("cut", [3, 12, 20])
def test_half_a_line_is_no_row(tmp_path, cut):
    path = tmp_path / "rows.csv"
    path.write_text("name,ms\nours,1\nflex,2\n"[:cut])
    rows = Rows(path, ("name", "ms"), ("name",))
    rows.append({"name": "last", "ms": 3})
    kept = {3: [], 12: [], 20: ["ours"]}[cut]
    assert [row["name"] for row in rows.read()] == [*kept, "last"]


def test_where_a_row_was_measured():
    here = around(torch.device("cpu"))
    assert tuple(here) == AROUND and here["torch"] == torch.__version__ and here["device"].startswith("CPU")
    command = "import mm_kernels.rows, sys; sys.exit(any(m.startswith('megatron') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0, "kernels stand alone"
