"""Uni-MoE (arXiv 2405.11273): a language model with experts that reads images and writes text.

    BOS  text ...  BOI  seen ... seen  EOI  text ...  EOS

Images are read as pixels by a SigLIP encoder and a linear connector. Of a caption-image pair the image comes first, and
other documents keep their order. The loss is cross-entropy over text tokens and EOS; BOI and EOI are set by rule and
never predicted. The experts are the trunk's (`model.trunk.num_experts`); the paper trains connectors first, then one
dense model a modality with adapters on its feed-forwards, and assembles these as experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from megatron_mm.config.unimoe import UniMoEConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.pack import IMAGE
from megatron_mm.families.base import LossSums, Vocabulary
from megatron_mm.families.layout import in_task_order, next_token_labels, open_end, prompt_end, task_of, token_sequence
from megatron_mm.families.patches import pixels_of
from megatron_mm.mask import causal
from megatron_mm.nn.init import linear
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.nn.patch import patchify
from megatron_mm.nn.vision import VisionIn
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


class UniMoE:
    """See `Family`. Fields of a batch:

    pixels [B, S, 3 * p * p]: patch vectors of images; labels int64 [B, S]: next text tokens.
    """

    name = "unimoe"
    causal = True
    hides_keys = False

    def __init__(self, config: UniMoEConfig, text_vocab_size: int) -> None:
        self.config = config
        self.trunk = config.trunk
        self.vocab = Vocabulary.after_text(text_vocab_size, size=config.vocab_size)
        self.image_codes = 0
        self.pixels = config.image
        self.terms: tuple[LossTerm, ...] = (LossTerm("text", 1.0),)
        self.fields = {
            "pixels": FieldSpec("float32", (3 * config.encoder.patch_size**2,), 0.0, (FRONT,)),
            "labels": FieldSpec("int64", (), IGNORE, (BACK,)),
        }

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's patches."""
        return self.config.encoder.side, self.config.encoder.side

    def length(self, text_tokens: int, texts: int, images: int) -> int:
        """Positions of a document."""
        return 2 + text_tokens + images * (2 + self.config.encoder.side**2)

    def encoded_images(self, texts: int, images: int, task: str) -> float:
        return float(images)

    def lay_out(self, sample: Sample, streams: Streams) -> Document:
        """See `Family.lay_out`.

        Raises:
            ValueError: the sample is to teach generation, or an image's pixels are not of the encoder's size.
        """
        task = task_of(sample, streams, generation_share=0.0)
        if task == "generation":
            raise ValueError(
                f"Sample {sample.key!r} is to teach generation, but a unimoe model draws no images: give its source "
                "task=understanding."
            )
        tokens, images, pixels = self._sequence(sample, in_task_order(sample.segments, task))
        labels = next_token_labels(tokens)
        for first, h, w in images:
            labels[first - 2 : first + h * w] = IGNORE  # from the one before BOI, whose next token is BOI, to EOI
        given = prompt_end(sample, lambda segments: self._sequence(sample, segments)[0])
        labels[: max(given - 1, 0)] = IGNORE
        return Document(sample.uid, tokens, causal(len(tokens)), {"pixels": pixels, "labels": labels}, images, images)

    def lay_out_prompt(self, sample: Sample, open_image: bool = False) -> Document:
        """See `Family.lay_out_prompt`; raises as `lay_out` does."""
        tokens, images, pixels = self._sequence(sample, sample.segments)
        tokens = open_end(tokens, self.vocab, open_image)
        return Document(sample.uid, tokens, causal(len(tokens)), {"pixels": pixels[: len(tokens)]}, images, images)

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        return {"text": int((batch.fields["labels"] != IGNORE).sum())}

    def build_front(self, ops: ParallelOps) -> nn.Module:
        return UniMoEFront(self.config, self.vocab, ops)

    def build_back(self, ops: ParallelOps) -> nn.Module:
        return UniMoEBack(self.config, self.vocab, ops)

    def _sequence(self, sample: Sample, segments: tuple[Segment, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens and images of `token_sequence`, and the patches of each position."""
        encoder = self.config.encoder
        tokens, images = token_sequence(segments, self.vocab, lambda segment: np.full(self.grid, self.vocab.pad))
        pixels = np.zeros((len(tokens), *self.fields["pixels"].shape), dtype=np.float32)
        sources = [segment for segment in segments if isinstance(segment, ImageSegment)]
        for (first, h, w), segment in zip(images, sources, strict=True):
            pixels[first : first + h * w] = patchify(pixels_of(sample, segment, encoder.image_size), encoder.patch_size)
        return tokens, images, pixels


class UniMoEFront(nn.Module):
    """PackedBatch -> embeddings [B, S, D]."""

    def __init__(self, config: UniMoEConfig, vocab: Vocabulary, ops: ParallelOps) -> None:
        super().__init__()
        hidden = config.trunk.hidden_size
        self.embedding = ops.vocab_embedding(vocab.size, hidden)
        self.vision = VisionIn(config.encoder, hidden, config.encoder_path, config.freeze_encoder, adaptor=linear)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        seen = self.vision(batch.fields["pixels"], batch.grids)
        return torch.where((batch.meta[:, 5] == IMAGE)[..., None], seen, self.embedding(batch.tokens))


class UniMoEBack(nn.Module):
    """(hidden [B, S, D], PackedBatch) -> sum of cross-entropy."""

    def __init__(self, config: UniMoEConfig, vocab: Vocabulary, ops: ParallelOps) -> None:
        super().__init__()
        self.ops = ops
        self.head = ops.vocab_head(config.trunk.hidden_size, vocab.size, config.trunk.head_bias)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's share of the logits [B, S, V / TP]."""
        return self.head(hidden)

    def forward(self, hidden: torch.Tensor, batch: PackedBatch) -> LossSums:
        return {"text": self.head.cross_entropy(hidden, batch.fields["labels"])[0].sum()}
