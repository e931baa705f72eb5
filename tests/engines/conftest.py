"""The shards of `tiny_runs`, once a session."""

from pathlib import Path

import pytest
from tiny_runs import make_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder)
    return folder
