"""Show-o (arXiv 2408.12528): text left to right, images as masked codes, under one mask that fits both.

    text to image   T2I  BOS  text ...  EOS  BOI  code or MASK ...  EOI
    image to text   MMU  BOI  code ...  EOI  BOS  text ...  EOS
    text            BOS  text ...  EOS
    interleaved     BOS  text ...  BOI  code ...  EOI  text ...  EOS

Text is causal. BOI, codes and EOI see each other and all that comes before them; so does MMU, behind which they stand.
Masked codes are predicted in place (not shifted), text from the position before it.

Where the paper is silent: an image that ends an interleaved document is masked, all others are given; EOI is never
predicted, since an image's size is known. The official code counts BOI and EOI among the masked codes' labels; the
paper does not, and neither does this.
"""

from __future__ import annotations

import numpy as np

from megatron_mm.config.masked import ShowoConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.masking import mask_image
from megatron_mm.families.layout import drop_condition, next_token_labels, open_task, prompt_end, task_of
from megatron_mm.families.masked import LM, MMU, NO_TERM, T2I, TERM, MaskedFamily
from megatron_mm.mask import with_spans
from megatron_mm.types import BACK, IGNORE, Document, FieldSpec, PackedBatch, Sample


class Showo(MaskedFamily):
    """See `Family`. Fields of a batch: labels int64 [B, S]; term int8 [B, S], the number of the label's loss term."""

    name = "showo"

    def __init__(self, config: ShowoConfig, text_vocab_size: int) -> None:
        super().__init__(config, text_vocab_size)
        self.config = config
        self.fields = {"labels": FieldSpec("int64", (), IGNORE, (BACK,)), "term": TERM}

    def length(self, text_tokens: int, texts: int, images: int) -> int:
        """Positions of a document; one without its caption turns out shorter."""
        return self.positions(text_tokens, texts, images)

    def lay_out(self, sample: Sample, streams: Streams) -> Document:
        """See `Family.lay_out`.

        Raises:
            ValueError: an image is not a grid of codes of the configured size and range.
        """
        task = task_of(sample, streams, self.config.generation_share)
        segments = drop_condition(sample.segments, task, streams, self.config.condition_dropout)
        tokens, images = self.sequence(sample, task, segments)
        n, spans = len(tokens), _spans(images, task)
        labels, term = next_token_labels(tokens), np.full(n, LM if task == "text" else MMU, dtype=np.int8)
        for first, end in spans:
            labels[first : end - (task == "interleaved")] = IGNORE  # EOI predicts what text comes next, BOS nobody does
        labels[: max(prompt_end(sample, lambda given: self.sequence(sample, task, given)[0]) - 1, 0)] = IGNORE
        if task == "generation":
            labels[:] = IGNORE
        if task == "generation" or (task == "interleaved" and spans[-1][1] == n - 1):
            first, h, w = images[-1].tolist()
            masked = first + np.flatnonzero(mask_image(h * w, streams.generator("mask")))
            labels[masked], term[masked] = tokens[masked], T2I
            tokens[masked] = self.mask_id
        term[labels == IGNORE] = NO_TERM
        return Document(sample.uid, tokens, with_spans(n, spans), {"labels": labels, "term": term}, images)

    def lay_out_prompt(self, sample: Sample, open_image: bool = False) -> Document:
        """See `Family.lay_out_prompt`; BOI is left to sampling, as it sees the image. Raises as `lay_out` does."""
        task, open_end = open_task(sample.segments, open_image)
        tokens, images = self.sequence(sample, task, sample.segments)
        tokens = tokens[:-1] if open_end else tokens
        return Document(sample.uid, tokens, with_spans(len(tokens), _spans(images, task)), {}, images)

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        return self.count(batch.fields["term"])


def _spans(images: np.ndarray, task: str) -> list[tuple[int, int]]:
    """From BOI to EOI of every image; from MMU on where it leads."""
    spans = [(first - 1, first + h * w + 1) for first, h, w in images.tolist()]
    return [(0, spans[0][1])] if task == "understanding" else spans
