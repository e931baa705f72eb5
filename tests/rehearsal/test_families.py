"""On the CUDA path of every family, under every layout, the host never waits inside a micro-batch, and once a step."""

import pytest
from engines.test_layout_invariance import LAYOUTS, OF_EACH, THOROUGH
from tiny_runs import COMMON, FAMILIES, MODEL

from megatron_mm.rehearsal.record import ENGINE

EXPERTS = ["model.trunk.moe_grouped_gemm=true"]
FAST = ("dp2", "cp4_ring")
WHOLE = THOROUGH[0]
"""The family that is rehearsed under every layout in the suite; the others in the exhaustive one."""


def cases():
    for family in (*FAMILIES, "unimoe"):
        for layout in LAYOUTS if family in THOROUGH else OF_EACH:
            if layout != "one_worker":  # of the loader, which a rehearsal has not
                slow = pytest.mark.slow if family == WHOLE else pytest.mark.exhaustive
                yield pytest.param(family, layout, id=f"{family}-{layout}", marks=() if layout in FAST else slow)


@pytest.mark.parametrize(("family", "layout"), cases())
def test_the_host_waits_once_a_step(rehearsed, family, layout):
    world_size, own = LAYOUTS[layout]
    common = [line for line in COMMON if family != "unimoe" or not line.startswith("model.condition_dropout")]
    overrides = [
        *(line for line in MODEL[family] if "{folder}" not in line), *common, "data.path=none", "run.dir=none",
        "train.precision=bf16", *own, *(EXPERTS if family == "unimoe" else []),
    ]  # fmt: skip
    for rank in (0, world_size - 1):
        record = rehearsed(overrides, world_size, rank).record
        assert not record.syncs_of(once=False)
        assert [(part, times) for (part, *_), times in record.syncs.items()] == [(ENGINE, 1)]
        assert record.kinds["attention"].launches > 0, "our kernels ran"
        assert record.kinds["fused chain"].launches > 0, "and compiled chains"
