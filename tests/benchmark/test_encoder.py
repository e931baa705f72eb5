"""Images on each rank, in order and dealt out."""

import csv

import numpy as np
import pytest
from tiny_runs import make_shards, overrides_for

from megatron_mm.benchmark.encoder import main, measure
from megatron_mm.config.compose import ConfigError
from megatron_mm.data.plan import Plan


def test_counts_are_those_of_the_packs():
    lengths = np.full(64, 10)
    plan = Plan(lengths, 10, 0, 64, images=np.arange(64) % 2 * 4.0)
    (line,) = measure(plan, [4], 4, 4)
    assert (line.ranks, line.packs, line.steps) == (4, 4, 4) and line.images == 8.0
    assert line.dealt < line.in_order and line.dealt_worst <= line.in_order_worst


def test_command(tmp_path, capsys):
    make_shards(tmp_path)
    given = [*overrides_for("janus", tmp_path, tmp_path / "run"), "ranks=2,4", "steps=3", "packs=2"]
    main([*given, f"out={tmp_path / 'out.csv'}"])
    lines = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [line["ranks"] for line in lines] == ["2", "4"]
    assert all(1 <= float(line["dealt"]) <= float(line["in_order"]) for line in lines)
    assert "dealt out" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="chameleon has no encoder"):
        main(overrides_for("chameleon", tmp_path, tmp_path / "run"))
