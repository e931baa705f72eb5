"""Transfusion (arXiv 2408.11039): next-token prediction on text, diffusion on image patches, in one sequence.

    BOS  text ...  BOI  patch ... patch  EOI  text ...  EOS

An image's latents are noised (one timestep per image), cut into patch vectors, and take the places between BOI and EOI,
where they see each other in both directions; all else is causal. The model predicts the noise of every patch:
loss = cross-entropy per text token + ddpm_weight * squared error per patch.

Where the paper is silent: the timestep limit holds for pairs whose image comes first (as in the paper) and for no other
document, although an interleaved document may describe an image in what follows; and EOI is not predicted, since an
image's size is known and sampling appends it by rule.

With `clean_context` (as in BAGEL, arXiv 2505.14683) what follows an image that is learnt sees it as sampling will: a
clean copy stands behind the noised one, at the same positions, and hides it. It costs h * w positions an image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from megatron_mm.config.model import TransfusionConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.shape import ImagePart, Shape
from megatron_mm.documents.builder import PREDICTED, Draft
from megatron_mm.documents.choices import Choices, drawing_all
from megatron_mm.documents.spans import Block, Items, Role, Span, in_order, special, text
from megatron_mm.documents.vocabulary import Vocabulary
from megatron_mm.families.base import LossSums
from megatron_mm.families.patches import PatchGrid, drawn_in_place, places
from megatron_mm.families.tokens import TokenBack, squared_error
from megatron_mm.nn.diffusion import DDPMSchedule
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.nn.patch import LinearPatchIn, LinearPatchOut, patchify
from megatron_mm.nn.unet import UNetPatchIn, UNetPatchOut
from megatron_mm.types import BACK, FRONT, IGNORE, FieldSpec, LossTerm, PackedBatch

IMAGE = 1
"""Number of the image's loss term."""
NO_PATCH = -1
"""Timestep of a position that holds no patch."""
CLEAN, NOISED, LESS_NOISED = "clean", "noised", "noised up to image_first_max_timestep"


class Transfusion(PatchGrid):
    """See `Family`. Fields of a batch besides the builder's:

    patches [B, S, P]: x_t as patch vectors; noise [B, S, P]: the noise in it; timestep int32 [B, S], -1 where there is
    no patch; place int32 [B, S, 2], its row and column, where images have many sizes.
    """

    name = "transfusion"
    image_codes = 0
    encoder_side = None

    config: TransfusionConfig

    def __init__(self, config: TransfusionConfig, text_vocab_size: int) -> None:
        self.config, self.trunk = config, config.trunk
        self.vocab = Vocabulary.after_text(text_vocab_size)
        self.schedule = DDPMSchedule(config.num_train_timesteps)
        self.terms: tuple[LossTerm, ...] = (LossTerm("text", 1.0), LossTerm("image", config.ddpm_weight))
        self.fields = PREDICTED | {
            "patches": FieldSpec("float32", (self.patch_dim,), 0.0, (FRONT,)),
            "noise": FieldSpec("float32", (self.patch_dim,), 0.0, (BACK,)),
            "timestep": FieldSpec("int32", (), NO_PATCH, (FRONT,)),
        }
        if config.tells_places:
            self.fields["place"] = FieldSpec("int32", (2,), 0, (FRONT,))

    def choices(self, shape: Shape) -> Choices:
        return drawing_all(shape, self.config.caption_first, self.config.condition_dropout)

    def spans(self, shape: Shape) -> Items:
        def image(part: ImagePart) -> Items:
            return [special(boi, Role.next_if(part.loss), "text"), *self._image(part, shape), special(self.vocab.eoi)]

        boi, end = self.vocab.boi, special(self.vocab.eos, Role.NEXT, "text")
        return in_order(shape, self.vocab, lambda part: text(part, self.vocab, "text"), image, [end])

    def fill(self, draft: Draft, streams: Streams) -> None:
        for number, (place, segment) in enumerate(draft.images()):
            x, t = self.latents(draft.sample, segment), 0
            if place.span.reading != CLEAN:
                t = self._draw_timestep(streams, number, place.span.reading)
                noise = streams.generator("noise", number).standard_normal(x.shape, dtype=np.float32)
                draft.fields["noise"][place.at] = patchify(noise, self.config.patch_size)
                x = self.schedule.add_noise(x, noise, t)
            draft.fields["patches"][place.at] = patchify(x, self.config.patch_size)
            draft.fields["timestep"][place.at] = t
            if "place" in draft.fields:
                draft.fields["place"][place.at] = places(place.span.grid)
            draft.targets[place.at] = IGNORE

    def build_front(self, ops: ParallelOps) -> nn.Module:
        return TransfusionFront(self.config, self.vocab, self.patch_dim, ops)

    def build_back(self, ops: ParallelOps) -> nn.Module:
        return TransfusionBack(self.config, self.vocab, self.patch_dim, ops)

    def _image(self, part: ImagePart, shape: Shape) -> Items:
        h, w = self.grid(part)
        image = Span(h * w, source=part.source, grid=(h, w), reading=CLEAN, encoded=self.config.patch_codec == "unet")
        if not part.drawn:
            return [Block((image,))]
        followed = part is not shape.parts[-1]
        limited = followed and len(shape.parts) == 2 and not self.config.clean_context
        return drawn_in_place([image], LESS_NOISED if limited else NOISED, followed and self.config.clean_context)

    def _draw_timestep(self, streams: Streams, image: int, reading: str) -> int:
        end = self.config.num_train_timesteps
        if reading == LESS_NOISED:
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
        place = (batch.fields["place"],) if "place" in batch.fields else ()
        image = self.patch_in(batch.fields["patches"], timestep, batch.grids, *place)
        return torch.where((timestep != NO_PATCH)[..., None], image, self.embedding(batch.tokens))


class TransfusionBack(TokenBack):
    """(hidden [B, S, D], PackedBatch) -> sums of both losses; its parts serve sampling as well."""

    def __init__(self, config: TransfusionConfig, vocab: Vocabulary, patch_dim: int, ops: ParallelOps) -> None:
        super().__init__(config.trunk, vocab, ops)
        hidden = config.trunk.hidden_size
        self.patch_out = (
            LinearPatchOut(hidden, patch_dim)
            if config.patch_codec == "linear"
            else UNetPatchOut(hidden, config.image.channels, config.patch_size, config.unet_channels)
        )

    def predict_noise(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """The noise in every patch vector [B, S, P]; meaningless where there is no patch."""
        return self.patch_out(hidden, batch.grids)

    def forward(self, hidden: torch.Tensor, batch: PackedBatch) -> LossSums:
        text, _ = self.head.cross_entropy(hidden, batch.fields["labels"])
        noised = batch.fields["term"] == IMAGE
        return {
            "text": text.sum(),
            "image": squared_error(self.predict_noise(hidden, batch), batch.fields["noise"], noised),
        }
