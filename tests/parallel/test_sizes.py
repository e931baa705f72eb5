"""Every size of the papers, built without memory, against its published number of parameters."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from trunk_runs import CPU, config_of

from megatron_mm.config.compose import compose
from megatron_mm.config.model import TrunkConfig
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.build import build_chunks
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.parallel.sizes import ParameterCounts, count_parameters
from megatron_mm.plan.memory import parameters

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "families.md"


@dataclass(frozen=True)
class Published:
    billions: float
    text_entries: int
    """Of the text tokenizer."""
    parts: tuple[str, ...] = ("trunk", "embedding", "head")
    """What the figure counts."""


ONE_MATRIX = ("trunk", "embedding")
"""Embedding and head are one matrix (Qwen2.5 1.5B), or counted as if they were (Phi-1.5's 1.3B)."""
WHOLE = ("trunk", "embedding", "head", "beside")
SIZES = {
    "transfusion_0.16b": Published(0.16, 32000),
    "transfusion_0.37b": Published(0.37, 32000),
    "transfusion_0.76b": Published(0.76, 32000),
    "transfusion_1.4b": Published(1.4, 32000),
    "transfusion_7b": Published(7.0, 32000),
    "chameleon_7b": Published(7.0, 57000),
    "chameleon_34b": Published(34.0, 57000),
    "janus_pro_1b": Published(2.09, 100015, WHOLE),
    "janus_pro_7b": Published(7.42, 100015, WHOLE),
    "showo_1.3b": Published(1.3, 50295, ONE_MATRIX),
    "mmada_8b": Published(8.0, 126349),
    "showo_flow_1.5b": Published(1.54, 151936, ONE_MATRIX),
    "showo_flow_7b": Published(7.62, 152064),
}


def count(_init, names: list[str]) -> dict[str, tuple[ParameterCounts, float]]:
    """Name -> (counts, the plan's estimate of the whole)."""
    found = {}
    for name in names:
        config = compose([f"model={name}", "run.name=test", "data.path=none"])
        family = build_family(config.model, SIZES[name].text_entries)
        counts = count_parameters(config, family)
        found[name] = counts, parameters(config, family.vocab.size, counts.beside)[1]
    return found


@pytest.fixture(scope="module")
def counted():
    return run_ranks(count, 1, list(SIZES))[0]


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_their_parameters(counted, name):
    counts, planned = counted[name]
    published = SIZES[name]
    ours = sum(getattr(counts, part) for part in published.parts)
    assert ours / 1e9 == pytest.approx(published.billions, rel=0.05)
    assert planned == pytest.approx(counts.total, rel=0.01)


def row(name: str, counts: ParameterCounts) -> str:
    """Of the table in docs/families.md."""
    published = SIZES[name]
    parts = [counts.trunk, counts.embedding, counts.head, counts.beside, counts.total]
    which = " + ".join(published.parts)
    figures = " | ".join(f"{part / 1e6:,.1f}" for part in parts)
    return f"| `{name}` | {published.text_entries:,} | {figures} | {published.billions:g}B | {which} |"


def test_the_documentation_says_so(counted):
    lines = DOCUMENTATION.read_text().splitlines()
    missing = [line for name in SIZES if (line := row(name, counted[name][0])) not in lines]
    assert not missing, "\n".join(missing)


def test_qwen_s_bodies_have_qwen_s_parameters(counted):
    """Published without embeddings: 1.31 and 6.53 billion."""
    for name, published in (("showo_flow_1.5b", 1.31), ("showo_flow_7b", 6.53)):
        assert counted[name][0].trunk / 1e9 == pytest.approx(published, abs=0.005)


def count_both(init) -> tuple[int, ParameterCounts, torch.device]:
    """Of a model in memory, the same counted, and the device that modules are built on afterwards."""
    config = config_of(TrunkConfig(2, 32, 4, add_qkv_bias=True, qk_layernorm=True, head_bias=True))
    family = build_family(config.model, 256)
    with process_groups(config.parallel, 0, CPU, **init) as layout:
        chunks = build_chunks(config, family, layout, CPU)
        counts = count_parameters(config, family)
        device = next(build_chunks(config, family, layout, CPU)[0].parameters()).device
        return sum(p.numel() for model in chunks for p in model.parameters()), counts, device


def test_counts_are_those_of_a_model_in_memory():
    ((whole, counts, device),) = run_ranks(count_both, 1)
    assert counts.total == whole and device == CPU
    assert counts.embedding == 384 * 32 and counts.head == 384 * 33 and counts.beside == 0
