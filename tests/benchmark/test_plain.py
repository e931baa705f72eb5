"""The plain model that the engine's step is measured against computes what the engine computes."""

import csv

import pytest
from distributed import run_ranks

from megatron_mm.benchmark.plain import main
from megatron_mm.benchmark.plain_model import PlainTrainer
from megatron_mm.config.compose import ConfigError, compose

TINY = [
    "data.seq_length=64", "model.trunk.num_layers=2", "model.trunk.hidden_size=32", "model.trunk.num_attention_heads=2",
    "optim.lr=1e-2", "optim.lr_warmup_iters=2",
]  # fmt: skip


def run(_, *arguments):
    return main(arguments)


def test_both_learn_alike(tmp_path):
    """Ten steps of warm-up, decay, weight decay and clipping from the same weights end at the same loss."""
    arguments = ["threads=1", "warmup=2", "steps=8", f"out={tmp_path}/plain.csv", *TINY, "optim.clip_grad=0.5"]
    ((row,),) = run_ranks(run, 1, *arguments)
    assert row.loss_difference < 1e-5
    (written,) = csv.DictReader((tmp_path / "plain.csv").open())
    assert float(written["engine_ms"]) == row.engine_ms > 0 and written["torch"] and written["cores"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["experiment=demo_janus"], "no model.family=janus"),
        (["experiment=demo", "model.trunk.hidden_dropout=0.1"], "no model.trunk.hidden_dropout"),
        (["experiment=demo", "train.precision=bf16"], "no train.precision=bf16"),
    ],
)
def test_what_the_plain_model_has_not_is_told(overrides, said):
    with pytest.raises(ConfigError, match=said):
        PlainTrainer(compose(overrides), 300)
