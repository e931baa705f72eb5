"""The figures of a run, from a metrics.jsonl written here."""

import json

import pytest

from megatron_mm.report.metrics import read_metrics
from megatron_mm.report.summary import Score, describe, training_summary


@pytest.fixture
def rows(tmp_path):
    """A run of 30 iterations whose text loss is 30, 29, ... 1 and whose image loss is constant."""
    written = [
        {
            "iteration": i,
            "consumed_tokens": 100 * i,
            "loss": 31.0 - i + 5 * 0.25,
            "loss/text": 31.0 - i,
            "loss/image": 0.25,
            "iteration_seconds": 2.5,
        }
        for i in range(1, 31)
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return read_metrics(path)


def test_training(rows):
    assert training_summary(rows) == {
        "iterations": 30,
        "consumed_tokens": 3000,
        "losses": {
            "loss": {"first": 31.25, "last": 11.75},
            "loss/text": {"first": 30.0, "last": 10.5},
            "loss/image": {"first": 0.25, "last": 0.25},
        },
        "training_seconds": 75.0,
    }


def test_a_run_shorter_than_the_mean(rows):
    assert training_summary(rows[:3])["losses"]["loss/text"] == {"first": 30.0, "last": 29.0}


def test_score():
    assert str(Score(183, 200)) == "183/200 = 91.5 %"
    assert Score(183, 200).to_dict() == {"right": 183, "of": 200, "accuracy": 0.915}


def test_console_of_a_family_that_draws_nothing(rows):
    summary = training_summary(rows) | {"run": "runs/demo", "generated_images": None}
    summary |= dict.fromkeys(("captions", "classifier"), Score(471, 500).to_dict())
    said = describe(summary, "python -m sample")
    assert "captions right" in said and "recognised" not in said


def test_console(rows):
    summary = training_summary(rows) | {
        "run": "runs/demo",
        "generated_images": Score(183, 200).to_dict(),
        "diversity": 0.871,
        "captions": Score(471, 500).to_dict(),
        "classifier": Score(984, 1000).to_dict(),
    }
    lines = [" ".join(line.split()) for line in describe(summary, "python -m sample").splitlines()]
    assert lines == [
        "runs/demo: 30 iterations in 1 min 15 s",
        "text loss 30.000 -> 10.500",
        "image loss 0.250 -> 0.250",
        "generated images recognised 183/200 = 91.5 % (by a classifier that recognises 98.4 % of real ones)",
        "their diversity 0.87 of real images' (mean distance within a class)",
        "captions right 471/500 = 94.2 %",
        "pictures samples.png, mask.png, loss.png in runs/demo; all figures in summary.json",
        "sample more python -m sample",
    ]
