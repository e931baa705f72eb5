"""summary.json and its short form on the console: the figures of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LAST_ITERATIONS = 20
"""The last loss is the mean over so many iterations: single ones are noisy."""


@dataclass(frozen=True)
class Score:
    """How many of how many were right."""

    right: int
    of: int

    @property
    def accuracy(self) -> float:
        """Between 0 and 1; NaN of nothing."""
        return self.right / self.of if self.of else float("nan")

    def __str__(self) -> str:
        return f"{self.right}/{self.of} = {100 * self.accuracy:.1f} %"

    def to_dict(self) -> dict[str, Any]:
        return {"right": self.right, "of": self.of, "accuracy": self.accuracy}


def training_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Iterations, first and last value of each loss, and the time that the iterations of `metrics.jsonl` took."""
    names = [key for key in rows[0] if key == "loss" or key.startswith("loss/")]
    last = rows[-LAST_ITERATIONS:]
    return {
        "iterations": rows[-1]["iteration"],
        "consumed_tokens": rows[-1]["consumed_tokens"],
        "losses": {
            name: {"first": rows[0][name], "last": sum(row[name] for row in last) / len(last)} for name in names
        },
        "training_seconds": sum(row["iteration_seconds"] for row in rows),
    }


def describe(summary: Mapping[str, Any], sample_more: str) -> str:
    """The summary in a few lines for the console; `sample_more` is the command that goes on from here."""
    drawn, captions, classifier = (
        summary[key] and Score(summary[key]["right"], summary[key]["of"])
        for key in ("generated_images", "captions", "classifier")
    )
    minutes, seconds = divmod(round(summary["training_seconds"]), 60)
    figures = {
        f"{name.removeprefix('loss/')} loss": f"{loss['first']:.3f} -> {loss['last']:.3f}"
        for name, loss in summary["losses"].items()
        if name != "loss"
    }
    if drawn:
        judge = f"by a classifier that recognises {100 * classifier.accuracy:.1f} % of real ones"
        figures["generated images recognised"] = f"{drawn}  ({judge})"
        figures["their diversity"] = f"{summary['diversity']:.2f} of real images' (mean distance within a class)"
    figures |= {
        "captions right": str(captions),
        "pictures": f"samples.png, mask.png, loss.png in {summary['run']}; all figures in summary.json",
        "sample more": sample_more,
    }
    heading = f"{summary['run']}: {summary['iterations']} iterations in {minutes} min {seconds} s"
    return "\n  ".join([heading, *(f"{name:<28}{value}" for name, value in figures.items())])
