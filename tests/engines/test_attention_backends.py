"""A run gives the same curve whichever backend computes its attention."""

import pytest
from tiny_runs import FAMILIES, overrides_for, run_training

SHORT = (
    "train.train_iters=2",
    "optim.lr_warmup_iters=0",
    "train.global_batch_size=2",
    "model.trunk.num_layers=2",
    "parallel.recompute_granularity=full",
)
IN_CI = ("transfusion", "chameleon", "mmada")
"""Patches, codes and a causal mask, masked codes; the other families in the exhaustive suite."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in IN_CI else pytest.mark.exhaustive) for name in FAMILIES]
)
def test_the_span_kernel_trains_as_the_reference_does(family, shards, tmp_path):
    """Under recompute, on two tensor-parallel ranks; without a GPU in Triton's interpreter."""
    runs = {}
    for backend, ranks in (("reference", 1), ("span", 1), ("span", 2), ("sdpa", 1)):
        folder = tmp_path / f"{backend}{ranks}"
        layout = (f"attention.backend={backend}", f"parallel.tensor_model_parallel_size={ranks}")
        runs[backend, ranks] = run_training(overrides_for(family, shards, folder, *SHORT, *layout), ranks)
    truth = runs.pop(("reference", 1))
    for run in runs.values():
        for step, true in zip(run, truth, strict=True):
            assert step["loss"] == pytest.approx(true["loss"], rel=1e-5)
            assert step["grad_norm"] == pytest.approx(true["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("key", ["attention.backend=flash", "fusion.elementwise=compile"])
def test_what_cannot_run_here_is_refused_before_there_is_a_run(key, shards, tmp_path):
    with pytest.raises(AssertionError, match=f"{key} cannot run"):
        run_training(overrides_for("transfusion", shards, tmp_path / "run", key))
    assert not (tmp_path / "run").exists()
