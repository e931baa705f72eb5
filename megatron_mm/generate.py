"""`python -m megatron_mm.generate checkpoint=DIR prompt="..." image=FILE out=DIR`: pictures and text from a checkpoint.

Writes PNGs and samples.jsonl into `out`, one object a document: `prompt`, `image` (as given), `sample` (its number),
`segments` (what was generated, in order: {"text": ...} or {"image": file name}). `config/generate.py` has all keys.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_mm.config.cli import user_errors
from megatron_mm.config.generate import GenerateConfig, parse
from megatron_mm.data.files import replacing
from megatron_mm.sampling.generation import generate
from megatron_mm.sampling.model import SamplingModel
from megatron_mm.types import Segment, TextSegment


def main(arguments: Sequence[str]) -> None:
    """Generates, writes and prints what the command line asks for.

    Raises:
        ValueError: anything that a user can mend, before the model is loaded where that can be known.
    """
    config = parse(arguments)
    picture = _open_image(config.image) if config.image else None
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is no folder: choose another name.")
    with SamplingModel.load(config.checkpoint) as model:
        image = [model.read_image(picture)] if picture else []
        texts = [TextSegment(model.tokenizer.encode(text)) for text in config.prompt]
        documents = _generate(model, [[*image, text] for text in texts] or [image], config)
        out.mkdir(parents=True, exist_ok=True)
        lines = [_write(model, segments, config, number) for number, segments in enumerate(documents)]
    with replacing(out / "samples.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for line in lines:
        # Quoted: generated text may hold anything, control characters included.
        shown = [repr(s["text"]) if "text" in s else str(out / s["image"]) for s in line["segments"]]
        print(line["prompt"] or line["image"], "->", *shown)


def _generate(model: SamplingModel, prompts: list[list[Segment]], config: GenerateConfig) -> list[list[Segment]]:
    """`generate` with a progress bar where there is a terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(prompts) * config.num_samples)
        show = lambda finished, activity: bar.update(task, completed=finished, description=activity)  # noqa: E731
        return generate(model, prompts, config.effective_mode, config, show)


def _open_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image={path} cannot be read as a picture: {error}.") from error


def _write(model: SamplingModel, segments: list[Segment], config: GenerateConfig, number: int) -> dict[str, Any]:
    """Document `number` as a line of samples.jsonl; its images become files."""
    prompt, sample = divmod(number, config.num_samples)
    parts = []
    for i, segment in enumerate(segments):
        if isinstance(segment, TextSegment):
            parts.append({"text": model.tokenizer.decode(segment.ids)})
        else:
            pixels = model.codec.decode(segment.data)
            name = f"{prompt:04d}_{sample:02d}_{i:02d}.png"
            Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(Path(config.out, name))
            parts.append({"image": name})
    text = config.prompt[prompt] if config.prompt else None
    return {"prompt": text, "image": config.image, "sample": sample, "segments": parts}


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
