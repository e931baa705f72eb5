"""Janus and Janus-Pro (arXiv 2410.13848, 2501.17811): one causal transformer, with images encoded in two ways.

    generation      BOS  text ...  BOI  code ... code  EOI  EOS
    understanding   BOS  BOI  seen ... seen  EOI  text ...  EOS

An image to understand is read as pixels by a SigLIP encoder and an adaptor; an image to generate is a grid of codes of
an image tokenizer, with an embedding, an adaptor and an output head of their own. A caption-image pair teaches one of
the two; every image of any other document is there to be understood.

loss = text_weight * cross-entropy per text token (and EOS) + image_weight * cross-entropy per image code. Captions of
generation documents have no labels; condition dropout turns them into padding in place. Where the papers are silent:
text around several images is all labelled, and BOI and EOI are never predicted, since they are set by rule.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from megatron_mm.config.janus import JanusConfig
from megatron_mm.config.model import ImageConfig, SpecialsConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.families.base import LossSums, Vocabulary
from megatron_mm.families.layout import (
    image_codes,
    in_task_order,
    next_token_labels,
    open_end,
    prompt_end,
    task_of,
    token_sequence,
)
from megatron_mm.families.patches import pixels_of
from megatron_mm.mask import causal
from megatron_mm.nn.init import linear
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.nn.patch import patchify
from megatron_mm.nn.vision import Adaptor, VisionIn
from megatron_mm.types import (
    BACK,
    FRONT,
    IGNORE,
    Document,
    FieldSpec,
    ImageSegment,
    LossTerm,
    PackedBatch,
    Sample,
    Segment,
)

NO_IMAGE, SEEN, DRAWN = -1, 0, 1
"""Kinds of positions: outside images, of an image to understand, of one to generate."""


class Janus:
    """See `Family`. Fields of a batch:

    kind int8 [B, S]: see above; pixels [B, S, 3 * p * p]: patch vectors of images to understand; codes int64 [B, S]:
    those of images to generate; labels int64 [B, S]: next text tokens; code_labels int64 [B, S]: next codes.
    """

    name = "janus"
    causal = True
    hides_keys = False

    def __init__(self, config: JanusConfig, text_vocab_size: int) -> None:
        self.config = config
        self.trunk = config.trunk
        self.vocab = (
            Vocabulary.after_text(text_vocab_size, size=config.vocab_size)
            if config.vocabulary == SpecialsConfig()
            else Vocabulary.at(config.vocabulary, text_vocab_size, 0, config.vocab_size)
        )
        self.image_codes = config.image_codes
        self.pixels = ImageConfig(3, config.encoder.image_size, config.encoder.image_size)
        self.terms: tuple[LossTerm, ...] = (
            LossTerm("text", config.text_weight),
            LossTerm("image", config.image_weight),
        )
        self.fields = {
            "kind": FieldSpec("int8", (), NO_IMAGE, (FRONT,)),
            "pixels": FieldSpec("float32", (3 * config.encoder.patch_size**2,), 0.0, (FRONT,)),
            "codes": FieldSpec("int64", (), 0, (FRONT,)),
            "labels": FieldSpec("int64", (), IGNORE, (BACK,)),
            "code_labels": FieldSpec("int64", (), IGNORE, (BACK,)),
        }

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes in an image that is generated."""
        return self.config.image.height, self.config.image.width

    def length(self, text_tokens: int, texts: int, images: int) -> int:
        """Positions of a document; of a pair, those of the longer of its two layouts."""
        seen, drawn = self.config.encoder.side**2, self.config.image.height * self.config.image.width
        image = max(seen, drawn) if texts == images == 1 else seen
        return 2 + text_tokens + images * (2 + image)

    def encoded_images(self, texts: int, images: int, task: str) -> float:
        if texts != 1 or images != 1:
            return float(images)
        return {"understanding": 1.0, "generation": 0.0}.get(task, 1.0 - self.config.generation_share)

    def lay_out(self, sample: Sample, streams: Streams) -> Document:
        """See `Family.lay_out`.

        Raises:
            ValueError: an image is not of the configured size, or lacks the pixels that are to be understood.
        """
        task = task_of(sample, streams, self.config.generation_share)
        segments = in_task_order(sample.segments, task)
        if task == "generation":
            return self._generation(sample, segments, streams)
        tokens, images, fields = self._sequence(sample, segments, drawn=False)
        labels = next_token_labels(tokens)
        for first, h, w in images:
            labels[first - 2 : first + h * w] = IGNORE  # from the one before BOI, whose next token is BOI, to EOI
        given = prompt_end(sample, lambda segments: self._sequence(sample, segments, drawn=False)[0])
        labels[: max(given - 1, 0)] = IGNORE
        unlabelled = np.full(len(tokens), IGNORE, dtype=np.int64)
        fields |= {"labels": labels, "code_labels": unlabelled}
        return Document(sample.uid, tokens, causal(len(tokens)), fields, images, _seen(images, fields))

    def lay_out_prompt(self, sample: Sample, open_image: bool = False) -> Document:
        """See `Family.lay_out_prompt`: images with pixels are to be understood, others were generated. Raises as
        `lay_out` does."""
        tokens, images, fields = self._sequence(sample, sample.segments, drawn=None)
        tokens = open_end(tokens, self.vocab, open_image)
        fields = {name: values[: len(tokens)] for name, values in fields.items()}
        return Document(sample.uid, tokens, causal(len(tokens)), fields, images, _seen(images, fields))

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        labels = {"text": batch.fields["labels"], "image": batch.fields["code_labels"]}
        return {name: int((values != IGNORE).sum()) for name, values in labels.items()}

    def build_front(self, ops: ParallelOps) -> nn.Module:
        return JanusFront(self.config, self.vocab, ops)

    def build_back(self, ops: ParallelOps) -> nn.Module:
        return JanusBack(self.config, self.vocab, ops)

    def _generation(self, sample: Sample, segments: tuple[Segment, ...], streams: Streams) -> Document:
        tokens, images, fields = self._sequence(sample, segments, drawn=True)
        first, h, w = images[0]
        if streams.generator("condition").random() < self.config.condition_dropout:
            tokens[1 : first - 1] = self.vocab.pad
        fields |= {name: np.full(len(tokens), IGNORE, dtype=np.int64) for name in ("labels", "code_labels")}
        fields["code_labels"][first - 1 : first + h * w - 1] = fields["codes"][first : first + h * w]
        return Document(sample.uid, tokens, causal(len(tokens)), fields, images)

    def _sequence(
        self, sample: Sample, segments: tuple[Segment, ...], drawn: bool | None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Tokens and images of `token_sequence`, and the fields that the front reads.

        Args:
            drawn: whether images are to be generated; None: those without pixels.
        """
        encoder, grid = self.config.encoder, self.grid
        is_drawn = lambda segment: segment.pixels is None if drawn is None else drawn  # noqa: E731
        places = lambda segment: np.full(grid if is_drawn(segment) else (encoder.side, encoder.side), self.vocab.pad)  # noqa: E731
        tokens, images = token_sequence(segments, self.vocab, places)
        n = len(tokens)
        kind, codes = np.full(n, NO_IMAGE, dtype=np.int8), np.zeros(n, dtype=np.int64)
        pixels = np.zeros((n, *self.fields["pixels"].shape), dtype=np.float32)
        sources = [segment for segment in segments if isinstance(segment, ImageSegment)]
        for (first, h, w), segment in zip(images, sources, strict=True):
            at = slice(first, first + h * w)
            if is_drawn(segment):
                kind[at] = DRAWN
                codes[at] = image_codes(sample, segment, self.config.image, self.config.image_codes).ravel()
            else:
                kind[at] = SEEN
                pixels[at] = patchify(pixels_of(sample, segment, encoder.image_size), encoder.patch_size)
        return tokens, images, {"kind": kind, "pixels": pixels, "codes": codes}


def _seen(images: np.ndarray, fields: dict[str, np.ndarray]) -> np.ndarray:
    """Those of a document's images that are to be understood."""
    seen: np.ndarray = images[fields["kind"][images[:, 0]] == SEEN]
    return seen


class JanusFront(nn.Module):
    """PackedBatch -> embeddings [B, S, D]."""

    def __init__(self, config: JanusConfig, vocab: Vocabulary, ops: ParallelOps) -> None:
        super().__init__()
        hidden = config.trunk.hidden_size
        self.embedding = ops.vocab_embedding(vocab.size, hidden)
        self.vision = VisionIn(config.encoder, hidden, config.encoder_path, config.freeze_encoder)
        self.code_embedding = nn.Embedding(config.image_codes, config.code_dim)
        self.code_embedding.weight.init_std = 1.0  # as the official one, for an adaptor that keeps the variance
        self.code_adaptor = Adaptor(config.code_dim, hidden)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        kind, seen = batch.fields["kind"], self.vision(batch.fields["pixels"], batch.grids)
        drawn = self.code_adaptor(self.code_embedding(batch.fields["codes"]))
        x = torch.where((kind == DRAWN)[..., None], drawn, self.embedding(batch.tokens))
        return torch.where((kind == SEEN)[..., None], seen, x)


class JanusBack(nn.Module):
    """(hidden [B, S, D], PackedBatch) -> sums of both losses; its heads serve sampling as well."""

    def __init__(self, config: JanusConfig, vocab: Vocabulary, ops: ParallelOps) -> None:
        super().__init__()
        hidden = config.trunk.hidden_size
        self.ops = ops
        self.head = ops.vocab_head(hidden, vocab.size, config.trunk.head_bias)
        self.code_in = nn.Sequential(linear(hidden, hidden), nn.GELU())
        self.code_head = ops.vocab_head(hidden, config.image_codes, bias=True)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's share of the text logits [B, S, V / TP]."""
        return self.head(hidden)

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's share of the logits of image codes [B, S, codes / TP]."""
        return self.code_head(self.code_in(hidden))

    def forward(self, hidden: torch.Tensor, batch: PackedBatch) -> LossSums:
        text, _ = self.head.cross_entropy(hidden, batch.fields["labels"])
        image, _ = self.code_head.cross_entropy(self.code_in(hidden), batch.fields["code_labels"])
        return {"text": text.sum(), "image": image.sum()}
