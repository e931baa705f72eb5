"""`python -m megatron_mm.demo run=runs/demo`: what a run trained on MNIST has learned, in figures and pictures.

A classifier trained here on the real images judges the generated ones; generated captions are compared with the right
ones, letter by letter; all on held-out images. Writes samples.png, mask.png, loss.png and summary.json into the run's
folder. The same checkpoint gives the same figures.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from megatron_mm.config.arguments import parse_arguments
from megatron_mm.config.cli import user_errors
from megatron_mm.config.compose import Config, ConfigError
from megatron_mm.config.generate import SamplingConfig
from megatron_mm.data.dataset import open_data
from megatron_mm.data.files import replacing
from megatron_mm.data.image_codec import PixelCodec
from megatron_mm.data.loader import StepLoader
from megatron_mm.engines.checkpoint import resolve
from megatron_mm.report.accuracy import Captioned, Drawn, draw, name, of_each_class, read_pairs, score
from megatron_mm.report.classifier import train_classifier
from megatron_mm.report.metrics import read_metrics
from megatron_mm.report.plots import plot_losses, plot_mask
from megatron_mm.report.samples import Section, Tile, draw_sheet
from megatron_mm.report.summary import Score, describe, training_summary
from megatron_mm.run_folder import read_run_config
from megatron_mm.sampling.generation import generate
from megatron_mm.sampling.model import SamplingModel
from megatron_mm.types import ImageSegment, TextSegment


@dataclass(frozen=True)
class DemoConfig:
    run: str = "runs/demo"
    """Folder of the run."""
    drawn_per_class: int = 20
    """Images to generate for each class."""
    named: int = 500
    """Held-out images to generate captions for."""
    start: str = "three"
    """Text that the interleaved document starts with."""
    steps: int = 50
    """Denoising steps of an image (diffusion families)."""
    classifier_images: int = 8000
    """Real images to train the classifier on."""
    seed: int = 0


def main(arguments: Sequence[str]) -> None:
    config = parse_arguments(DemoConfig(), arguments)
    folder = Path(config.run)
    run = read_run_config(folder)
    checkpoint = resolve(run.checkpoint.save or folder / "checkpoints")
    splits = _mnist_splits(run)
    rows = read_metrics(folder / "metrics.jsonl")
    console = Console()
    with SamplingModel.load(checkpoint) as model, console.status("") as status:
        ...
