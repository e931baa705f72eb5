"""The moving average of the weights against a plain one of gathered weights, under every layout and optimizer."""

import pytest
import torch
from distributed import run_ranks
from tiny_runs import CPU, overrides_for, run_training

from megatron_mm.config.schema import ParallelConfig
from megatron_mm.engines.reading import CheckpointError, read_shapes
from megatron_mm.engines.whole_weights import load_whole_weights
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.sampling.model import SamplingModel

DECAY = 0.7
TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
SP, PLAIN = "parallel.sequence_parallel=true", "parallel.use_distributed_optimizer=false"
LAYOUTS = {
    "one": (1, []),
    "dp2_overlap": (2, ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
    "tp2_sp_pp2": (4, [TP, SP, PP]),
    "dp2_plain": (2, [PLAIN]),
}
EMA = f"optim.ema_decay={DECAY}"


def whole(folder, averaged=False):
    return run_ranks(_whole, 1, folder, averaged)[0]


def _whole(init_kwargs, folder, averaged):
    with process_groups(ParallelConfig(), 0, CPU, **init_kwargs):
        return {name: weight.clone() for name, weight in load_whole_weights(folder, averaged).items()}


def run(family, shards, folder, *overrides, world_size=1):
    """Six iterations, each saved; the folder of the checkpoints."""
    saves = [f"checkpoint.save={folder}/ck", "checkpoint.save_interval=1", "train.exit_interval=6"]
    run_training(overrides_for(family, shards, folder, *saves, *overrides), world_size)
    return folder / "ck"


def at(folder, iteration):
    return folder / f"iter_{iteration:07d}"


def assert_averages(folder, first, of=None, tolerance=1e-6):
    """Those after the last iteration are of the weights from `first` on, which it began with."""
    average = None
    for iteration in range(first, 7):
        weights = of(at(folder, iteration)) if of else whole(at(folder, iteration))
        if average is None:
            average = weights
        else:
            average = {name: DECAY * average[name] + (1 - DECAY) * weight for name, weight in weights.items()}
    found = whole(at(folder, 6), averaged=True)
    for name, expected in average.items():
        torch.testing.assert_close(found[name], expected, rtol=tolerance, atol=tolerance, msg=name)
    last = whole(at(folder, 6))
    assert any(not torch.allclose(found[name], last[name], rtol=1e-4) for name in last)


@pytest.mark.parametrize("layout", ["one", *(pytest.param(n, marks=pytest.mark.slow) for n in list(LAYOUTS)[1:])])
def test_it_is_that_of_gathered_weights(layout, shards, tmp_path):
    """A run that turns it on at iteration 2, under another layout, begins with the weights as they are."""
    world_size, overrides = LAYOUTS[layout]
    plain = [PLAIN] if PLAIN in overrides else []
    folder = run("transfusion", shards, tmp_path, *plain, "train.exit_interval=2")
    assert not any(name.startswith("ema.") for name in read_shapes(at(folder, 2)))
    run("transfusion", shards, tmp_path, *overrides, EMA, "run.if_exists=resume", world_size=world_size)
    assert_averages(folder, 2)


@pytest.mark.slow
def test_it_moves_to_another_layout_and_back(shards, tmp_path):
    """Two layouts in turn, saved beside the run, and one without a break."""
    unbroken = run("showo_flow", shards, tmp_path / "unbroken", EMA)
    broken = tmp_path / "broken"
    run("showo_flow", shards, broken, EMA, "train.exit_interval=2", world_size=2)
    run("showo_flow", shards, broken, EMA, "train.exit_interval=4", "run.if_exists=resume", TP, SP, PP, world_size=4)
    run("showo_flow", shards, broken, EMA, "run.if_exists=resume", "checkpoint.async_save=true")
    ours, theirs = (whole(at(folder, 6), averaged=True) for folder in (broken / "ck", unbroken))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_in_bf16_it_is_of_the_master_weights(shards, tmp_path):
    folder = run("transfusion", shards, tmp_path, EMA, "train.precision=bf16", world_size=2)
    shapes = read_shapes(at(folder, 6))
    averaged = [name for name in shapes if name.startswith("ema.")]
    assert averaged and all(shapes[name].dtype == torch.float32 for name in averaged)
    ours, weights = whole(at(folder, 6), averaged=True), whole(at(folder, 6))
    assert all(ours[name].dtype == weight.dtype for name, weight in weights.items())
    moved = [name for name in weights if not torch.equal(ours[name], weights[name])]
    assert len(moved) > len(weights) / 2


@pytest.mark.slow
def test_what_is_frozen_has_none(shards, tmp_path):
    folder = run("transfusion", shards, tmp_path, EMA, "optim.frozen=[decoder.layers.0.*]")
    names = {name.removeprefix("ema.") for name in read_shapes(at(folder, 6)) if name.startswith("ema.")}
    assert names and not any(name.startswith("decoder.layers.0.") for name in names)
    ours, weights = whole(at(folder, 6), averaged=True), whole(at(folder, 6))
    assert all(torch.equal(ours[name], weight) for name, weight in weights.items() if name not in names)


def _sampled(init_kwargs, folder):
    with process_groups(ParallelConfig(), 0, CPU, **init_kwargs), SamplingModel.load(folder, averaged=True) as model:
        return {name: p.detach().clone() for name, p in model.stage.named_parameters()}


def test_sampling_takes_it(shards, tmp_path):
    folder = run("transfusion", shards, tmp_path, EMA, "train.precision=bf16", "train.exit_interval=3")
    (found,) = run_ranks(_sampled, 1, folder)
    expected = whole(at(folder, 3), averaged=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_checkpoint_without_says_so(shards, tmp_path):
    folder = run("transfusion", shards, tmp_path, "train.exit_interval=1")
    with pytest.raises(AssertionError, match=r"holds no moving average: it was written without optim\.ema_decay"):
        whole(at(folder, 1), averaged=True)
    assert issubclass(CheckpointError, ValueError)
