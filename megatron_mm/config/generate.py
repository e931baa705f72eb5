"""The command line of `megatron_mm.generate`: plain key=value arguments, typed and checked like Hydra's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_mm.config.arguments import read_yaml, split, with_values
from megatron_mm.config.compose import ConfigError
from megatron_mm.config.fields import choice
from megatron_mm.config.schema import ParallelConfig

MODES = ("text_to_image", "image_to_text", "interleaved")


@dataclass(frozen=True)
class SamplingConfig:
    """How to continue prompts."""

    num_samples: int = 1
    """Continuations of each prompt."""
    seed: int = 0
    cfg_scale: float | None = None
    """Classifier-free guidance of images; 1 is none. null: the family's own where the model saw images without
    captions, else 1."""
    steps: int | None = None
    """Denoising steps of an image. null: the family's own, 250 of Transfusion and 50 of masked codes."""
    block_length: int = 64
    """Text tokens that masked diffusion finishes before it begins the next ones (MMaDA)."""
    tokens_per_step: int = 1
    """Text tokens that masked diffusion takes at a time (MMaDA)."""
    temperature: float = 0.7
    """Of tokens; 0 always takes the likeliest."""
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    """Divides the logits of text tokens that the document holds already (arXiv 1909.05858); 1 is none."""
    max_new_tokens: int = 256
    """Text tokens of a continuation; images do not count."""
    batch_size: int = 32
    """Continuations sampled together; it changes no result."""


@dataclass(frozen=True)
class GenerateConfig(SamplingConfig):
    checkpoint: str = ""
    """Folder of checkpoints, or one iter_* folder in it."""
    prompt: tuple[str, ...] = ()
    """One text, [a list, of texts], or @FILE with a text a line."""
    image: str | None = None
    """Picture that leads every prompt."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer; with the next the number of processes (torchrun)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers."""
    out: str = "samples"
    """Folder for the PNGs, samples.jsonl and index.html."""
    mode: str = choice("auto", *MODES)
    """`auto`: a prompt alone becomes an image, an image (and its prompt) is continued as text."""

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
        )

    @property
    def effective_mode(self) -> str:
        """One of MODES."""
        if self.mode != "auto":
            return self.mode
        return "image_to_text" if self.image else "text_to_image"


def parse(arguments: Sequence[str]) -> GenerateConfig:
    """The configuration that the command line gives.

    Raises:
        ConfigError: an unknown key, a value that its key does not take, a missing file, or nothing to continue.
    """
    given = split(arguments)
    prompt = _prompts(given.pop("prompt")) if "prompt" in given else ()
    config = replace(with_values(GenerateConfig(), given), prompt=prompt)
    if not config.checkpoint:
        raise ConfigError("checkpoint is not set: add checkpoint=DIR, the checkpoints folder of a run.")
    if not config.prompt and not config.image:
        raise ConfigError('Nothing to continue: add prompt="..." or image=FILE.')
    if config.image and not Path(config.image).is_file():
        raise ConfigError(f"image={config.image} is no file: check the path.")
    return config


def _prompts(text: str) -> tuple[str, ...]:
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
