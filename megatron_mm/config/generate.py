"""The command line of `megatron_mm.generate`: plain key=value arguments, typed and checked like Hydra's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mm.config.arguments import pairs, read_yaml, with_values
from megatron_mm.config.compose import ConfigError
from megatron_mm.config.fields import choice
from megatron_mm.config.schema import ParallelConfig

KINDS = ("text", "image")
AUTO = "auto"
MODES = {"text_to_image": "image", "image_to_text": "text", "interleaved": "auto"}
"""What `write` took the place of."""


@dataclass(frozen=True)
class SamplingConfig:
    """How to continue prompts. null: as the family's paper or code has it (`megatron_mm.sampling.decoding`)."""

    num_samples: int = 1
    """Continuations of each prompt."""
    seed: int = 0
    cfg_scale: float | None = None
    """Classifier-free guidance of images; 1 is none, which is what null means where the model never saw images without
    captions."""
    image_cfg_scale: float | None = None
    """Guidance towards the prompt's images alone (Chameleon)."""
    steps: int | None = None
    """Denoising steps of an image."""
    height: int | None = None
    """Pixels of an image to be drawn, with width, in a model whose images keep their proportions
    (model.image.transform=native); null: model.image's."""
    width: int | None = None
    temperature: float | None = None
    """Of text; 0 always takes the likeliest."""
    top_p: float | None = None
    """Of text: the likeliest tokens that together reach this probability."""
    repetition_penalty: float | None = None
    """Divides the logits of text tokens that the document holds already (arXiv 1909.05858); 1 is none."""
    image_temperature: float | None = None
    """Of image codes drawn one by one; of masked ones the noise in which to keep (Show-o, MMaDA)."""
    image_top_p: float | None = None
    """Of image codes drawn one by one."""
    block_length: int | None = None
    """Text tokens that masked diffusion finishes before it begins the next ones (MMaDA)."""
    tokens_per_step: int | None = None
    """Text tokens that masked diffusion takes at a time (MMaDA)."""
    max_new_tokens: int = 256
    """Tokens of each text that is written; under write=auto, of all of a continuation's texts."""
    batch_size: int = 32
    """Continuations sampled together; it changes no result."""


@dataclass(frozen=True)
class GenerateConfig(SamplingConfig):
    checkpoint: str = ""
    """Folder of checkpoints, or one iter_* folder in it."""
    weights: str = choice("model", "ema")
    """`ema`: their moving average, where the run kept one (optim.ema_decay)."""
    prompt: str = ""
    """A text, [a list, of texts] or @FILE with a text a line, of which each makes a prompt. It may be given again, and
    images before and behind it: what is given stands in the prompt in that order."""
    image: str = ""
    """A picture."""
    document: str = ""
    """In place of both: a JSON file with a document, or a list of them, as shards hold them
    (`megatron_mm.data.document`); files are named from where it lies, and a conversation goes on with an answer."""
    write: str = ""
    """What to write: `text`, `image`, several of them (`text,image,text`), or `auto`, which leaves that to the model.
    Unset: behind text alone an image, behind an image (and text) text."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer; with the next the number of processes (torchrun)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers."""
    out: str = "samples"
    """Folder for the PNGs, samples.jsonl and index.html."""

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
        )


Prompt = dict[str, Any]
"""A document as `megatron_mm.data.document` has it, its files named from the working directory."""


def parse(arguments: Sequence[str]) -> tuple[GenerateConfig, list[Prompt]]:
    """The configuration that the command line gives, and the prompts to continue.

    Raises:
        ConfigError: an unknown key, a value that its key does not take, a missing file, or nothing to continue.
    """
    given = pairs(arguments)
    if old := dict(given).get("mode"):
        remedy = f"write={MODES[old]}" if old in MODES else "write=text, image, text,image,text or auto"
        raise ConfigError(f"mode={old} is now written {remedy}.")
    config = with_values(GenerateConfig(), {key: text for key, text in given if key not in ("prompt", "image")})
    if not config.checkpoint:
        raise ConfigError("checkpoint is not set: add checkpoint=DIR, the checkpoints folder of a run.")
    parts = [(key, text) for key, text in given if key in ("prompt", "image")]
    if config.document and parts:
        raise ConfigError(f"document={config.document} is a whole prompt: leave out {parts[0][0]}=.")
    prompts = _documents(config.document) if config.document else _prompts(parts)
    if config.write:
        written(config.write)
    return config, prompts


def written(write: str) -> tuple[str, ...]:
    """What `write` names, in order.

    Raises:
        ConfigError: it is neither `auto` nor a list of texts and images.
    """
    kinds = tuple(kind.strip() for kind in write.split(","))
    if kinds != (AUTO,) and not set(kinds) <= {*KINDS}:
        raise ConfigError(f"write={write} must be text, image, several of them such as text,image,text, or auto.")
    return kinds


def _prompts(parts: Sequence[tuple[str, str]]) -> list[Prompt]:
    """One prompt for each text of the list among `parts`, if there is one."""
    if not parts:
        raise ConfigError('Nothing to continue: add prompt="...", image=FILE or document=FILE.json.')
    choices = [_texts(text) if key == "prompt" else _image(text) for key, text in parts]
    several = [len(choice) for choice in choices if len(choice) > 1]
    if len(several) > 1:
        raise ConfigError("prompt is given several times with several texts: only one of them may be a list.")
    return [
        {"segments": [choice[number if len(choice) > 1 else 0] for choice in choices]}
        for number in range(*several or (1,))
    ]


def _image(path: str) -> list[dict[str, str]]:
    if not Path(path).is_file():
        raise ConfigError(f"image={path} is no file: check the path.")
    return [{"type": "image", "file": path}]


def _texts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": each} for each in _lines(text)]


def _lines(text: str) -> tuple[str, ...]:
    if text.startswith("@"):
        path = Path(text[1:])
        if not path.is_file():
            raise ConfigError(f"prompt={text} names no file: {path} does not exist.")
        lines = tuple(line for line in path.read_text().splitlines() if line.strip())
        if not lines:
            raise ConfigError(f"prompt={text} names an empty file: write a prompt a line.")
        return lines
    if text.startswith("["):
        values = read_yaml("prompt", text)
        if not isinstance(values, list) or not values:
            raise ConfigError(f"prompt={text} must be a list such as [a cat, a dog].")
        return tuple(str(value) for value in values)
    return (text,)


def _documents(name: str) -> list[Prompt]:
    path = Path(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        documents = content if isinstance(content, list) else [content]
        for segment in (segment for document in documents for segment in document["segments"]):
            if "file" in segment:
                segment["file"] = str(path.parent / segment["file"])
                if not Path(segment["file"]).is_file():
                    raise ConfigError(f"document={name} names {segment['file']}, which is no file.")
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"document={name} holds no document ({type(error).__name__}: {error}): it is JSON such as "
            '{"segments": [{"type": "text", "text": "..."}]}, or a list of these.'
        ) from error
    return documents
