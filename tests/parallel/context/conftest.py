import pytest

from megatron_mm.parallel.context import assignment


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few positions, so that the short rows of these tests are cut and swapped; forked ranks inherit it."""
    monkeypatch.setattr(assignment, "FINEST", 8)
