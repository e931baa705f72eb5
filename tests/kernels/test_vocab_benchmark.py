"""The head's benchmark from its command line, at a size for a CPU."""

import csv
import sys

import pytest
from mm_kernels.vocab_loss import benchmark

TINY = ("--device", "cpu", "--tokens", "16", "--vocab", "64", "--hidden", "8", "--repeats", "1")


@pytest.mark.slow
def test_rows_are_appended_and_not_measured_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(tmp_path), *TINY])
    monkeypatch.setattr(benchmark, "MAKERS", {"ours": None, "eager": None})
    benchmark.main()
    first = list(csv.DictReader((tmp_path / "vocab_loss.csv").open()))
    assert [row["implementation"] for row in first] == ["ours", "eager"]
    assert all(float(row["forward_ms"]) > 0 and row["device"].startswith("CPU") and row["on"] == "cpu" for row in first)
    capsys.readouterr()
    benchmark.main()
    assert capsys.readouterr().out == "" and list(csv.DictReader((tmp_path / "vocab_loss.csv").open())) == first
