"""Transfusion (arXiv 2408.11039): next-token prediction on text, diffusion on image patches, in one sequence.

    BOS  text ...  BOI  patch ... patch  EOI  text ...  EOS

An image's latents are noised (one timestep per image), cut into patch vectors, and take the places between BOI and EOI,
where they see each other in both directions; all else is causal. The model predicts the noise of every patch:
loss = cross-entropy per text token + ddpm_weight * squared error per patch.

Where the paper is silent: the timestep limit holds for pairs whose image comes first (as in the paper) and for no other
document, although an interleaved document may describe an image in what follows; and EOI is not predicted, since an
image's size is known and sampling appends it by rule.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from megatron_mm.config.model import TransfusionConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.families.base import LossSums, Vocabulary
from megatron_mm.families.layout import arrange, next_token_labels, open_end, prompt_end, token_sequence
from megatron_mm.families.patches import PatchGrid, images_of
from megatron_mm.mask import with_spans
from megatron_mm.nn.diffusion import DDPMSchedule
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.nn.patch import LinearPatchIn, LinearPatchOut, patchify
from megatron_mm.nn.unet import UNetPatchIn, UNetPatchOut
from megatron_mm.types import BACK, FRONT, IGNORE, Document, FieldSpec, LossTerm, PackedBatch, Sample

CODECS = ("linear", "unet")
NO_PATCH = -1
"""Timestep of a position that holds no patch."""


class Transfusion(PatchGrid):
    """See `Family`. Fields of a batch:

    patches [B, S, P]: x_t as patch vectors; noise [B, S, P]: the noise in it; timestep int32 [B, S], -1 where there is
    no patch; labels int64 [B, S].
    """

    name = "transfusion"
    causal = False
    hides_keys = False
    image_codes = 0
    pixels = None

    config: TransfusionConfig

    def __init__(self, config: TransfusionConfig, text_vocab_size: int) -> None:
        _check(config)
        self.config = config
        self.whole_images = config.patch_codec == "unet"
        self.trunk = config.trunk
        self.vocab = Vocabulary.after_text(text_vocab_size)
        self.schedule = DDPMSchedule(config.num_train_timesteps)
        self.terms: tuple[LossTerm, ...] = (LossTerm("text", 1.0), LossTerm("image", config.ddpm_weight))
        self.fields = {
            "patches": FieldSpec("float32", (self.patch_dim,), 0.0, (FRONT,)),
            "noise": FieldSpec("float32", (self.patch_dim,), 0.0, (BACK,)),
            "timestep": FieldSpec("int32", (), NO_PATCH, (FRONT, BACK)),
            "labels": FieldSpec("int64", (), IGNORE, (BACK,)),
        }

    def length(self, text_tokens: int, texts: int, images: int) -> int:
        """Positions of a document; with condition dropout it may turn out shorter."""
        h, w = self.grid
        return 2 + text_tokens + images * (2 + h * w)

    def encoded_images(self, texts: int, images: int, task: str) -> float:
        return float(images if self.whole_images else 0)

    def lay_out(self, sample: Sample, streams: Streams) -> Document:
        """See `Family.lay_out`.

        Raises:
            ValueError: an image is not of the configured size.
        """
        arrangement = arrange(sample, streams, self.config.caption_first, self.config.condition_dropout)
        blank = lambda segment: np.full(self.grid, self.vocab.pad)  # noqa: E731
        tokens, images = token_sequence(arrangement.segments, self.vocab, blank)
        n = len(tokens)
        patches, noise = np.zeros((2, n, self.patch_dim), dtype=np.float32)
        timestep = np.full(n, NO_PATCH, dtype=np.int32)
        spans = [(int(first), int(first + h * w)) for first, h, w in images]
        latents = images_of(sample, arrangement.segments, self.config.image)
        for i, ((first, end), x0) in enumerate(zip(spans, latents, strict=True)):
            t = self._draw_timestep(streams, i, arrangement.image_first)
            eps = streams.generator("noise", i).standard_normal(x0.shape, dtype=np.float32)
            patches[first:end] = patchify(self.schedule.add_noise(x0, eps, t), self.config.patch_size)
            noise[first:end] = patchify(eps, self.config.patch_size)
            timestep[first:end] = t

        labels = next_token_labels(tokens)
        for first, end in spans:
            labels[first - 1 : end] = IGNORE
        given = prompt_end(sample, lambda segments: token_sequence(segments, self.vocab, blank)[0])
        labels[: max(given - 1, 0)] = IGNORE
        fields = {"patches": patches, "noise": noise, "timestep": timestep, "labels": labels}
        return Document(sample.uid, tokens, with_spans(n, spans), fields, images, self._encoded(images))

    def lay_out_prompt(self, sample: Sample, open_image: bool = False) -> Document:
        """See `Family.lay_out_prompt`: images are clean, at timestep 0. Raises as `lay_out` does."""
        tokens, images = token_sequence(sample.segments, self.vocab, lambda segment: np.full(self.grid, self.vocab.pad))
        tokens = open_end(tokens, self.vocab, open_image)
        patches = np.zeros((len(tokens), self.patch_dim), dtype=np.float32)
        timestep = np.full(len(tokens), NO_PATCH, dtype=np.int32)
        spans = [(int(first), int(first + h * w)) for first, h, w in images]
        clean = images_of(sample, sample.segments, self.config.image)
        for (first, end), x0 in zip(spans, clean, strict=True):
            patches[first:end] = patchify(x0, self.config.patch_size)
            timestep[first:end] = 0
        fields = {"patches": patches, "timestep": timestep}
        return Document(sample.uid, tokens, with_spans(len(tokens), spans), fields, images, self._encoded(images))

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        return {
            "text": int((batch.fields["labels"] != IGNORE).sum()),
            "image": int((batch.fields["timestep"] != NO_PATCH).sum()),
        }

    def build_front(self, ops: ParallelOps) -> nn.Module:
        return TransfusionFront(self.config, self.vocab, self.patch_dim, ops)

    def build_back(self, ops: ParallelOps) -> nn.Module:
        return TransfusionBack(self.config, self.vocab, self.patch_dim, ops)

    def _encoded(self, images: np.ndarray) -> np.ndarray:
        """What `Document.encoded` is: all images, or none."""
        return images if self.whole_images else images[:0]

    def _draw_timestep(self, streams: Streams, image: int, image_first: bool) -> int:
        end = self.config.num_train_timesteps
        if image_first:
            end = min(end, self.config.image_first_max_timestep + 1)
        return int(streams.generator("timestep", image).integers(end))


class TransfusionFront(nn.Module):
    """PackedBatch -> embeddings [B, S, D]: patches through the patch codec, everything else from the vocabulary."""

    def __init__(self, config: TransfusionConfig, vocab: Vocabulary, patch_dim: int, ops: ParallelOps) -> None:
        super().__init__()
        hidden = config.trunk.hidden_size
        self.embedding = ops.vocab_embedding(vocab.size, hidden)
        self.patch_in = (
            LinearPatchIn(patch_dim, hidden)
            if config.patch_codec == "linear"
            else UNetPatchIn(config.image.channels, config.patch_size, hidden, config.unet_channels)
        )

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        timestep = batch.fields["timestep"]
        image = self.patch_in(batch.fields["patches"], timestep, batch.grids)
        return torch.where((timestep != NO_PATCH)[..., None], image, self.embedding(batch.tokens))


class TransfusionBack(nn.Module):
    """(hidden [B, S, D], PackedBatch) -> sums of both losses; its parts serve sampling as well."""

    def __init__(self, config: TransfusionConfig, vocab: Vocabulary, patch_dim: int, ops: ParallelOps) -> None:
        super().__init__()
        hidden = config.trunk.hidden_size
        self.ops = ops
        self.head = ops.vocab_head(hidden, vocab.size, config.trunk.head_bias)
        self.patch_out = (
            LinearPatchOut(hidden, patch_dim)
            if config.patch_codec == "linear"
            else UNetPatchOut(hidden, config.image.channels, config.patch_size, config.unet_channels)
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's share of the logits [B, S, V / TP]."""
        return self.head(hidden)

    def predict_noise(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """The noise in every patch vector [B, S, P]; meaningless where there is no patch."""
        return self.patch_out(hidden, batch.grids)

    def forward(self, hidden: torch.Tensor, batch: PackedBatch) -> LossSums:
        text, _ = self.head.cross_entropy(hidden, batch.fields["labels"])
        predicted = self.predict_noise(hidden, batch)
        precise = torch.promote_types(predicted.dtype, torch.float32)
        error = (predicted.to(precise) - batch.fields["noise"].to(precise)).square().mean(dim=-1)
        image = torch.where(batch.fields["timestep"] != NO_PATCH, error, 0.0)
        return {"text": text.sum(), "image": image.sum()}


def _check(config: TransfusionConfig) -> None:
    if config.patch_codec not in CODECS:
        raise ValueError(f"model.patch_codec={config.patch_codec} is unknown: use one of {', '.join(CODECS)}.")
    p = config.patch_size
    if p < 1 or config.image.height % p or config.image.width % p:
        raise ValueError(
            f"model.patch_size={p} must divide model.image.height={config.image.height} and "
            f"model.image.width={config.image.width}."
        )
    if config.patch_codec == "unet" and p & (p - 1):
        raise ValueError(f"model.patch_size={p} must be a power of two for model.patch_codec=unet.")
