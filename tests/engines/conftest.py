"""The shards of `tiny_runs`, once a session."""

from pathlib import Path

import pytest
from tiny_runs import make_shards, overrides_for, run_training


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder)
    return folder


@pytest.fixture(scope="session")
def one_process(shards, tmp_path_factory):
    """Call with a tiny family and overrides: the steps of that run on one process, made once."""
    runs = {}

    def get(family: str, *overrides: str) -> list[dict]:
        if (family, overrides) not in runs:
            folder = tmp_path_factory.mktemp("one_process")
            runs[family, overrides] = run_training(overrides_for(family, shards, folder, *overrides))
        return runs[family, overrides]

    return get
