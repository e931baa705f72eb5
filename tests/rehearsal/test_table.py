"""Launches, bytes and memory of a layer are those of the checked-in table."""

import pytest
import torch

from megatron_mm.rehearsal.table import FAMILIES, LAYOUTS, TABLE, TORCH, rows, to_csv


@pytest.mark.skipif(not torch.__version__.startswith(TORCH), reason=f"the table counts torch {TORCH}'s operations")
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_table(family):
    held = [line for line in TABLE.read_text().splitlines() if line.startswith(f"{family},")]
    found = to_csv([row for layout in LAYOUTS for row in rows(family, layout)]).splitlines()[1:]
    assert found == held, "if that is meant: python -m megatron_mm.rehearsal.table, and say why in the change"
