"""The memory of a rank: measured by the command, and as flat as it says."""

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
from documents import label_counts

from megatron_mm.benchmark.memory import MODEL, TEXT_VOCABULARY, one_document
from megatron_mm.config.compose import compose
from megatron_mm.families.registry import build_family
from megatron_mm.mask import causal


@pytest.mark.slow
def test_memory_does_not_grow_with_ranks_and_context(tmp_path):
    """Twice the ranks and the context: a rank's peak grows by less than a tenth, where it would double unspread."""
    out = tmp_path / "memory.csv"
    for ranks in (1, 2):
        arguments = [f"out={out}", "tokens=512", "parallel.context_parallel_comm=ring"]
        command = ["torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "megatron_mm.benchmark.memory"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-m", *command, *arguments],
            env=env,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert run.returncode == 0, run.stderr
    small, large = list(csv.DictReader(out.open()))
    assert (small["seq_length"], large["seq_length"]) == ("512", "1024")
    assert float(large["mean_mib"]) < 1.1 * float(small["mean_mib"])


def test_one_document_fills_the_row():
    family = build_family(compose([*MODEL, "data.seq_length=256"]).model, TEXT_VOCABULARY)
    batch = one_document(family, 256)
    assert batch.real_tokens == 256 and np.array_equal(batch.mask[0].numpy(), causal(256))
    assert label_counts(family, batch)["ce"] == 255
