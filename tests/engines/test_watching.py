"""What a run watches: steps that change nothing, and where its time goes."""

import gzip
import json

import pytest
import torch
from tiny_runs import overrides_for, run_training

from megatron_mm.config.compose import ConfigError, compose
from megatron_mm.config.validate import validate
from megatron_mm.engines.megatron import MegatronEngine


@pytest.fixture
def broken(monkeypatch):
    """From the given iteration on, weights are no numbers any more for so many steps; then they are again."""

    def breaks(first, count):
        step, number = MegatronEngine.step, 0

        def broken_step(self, batches, stop=bool):
            nonlocal number
            number += 1
            weight = next(parameter for parameter in self.models[-1].back.parameters())
            kept = weight.detach().clone()
            if first <= number < first + count:
                weight.data.fill_(torch.nan)
            metrics = step(self, batches, stop)
            if metrics.skipped:
                weight.data.copy_(kept)
            return metrics

        monkeypatch.setattr(MegatronEngine, "step", broken_step)

    return breaks


def test_a_run_ends_after_so_many_skipped_steps(broken, shards, tmp_path):
    broken(3, 100)
    given = overrides_for("chameleon", shards, tmp_path / "run", "train.max_skipped=3", "checkpoint.save_interval=2",
                          f"checkpoint.save={tmp_path}/run/checkpoints")  # fmt: skip
    with pytest.raises(AssertionError, match=r"of 3 steps in a row were not finite .*iter_0000004 is the latest"):
        run_training(given)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1]


def test_skipped_steps_that_pass_are_survived(broken, shards, tmp_path):
    broken(3, 2)
    steps = run_training(
        overrides_for("chameleon", shards, tmp_path / "run", "train.max_skipped=3", "train.exit_interval=6")
    )
    assert [step["skipped"] for step in steps] == [False, False, True, True, False, False]


def test_a_window_is_profiled_on_the_ranks_that_are_named(shards, tmp_path):
    given = ["profile.start=2", "profile.steps=2", "profile.ranks=[1]", "train.exit_interval=5"]
    run_training(overrides_for("transfusion", shards, tmp_path / "run", *given), 2)
    assert [path.name for path in (tmp_path / "run/profile").iterdir()] == ["rank_1.json.gz"]
    with gzip.open(tmp_path / "run/profile/rank_1.json.gz") as file:
        events = json.load(file)["traceEvents"]
    # the optimizer's kernel, once a parameter group: of two iterations
    steps = [event for event in events if event.get("name") == "aten::_fused_adamw_"]
    assert len(steps) == 2 * len({event["args"]["Input Dims"].__repr__() for event in steps})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["profile.start=1", "profile.ranks=[0,2]"], r"profile\.ranks=\[0, 2\] names ranks that a world of 2 does not"),
        (["train.max_skipped=0"], r"train\.max_skipped=0 must be 1 or more"),
        (["optim.lr_decay_style=WSD"], r"decays in the last optim\.lr_wsd_decay_iters iterations: set them"),
        (["optim.lr_wsd_decay_iters=5"], r"lr_wsd_decay_iters=5 does nothing with optim\.lr_decay_style=cosine"),
        (
            [
                "optim.lr_decay_style=WSD",
                "optim.lr_wsd_decay_iters=95",
                "train.train_iters=100",
                "optim.lr_warmup_iters=9",
            ],
            r"lr_wsd_decay_iters=95 is more than the 91 iterations between",
        ),
    ],
)
def test_contradictions_are_named(overrides, said):
    with pytest.raises(ConfigError, match=said):
        validate(compose(["model=transfusion_tiny", "run.name=test", "data.path=data/none", *overrides]), 2)


SCHEDULES = {
    "WSD": (["optim.lr_wsd_decay_iters=4", "optim.lr_wsd_decay_style=linear", "optim.min_lr=2e-4"],
            [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
    "inverse-square-root": ([], [0.5, *((2 / n) ** 0.5 for n in range(2, 11))]),
}  # fmt: skip


@pytest.mark.parametrize("style", SCHEDULES)
def test_schedules(style, shards, tmp_path):
    """Against their formulas; a step's rate is the one that it was taken with."""
    keys, expected = SCHEDULES[style]
    keys = [f"optim.lr_decay_style={style}", "train.train_iters=10", *keys]
    steps = run_training(overrides_for("chameleon", shards, tmp_path / "run", *keys))
    assert [step["learning_rate"] for step in steps[1:]] == pytest.approx([1e-3 * rate for rate in expected[:-1]])
