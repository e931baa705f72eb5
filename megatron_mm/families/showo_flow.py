"""Show-o2 (arXiv 2506.15564): text left to right, images by flow matching on their latents, in one sequence.

    text to image   BOS  text ...  BOI  TIME  patch ...  EOI  EOS
    image to text   BOS  BOI  TIME  patch ...  EOI  text ...  EOS

An image's patches take two paths, SigLIP's layers for what they mean and a linear layer for what they look like, which
are fused; before them stands the embedding of the image's time. They see each other and what comes before them; all
else is causal. Behind the trunk, the flow head predicts the velocity of every patch of a noised image. Images that are
only looked at are clean, at time 1, and have no such loss.

Where the paper is silent: captions of images to be drawn have no loss; an image that ends an interleaved document is
noised, all others are clean. With `clean_context` (as in BAGEL, arXiv 2505.14683) each of its images that is
learnt stands there twice: noised, and behind that, at the same positions, clean, which is what the rest sees. That
costs an image's positions once more, its time's among them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from megatron_mm.config.flow import ShowoFlowConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.shape import ImagePart, Shape
from megatron_mm.documents.builder import PREDICTED, Draft
from megatron_mm.documents.choices import Choices, drawing_all, drawing_one
from megatron_mm.documents.spans import Block, Items, Role, Span, in_order, special, text
from megatron_mm.documents.vocabulary import Vocabulary
from megatron_mm.families.base import LossSums
from megatron_mm.families.patches import PatchGrid, drawn_in_place
from megatron_mm.families.tokens import TokenBack, squared_error
from megatron_mm.nn.flow import UNIT, FlowTimes, interpolate
from megatron_mm.nn.flow_head import ClockEmbedding, FlowHead, Fusion, SemanticLayers
from megatron_mm.nn.init import linear
from megatron_mm.nn.ops import Attended, ParallelOps
from megatron_mm.nn.patch import patchify
from megatron_mm.types import BACK, FRONT, IGNORE, FieldSpec, LossTerm, PackedBatch

IMAGE = 1
"""Number of the image's loss term."""
NO_TIME = -1
"""Time of a position that has none."""


class ShowoFlow(PatchGrid):
    """See `Family`. Fields of a batch besides the builder's:

    patches [B, S, P]: x_t as patch vectors; velocity [B, S, P]: x_1 - x_0; time int32 [B, S] of patches, in millionths,
    and clock int32 [B, S] of the position before them, -1 elsewhere.
    """

    name = "showo_flow"
    image_codes = 0
    encoder_side = None

    config: ShowoFlowConfig

    def __init__(self, config: ShowoFlowConfig, text_vocab_size: int) -> None:
        self.config, self.trunk = config, config.trunk
        self.vocab = Vocabulary.after_text(text_vocab_size)
        self.terms: tuple[LossTerm, ...] = (LossTerm("text", config.ntp_weight), LossTerm("image", config.flow_weight))
        self.fields = PREDICTED | {
            "patches": FieldSpec("float32", (self.patch_dim,), 0.0, (FRONT,)),
            "velocity": FieldSpec("float32", (self.patch_dim,), 0.0, (BACK,)),
            "time": FieldSpec("int32", (), NO_TIME),
            "clock": FieldSpec("int32", (), NO_TIME),
        }

    def times(self, positions: int) -> FlowTimes:
        """Of images of so many patches."""
        return FlowTimes(positions, self.config.time_shift)

    def choices(self, shape: Shape) -> Choices:
        if self.config.clean_context and not shape.pair:
            return drawing_all(shape, 1.0, self.config.condition_dropout)
        return drawing_one(shape, self.config.generation_share, self.config.condition_dropout)

    def spans(self, shape: Shape) -> Items:
        def image(part: ImagePart) -> Items:
            boi = Role.next_if(part.loss and not shape.draws and not shape.reads)
            followed = part is not shape.parts[-1]
            return [special(self.vocab.boi, boi, "text"), *self._image(part, followed), special(self.vocab.eoi)]

        end = special(self.vocab.eos, Role.next_if(shape.learns_text), "text")
        return in_order(shape, self.vocab, lambda part: text(part, self.vocab, "text"), image, [end])

    def fill(self, draft: Draft, streams: Streams) -> None:
        for number, (place, segment) in enumerate(draft.images()):
            x1 = self.latents(draft.sample, segment)
            time, x0 = UNIT, x1
            if place.span.role is Role.IN_PLACE:
                time = self.times(place.span.length).draw(streams.generator("time", number))
                x0 = streams.generator("noise", number).standard_normal(x1.shape, dtype=np.float32)
                draft.fields["velocity"][place.at] = patchify(x1 - x0, self.config.patch_size)
            draft.fields["patches"][place.at] = patchify(interpolate(x1, x0, time), self.config.patch_size)
            draft.fields["time"][place.at] = draft.fields["clock"][place.first - 1] = time
            draft.targets[place.at] = IGNORE

    def build_front(self, ops: ParallelOps) -> nn.Module:
        return ShowoFlowFront(self.config, self.vocab, self.patch_dim, self.grid(self.config.image), ops)

    def build_back(self, ops: ParallelOps) -> nn.Module:
        return ShowoFlowBack(self.config, self.vocab, self.patch_dim, ops)

    def _image(self, part: ImagePart, followed: bool) -> Items:
        h, w = self.grid(part)
        clean = special(self.vocab.pad), Span(h * w, source=part.source, grid=(h, w), encoded=True)
        return drawn_in_place(clean, "", followed and self.config.clean_context) if part.drawn else [Block(clean)]


class ShowoFlowFront(nn.Module):
    """PackedBatch -> embeddings [B, S, D]."""

    def __init__(
        self, config: ShowoFlowConfig, vocab: Vocabulary, patch_dim: int, grid: tuple[int, int], ops: ParallelOps
    ) -> None:
        super().__init__()
        hidden = config.trunk.hidden_size
        self.embedding = ops.vocab_embedding(vocab.size, hidden)
        self.semantic = SemanticLayers(
            patch_dim,
            grid,
            hidden_size=config.semantic_hidden_size,
            intermediate_size=config.semantic_ffn_size,
            num_hidden_layers=config.semantic_layers,
            num_attention_heads=config.semantic_heads,
        )
        self.projector = linear(patch_dim, hidden)
        self.fusion = Fusion(config.semantic_hidden_size, hidden)
        self.clock = ClockEmbedding(config.flow_hidden_size)
        self.clock_in = linear(config.flow_hidden_size, hidden)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        patches, time, clock = (batch.fields[name] for name in ("patches", "time", "clock"))
        image = self.fusion(self.semantic(patches, batch.grids), self.projector(patches))
        x = torch.where((time != NO_TIME)[..., None], image, self.embedding(batch.tokens))
        return torch.where((clock != NO_TIME)[..., None], self.clock_in(self.clock(clock)), x)


class ShowoFlowBack(TokenBack):
    """(hidden [B, S, D], PackedBatch) -> sums of both losses; its parts serve sampling as well."""

    def __init__(self, config: ShowoFlowConfig, vocab: Vocabulary, patch_dim: int, ops: ParallelOps) -> None:
        super().__init__(config.trunk, vocab, ops)
        self.hidden_size = config.trunk.hidden_size
        self.flow = FlowHead(self.hidden_size, config.flow_head, patch_dim, ops)

    def further(self, hidden: torch.Tensor, batch: PackedBatch, attended: Attended) -> torch.Tensor:
        """The velocity of every patch vector [B, n, P]; meaningless where there is no patch."""
        time, clock = batch.fields["time"], batch.fields["clock"]
        return self.flow(hidden, torch.where(clock == NO_TIME, time, clock), len(batch.images), attended)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().logits(hidden[..., : self.hidden_size])

    def velocity(self, hidden: torch.Tensor) -> torch.Tensor:
        """What `further` made of the hidden states [B, n, D + P]."""
        return hidden[..., self.hidden_size :]

    def forward(self, hidden: torch.Tensor, batch: PackedBatch) -> LossSums:
        text, _ = self.head.cross_entropy(hidden[..., : self.hidden_size], batch.fields["labels"])
        noised = batch.fields["term"] == IMAGE
        image = squared_error(self.velocity(hidden), batch.fields["velocity"], noised)
        return {"text": text.sum(), "image": image}
