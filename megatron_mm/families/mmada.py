"""MMaDA (arXiv 2505.15809): masked diffusion of text and images, every document under full attention.

    text to image   T2I  BOS  text ...  EOS  BOI  code or MASK ...  EOI
    image to text   MMU  BOI  code ...  EOI  BOS  text or MASK ...  EOS or MASK ...
    text            BOS  text or MASK ...  EOS or MASK
    interleaved     BOS  text ...  BOI  code ...  EOI  text or MASK ...  EOS or MASK ...

Everything is predicted in place, where it is masked. Of a text, each token is masked with the document's probability p
and its cross-entropy weighs 1 / p (LLaDA, arXiv 2502.09992); images follow the cosine schedule and weigh 1. The terms
are means: `t2i` over masked codes, `lm` over the tokens of texts (masked or not), `mmu` over answers, each of which is
divided by its own length.

Where the paper is silent: of an interleaved document one segment, drawn anew in every epoch, is the answer to those
before it, and those behind it are left out; answers of text end in EOS up to a multiple of `text_block`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_mm.config.masked import MMaDAConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.masking import mask_image, mask_text
from megatron_mm.families.layout import drop_condition, open_task, prompt_end, prompt_segments, task_of
from megatron_mm.families.masked import LM, MMU, NO_TERM, T2I, TERM, MaskedFamily
from megatron_mm.mask import full
from megatron_mm.types import BACK, IGNORE, Document, FieldSpec, PackedBatch, Sample


class MMaDA(MaskedFamily):
    """See `Family`. Fields of a batch, all [B, S]: labels int64; term int8, the number of the label's loss term; weight
    float32, of its cross-entropy; counted int8, the number of the term whose mean the position counts for."""

    name = "mmada"

    def __init__(self, config: MMaDAConfig, text_vocab_size: int) -> None:
        super().__init__(config, text_vocab_size)
        self.config = config
        self.fields = {
            "labels": FieldSpec("int64", (), IGNORE, (BACK,)),
            "term": TERM,
            "weight": FieldSpec("float32", (), 0.0, (BACK,)),
            "counted": replace(TERM, readers=()),
        }

    def length(self, text_tokens: int, texts: int, images: int) -> int:
        """Positions of a document; one that teaches to draw, or is cut behind its answer, turns out shorter."""
        return self.positions(text_tokens, texts, images) + (self.config.text_block - 1 if images else 0)

    def lay_out(self, sample: Sample, streams: Streams) -> Document:
        """See `Family.lay_out`.

        Raises:
            ValueError: an image is not a grid of codes of the configured size and range.
        """
        task = task_of(sample, streams, self.config.generation_share)
        segments = drop_condition(sample.segments, task, streams, self.config.condition_dropout)
        if task == "interleaved":
            segments = segments[: _answer(sample, streams) + 1]
        tokens, images = self.sequence(sample, task, segments)
        behind = int(images[-1, 0] + images[-1, 1] * images[-1, 2] + 1) if len(images) else 0
        generator = streams.generator("mask")
        if images.size and behind >= len(tokens) - 1:
            tokens = tokens[:behind]
            first, h, w = images[-1].tolist()
            masked = first + np.flatnonzero(mask_image(h * w, generator))
            fields = _fields(tokens, masked, T2I, 1.0, masked)
        else:
            given = prompt_end(sample, lambda given: self.sequence(sample, task, given)[0])
            first = max(behind + (task != "interleaved") or 1, given)  # behind BOS, wherever it stands
            if task != "text":
                tokens = np.append(tokens, np.full((first - len(tokens)) % self.config.text_block, self.vocab.eos))
            answer = np.arange(first, len(tokens))
            chosen, p = mask_text(len(answer), generator)
            masked = answer[chosen]
            if task == "text":
                fields = _fields(tokens, masked, LM, 1 / p, answer)
            else:
                fields = _fields(tokens, masked, MMU, 1 / p / len(answer), answer[:1])
        tokens[masked] = self.mask_id
        return Document(sample.uid, tokens, full(len(tokens)), fields, images)

    def lay_out_prompt(self, sample: Sample, open_image: bool = False) -> Document:
        """See `Family.lay_out_prompt`; BOI is left to sampling, as it sees the image. Raises as `lay_out` does."""
        task, open_end = open_task(sample.segments, open_image)
        tokens, images = self.sequence(sample, task, sample.segments)
        tokens = tokens[:-1] if open_end else tokens
        return Document(sample.uid, tokens, full(len(tokens)), {}, images)

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        return self.count(batch.fields["counted"])


def _answer(sample: Sample, streams: Streams) -> int:
    """Which segment of an interleaved document is the answer: any but the first, or behind those that are given."""
    first, segments = max(prompt_segments(sample), 1), len(sample.segments)
    return int(streams.generator("answer").integers(first, segments)) if segments > first else 0


def _fields(
    tokens: np.ndarray, masked: np.ndarray, term: int, weight: float, counted: np.ndarray
) -> dict[str, np.ndarray]:
    """Those of a document with one term, from its tokens before they are masked."""
    n = len(tokens)
    labels, weights = np.full(n, IGNORE, dtype=np.int64), np.zeros(n, dtype=np.float32)
    terms, counts = np.full((2, n), NO_TERM, dtype=np.int8)
    labels[masked], terms[masked], weights[masked], counts[counted] = tokens[masked], term, weight, term
    return {"labels": labels, "term": terms, "weight": weights, "counted": counts}
