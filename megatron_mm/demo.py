"""`python -m megatron_mm.demo run=runs/demo`: what a run trained on MNIST has learned, in figures and pictures.

A classifier trained here on the real images judges the generated ones; generated captions are compared with the right
ones, letter by letter; all on held-out images. Writes samples.png, mask.png, loss.png and summary.json into the run's
folder. The same checkpoint gives the same figures. Takes under a minute on a CPU.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from megatron_mm.config.arguments import parse_arguments
from megatron_mm.config.cli import user_errors
from megatron_mm.config.compose import Config
from megatron_mm.config.generate import SamplingConfig
from megatron_mm.data.dataset import open_data
from megatron_mm.data.files import replacing
from megatron_mm.data.loader import StepLoader
from megatron_mm.documents.builder import Builder
from megatron_mm.engines.format import resolve
from megatron_mm.report.accuracy import diversity, draw_images, score, write_captions
from megatron_mm.report.classifier import train_classifier
from megatron_mm.report.metrics import read_metrics
from megatron_mm.report.pairs import images_of, labels_of, mnist_splits, of_each_class, read_pairs
from megatron_mm.report.plots import plot_losses, plot_mask
from megatron_mm.report.samples import samples_sections, write_document
from megatron_mm.report.sheet import draw_sheet
from megatron_mm.report.summary import Score, describe, training_summary
from megatron_mm.run_folder import read_run_config
from megatron_mm.sampling.decoding import settings_for
from megatron_mm.sampling.generation import refusal
from megatron_mm.sampling.model import SamplingModel


@dataclass(frozen=True)
class DemoConfig:
    run: str = "runs/demo"
    """Folder of the run."""
    images_per_class: int = 20
    """Images to generate for each class's caption."""
    captions: int = 500
    """Held-out images to generate captions for."""
    start: str = "three"
    """Text that the interleaved document starts with."""
    cfg_scale: float | None = None
    """Guidance of the images. null: 5 for latents, the larger of the two values that Transfusion's paper uses; 3 for
    codes, which more makes coarse and alike."""
    steps: int = 25
    """Denoising steps of an image (diffusion families)."""
    classifier_images: int = 8000
    """Real images to train the classifier on."""
    classifier_tests: int = 2000
    """Held-out real images to test it on."""
    seed: int = 0


def main(arguments: Sequence[str]) -> None:
    config = parse_arguments(DemoConfig(), arguments)
    folder = Path(config.run)
    run = read_run_config(folder)
    inside = folder / "checkpoints"  # first of all, since the run may have been moved
    checkpoint = resolve(inside if inside.is_dir() else run.checkpoint.save or inside)
    train_split, val_split = mnist_splits(run)
    rows = read_metrics(folder / "metrics.jsonl")
    console = Console()
    with SamplingModel.load(checkpoint) as model, console.status("reading held-out images") as status:
        pixels = model.codec.pixels
        held_out = read_pairs(
            val_split, model.tokenizer, pixels, max(config.captions, config.classifier_tests), config.seed
        )
        status.update("training a classifier on real images")
        real = read_pairs(train_split, model.tokenizer, pixels, config.classifier_images, config.seed)
        classifier = train_classifier(images_of(real), labels_of(real), config.seed)
        began = time.perf_counter()
        status.update("drawing images")
        scale = config.cfg_scale if config.cfg_scale is not None else 3.0 if model.codec.codes else 4.0
        asked = {"cfg_scale": scale, "steps": config.steps, "batch_size": 100}
        settings = settings_for(run.model.family, seed=config.seed, **asked)
        draws = refusal(model, ["image"]) is None
        wanted = of_each_class(held_out, config.images_per_class) if draws else []
        drawn = draw_images(model, wanted, classifier, settings)
        status.update("captioning images")
        greedy = SamplingConfig(seed=config.seed, temperature=0.0, max_new_tokens=32, batch_size=100)
        captioned = write_captions(model, held_out[: config.captions], greedy)
        status.update("writing a document")
        document = write_document(model, config.start, settings) if draws else None
        seconds = time.perf_counter() - began
        status.update("drawing pictures")
        draw_sheet(samples_sections(drawn, captioned, document, config.start), folder / "samples.png")
        _draw_mask(run, model, folder / "mask.png")
        plot_losses(rows, folder / "loss.png")
    tests = held_out[: config.classifier_tests]
    right = int((classifier.classify(images_of(tests)) == labels_of(tests)).sum())
    summary = {
        "run": str(folder),
        "checkpoint": str(checkpoint),
        **training_summary(rows),
        "generated_images": score(drawn).to_dict() if drawn else None,
        "diversity": diversity(drawn, held_out) if drawn else None,
        "captions": score(captioned).to_dict(),
        "classifier": Score(right, len(tests)).to_dict(),
        "sampling_seconds": seconds,
    }
    with replacing(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
    print(describe(summary, _sample_more(checkpoint.parent, draws=bool(drawn))))


def _draw_mask(run: Config, model: SamplingModel, path: Path) -> None:
    """The first pack of the run."""
    builder = Builder(model.family)
    plan, reader, _ = open_data(run.data, run.model, builder, model.tokenizer, run.train.seed)
    loader = StepLoader(plan, reader, builder, run.data, run.train.seed, 1, 1, 0, 1)
    (batch,) = next(loader).batches
    loader.close()
    plot_mask(batch.mask[0].numpy(), batch.images[:, 1:], path)


def _sample_more(checkpoints: Path, draws: bool) -> str:
    python, here = Path(sys.executable), Path.cwd()
    shown = python.relative_to(here) if python.is_relative_to(here) else "python"
    prompt = 'prompt="a seven" num_samples=8' if draws else "image=PICTURE.png"
    return f"{shown} -m megatron_mm.generate checkpoint={checkpoints} {prompt} out=samples"


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums, and so the figures, would depend on the machine's number of cores
    with user_errors():
        main(sys.argv[1:])
