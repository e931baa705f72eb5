"""MMaDA (arXiv 2505.15809): masked diffusion of text and images, every document under full attention.

    text to image   T2I  BOS  text ...  EOS  BOI  code or MASK ...  EOI
    image to text   MMU  BOI  code ...  EOI  BOS  text or MASK ...  EOS or MASK ...
    text            BOS  text or MASK ...  EOS or MASK
    text to text    BOS  text ...  text or MASK ...  EOS or MASK ...
    interleaved     BOS  text ...  BOI  code ...  EOI  text or MASK ...  EOS or MASK ...
    text to both    R2I  BOS  text ...  text or MASK ...  EOS or MASK ...  BOI  code or MASK ...  EOI

Everything is predicted in place, where it is masked. Of a text, each token is masked with the document's probability p
and its cross-entropy weighs 1 / p (LLaDA, arXiv 2502.09992); images follow the cosine schedule and weigh 1. The terms
are means: `t2i` over masked codes, `lm` over the tokens of texts (masked or not), `mmu` and `chat` over answers to
images and to text, each of which is divided by its own length. `chat` has the weight of `lm`, as in the official code.
With `r2i_share` a text and an image that answer a text are masked together with p, and divided by their joint length.

Where the paper is silent: of a document with several segments one, drawn anew in every epoch, is the answer to those
before it, and those behind it are left out; answers of text end in EOS up to a multiple of `text_block`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_mm.config.masked import MMaDAConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.masking import mask_text
from megatron_mm.data.shape import ImagePart, Shape
from megatron_mm.documents.builder import ONE_HEAD, PREDICTED, Draft
from megatron_mm.documents.choices import Choices, answering_one, drawing_one
from megatron_mm.documents.spans import Block, Items, Role, special, task_first, text
from megatron_mm.families.masked import CHAT, LM, MMU, R2I, T2I, MaskedFamily
from megatron_mm.types import BACK, FieldSpec


class MMaDA(MaskedFamily[MMaDAConfig]):
    """See `Family`. Fields of a batch besides the builder's, [B, S]: weight float32, of a label's cross-entropy;
    counted int8, the number of the term whose mean the position counts for."""

    name = "mmada"
    fields = PREDICTED | {
        "weight": FieldSpec("float32", (), 0.0, (BACK,)),
        "counted": ONE_HEAD["term"],
    }

    def __init__(self, config: MMaDAConfig, text_vocab_size: int) -> None:
        super().__init__(config, text_vocab_size)
        if config.r2i_share:
            self.vocab = self.vocab.adding(R2I, config.r2i_id)

    def weights(self) -> dict[str, float]:
        joint = {R2I: self.config.r2i_weight} if self.config.r2i_share else {}
        return {**super().weights(), CHAT: self.config.lm_weight, **joint}

    def choices(self, shape: Shape) -> Choices:
        if shape.pair:
            return drawing_one(shape, self.config.generation_share, self.config.condition_dropout)
        if not shape.images and all(part.loss for part in shape.parts):
            return [(1.0, shape)]
        apart, share = answering_one(shape, self.config.condition_dropout), self.config.r2i_share
        if not share or not _answers_with_both(shape):
            return apart
        both = shape.of([*shape.parts[:-1], replace(shape.images[-1], drawn=True)], task=R2I)
        return [(share, both), *((weight * (1 - share), choice) for weight, choice in apart)]

    def spans(self, shape: Shape) -> Items:
        if shape.task == R2I:
            about = self._about(shape.of(shape.texts, ends=True), R2I, answers=True)
            return [Block((special(self.vocab.special[R2I]), *about, *self.image(shape.images[0], drawn=R2I)))]
        if shape.images:  # all before the answer is given, in sampling what was written too
            shape = shape.of([*(replace(part, loss=False) for part in shape.parts[:-1]), *shape.parts[-1:]])
        answers = bool(shape.images) or not all(part.loss for part in shape.texts)
        return [Block(tuple(self._about(shape, MMU if shape.images else CHAT if answers else LM, answers)))]

    def _about(self, shape: Shape, term: str, answers: bool) -> Items:
        """The document, with the loss term of its text; `answers`: whether EOS fills up the text's last block."""
        if shape.texts and shape.parts[-1] is shape.texts[-1]:  # `end` is its EOS
            shape = shape.of([*shape.parts[:-1], replace(shape.texts[-1], ends=False)])
        role = Role.IN_PLACE if shape.learns_text else Role.GIVEN
        length = 1 + sum(part.tokens for part in shape.texts if part.loss)
        padding = -length % self.config.text_block if answers and shape.learns_text else 0
        end = special(self.vocab.eos, role, term, 1 + padding)
        return task_first(
            shape, self.vocab, lambda part: text(part, self.vocab, term, Role.IN_PLACE), self.image, [end]
        )

    def fill(self, draft: Draft, streams: Streams) -> None:
        super().fill(draft, streams)
        numbers = {term.name: number for number, term in enumerate(self.terms)}
        places = list(draft.outline.predicted(Role.IN_PLACE))
        at = np.concatenate([np.arange(place.first, place.end) for place in places] or [np.zeros(0, np.int64)])
        if not len(at):
            return
        term, counted, weight = places[0].span.term, at, 1.0
        if term == T2I:
            counted = at[draft.predicted[at]]
        else:
            hidden, p = mask_text(len(at), streams.generator("mask"))
            draft.mask(at, hidden, self.mask_id)
            weight = 1 / p
            if term in (MMU, CHAT, R2I):
                counted, weight = at[:1], weight / len(at)
        draft.fields["counted"][counted] = numbers[term]
        draft.fields["weight"][at[draft.predicted[at]]] = weight


def _answers_with_both(shape: Shape) -> bool:
    """Whether given text comes first, learnt text behind it, and a learnt image last."""
    *texts, last = shape.parts
    learnt = [part.loss for part in texts]
    only = len(shape.images) == 1 and isinstance(last, ImagePart) and last.loss
    return only and {*learnt} == {False, True} and learnt == sorted(learnt)
