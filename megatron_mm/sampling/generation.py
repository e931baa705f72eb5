"""`generate`: continues documents of any mix of text and images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_mm.config.generate import SamplingConfig, written
from megatron_mm.config.plugins import family_plugin
from megatron_mm.data.corrupt import Streams
from megatron_mm.documents.traits import chooses_images
from megatron_mm.sampling.codes import ChameleonSampler, JanusSampler
from megatron_mm.sampling.decoding import Decoding
from megatron_mm.sampling.masked import ShowoSampler
from megatron_mm.sampling.mmada import MMaDASampler
from megatron_mm.sampling.model import SamplingModel
from megatron_mm.sampling.patches import ShowoFlowSampler, TransfusionSampler
from megatron_mm.sampling.row import AUTO, IMAGE, Request
from megatron_mm.sampling.sampler import Sampler
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
    write: str,
    settings: SamplingConfig | None = None,
    progress: Progress = lambda finished, activity: None,
) -> list[list[Segment]]:
    """Continues each prompt `settings.num_samples` times.

    Prompts may differ in length and kind. A continuation depends on the seed, on its prompt and the prompt's place in
    the list, and on the sample's number, but not on what it is batched with (up to floating-point rounding).

    Args:
        write: what, in order: `text` (up to EOS), `image`, several of them as in `text,image,text`, or `auto`: the
            model says where images begin, up to EOS. Where the context is full, the rest is left out.
        settings: `SamplingConfig()` if None.

    Returns:
        The continuations without their prompts, prompt by prompt, and of each prompt its samples in order. Text is
        TextSegment (ids of `model.tokenizer`; none where it is empty), an image ImageSegment (for
        `model.codec.decode`).

    Raises:
        ValueError: something that cannot be written, or not by this family, an option that it does not have, a prompt
            that leaves no room for its continuation.
    """
    settings, kinds = settings or SamplingConfig(), written(write)
    if problem := refusal(model, kinds):
        raise ValueError(problem)
    sampler = sampler_of(model)
    decoding, told = Decoding.of(settings, model.config.model)
    if told and kinds != ("text",):
        warnings.warn(told, stacklevel=2)
    grid = model.grid_to_draw(settings.height, settings.width)
    requests = [
        Request(
            Sample(ordinal, f"Prompt {ordinal + 1}", tuple(replace(segment, loss=False) for segment in prompt)),
            kinds,
            Streams(settings.seed, ordinal, sample),
            grid,
        )
        for ordinal, prompt in enumerate(prompts)
        for sample in range(settings.num_samples)
    ]
    finished: list[list[Segment]] = []
    for first in range(0, len(requests), settings.batch_size):
        batch = requests[first : first + settings.batch_size]
        report = lambda activity, done=first: progress(done, activity)  # noqa: E731
        finished += sampler(model, batch, decoding, report).run()
    progress(len(finished), "done")
    return finished


def sampler_of(model: SamplingModel) -> type[Sampler]:
    """The sampler of a model's family.

    Raises:
        ValueError: a family of a user's own brings none.
    """
    name = model.config.model.family
    plugin = None if name in SAMPLERS else family_plugin(name)
    sampler: type[Sampler] | None = plugin.sampler if plugin else SAMPLERS[name]
    if sampler is None:
        raise ValueError(f"model.family={name} brings no sampler: give its FamilyPlugin one.")
    return sampler


def refusal(model: SamplingModel, write: Sequence[str]) -> str | None:
    """Why a model of this family cannot write this, in a sentence; None where it can."""
    name, draws = model.family.name, len(model.family.terms) > 1
    if not draws and {IMAGE, AUTO} & {*write}:
        return f"write={','.join(write)} is not what a {name} model is trained for: it draws no images; use write=text."
    if AUTO in write and not chooses_images(model.family):
        return (
            f"write=auto is not what a {name} model is trained for: it does not say itself where an image begins; say "
            "what to write, such as write=text,image,text."
        )
    return None
