"""`generate`: continues documents of any mix of text and images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_mm.config.generate import MODES, SamplingConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.sampling.chameleon import ChameleonSampler
from megatron_mm.sampling.janus import JanusSampler
from megatron_mm.sampling.mmada import MMaDASampler
from megatron_mm.sampling.model import SamplingModel
from megatron_mm.sampling.row import Request
from megatron_mm.sampling.sampler import Sampler
from megatron_mm.sampling.showo import ShowoSampler
from megatron_mm.sampling.showo_flow import ShowoFlowSampler
from megatron_mm.sampling.transfusion import TransfusionSampler
from megatron_mm.sampling.unimoe import UniMoESampler
from megatron_mm.types import Sample, Segment

SAMPLERS: dict[str, type[Sampler]] = {
    "chameleon": ChameleonSampler,
    "janus": JanusSampler,
    "mmada": MMaDASampler,
    "showo": ShowoSampler,
    "showo_flow": ShowoFlowSampler,
    "transfusion": TransfusionSampler,
    "unimoe": UniMoESampler,
}

Progress = Callable[[int, str], None]
"""Called with the number of finished continuations and what is going on."""


def generate(
    model: SamplingModel,
    prompts: Sequence[Sequence[Segment]],
    mode: str,
    settings: SamplingConfig | None = None,
    progress: Progress = lambda finished, activity: None,
) -> list[list[Segment]]:
    """Continues each prompt `settings.num_samples` times.

    Prompts may differ in length and kind. A continuation depends on the seed, on its prompt and the prompt's place in
    the list, and on the sample's number, but not on what it is batched with (up to floating-point rounding).

    Args:
        mode: `text_to_image` adds one image; `image_to_text` adds text up to EOS; `interleaved` adds both up to EOS.
        settings: `SamplingConfig()` if None.

    Returns:
        The continuations without their prompts, prompt by prompt, and of each prompt its samples in order. Text is
        TextSegment (ids of `model.tokenizer`), an image ImageSegment (for `model.codec.decode`).

    Raises:
        ValueError: a mode that is unknown or that the family cannot write, more steps than the model has, a prompt that
            leaves no room for its continuation.
    """
    settings = settings or SamplingConfig()
    if mode not in MODES:
        raise ValueError(f"mode={mode} is unknown: use one of {', '.join(MODES)}.")
    sampler = SAMPLERS[model.family.name]
    if mode not in sampler.modes:
        raise ValueError(
            f"mode={mode} is not what a {model.family.name} model is trained for: use {' or '.join(sampler.modes)}."
        )
    requests = [
        Request(Sample(ordinal, f"Prompt {ordinal + 1}", tuple(prompt)), Streams(settings.seed, ordinal, sample))
        for ordinal, prompt in enumerate(prompts)
        for sample in range(settings.num_samples)
    ]
    finished: list[list[Segment]] = []
    for first in range(0, len(requests), settings.batch_size):
        batch = requests[first : first + settings.batch_size]
        report = lambda activity, done=first: progress(done, activity)  # noqa: E731
        finished += sampler(model, batch, mode, settings, report).run()
    progress(len(finished), "done")
    return finished
