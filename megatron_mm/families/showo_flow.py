"""Show-o2 (arXiv 2506.15564): text left to right, images by flow matching on their latents, in one sequence.

    text to image   BOS  text ...  BOI  TIME  patch ...  EOI  EOS
    image to text   BOS  BOI  TIME  patch ...  EOI  text ...  EOS

An image's patches take two paths, SigLIP's layers for what they mean and a linear layer for what they look like, which
are fused; before them stands the embedding of the image's time. They see each other and what comes before them; all
else is causal. Behind the trunk, the flow head predicts the velocity of every patch of a noised image. Images that are
only looked at are clean, at time 1, and have no such loss.

Where the paper is silent: captions of images to be drawn have no loss; of an interleaved document an image that ends it
is noised, all others are clean.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from megatron_mm.config.flow import ShowoFlowConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.families.base import LossSums, Vocabulary
from megatron_mm.families.layout import (
    drop_condition,
    in_task_order,
    next_token_labels,
    open_end,
    prompt_end,
    task_of,
    token_sequence,
)
from megatron_mm.families.patches import PatchGrid, images_of
from megatron_mm.mask import with_spans
from megatron_mm.nn.flow import UNIT, FlowTimes, interpolate
from megatron_mm.nn.flow_head import FlowHead, Fusion, SemanticLayers
from megatron_mm.nn.init import linear
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.nn.patch import TimestepEmbedding, patchify
from megatron_mm.nn.siglip import siglip
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

NO_TIME = -1
"""Time of a position that has none."""


class ShowoFlow(PatchGrid):
    """See `Family`. Fields of a batch:

    patches [B, S, P]: x_t as patch vectors; velocity [B, S, P]: x_1 - x_0; time int32 [B, S] of patches, in millionths,
    and clock int32 [B, S] of the position before them, -1 elsewhere; labels int64 [B, S].
    """

    name = "showo_flow"
    causal = False
    hides_keys = False
    image_codes = 0
    pixels = None

    config: ShowoFlowConfig

    def __init__(self, config: ShowoFlowConfig, text_vocab_size: int) -> None:
        self.config = config
        self.trunk = config.trunk
        self.vocab = Vocabulary.after_text(text_vocab_size)
        self.times = FlowTimes(self.grid[0] * self.grid[1], config.time_shift)
        self.terms: tuple[LossTerm, ...] = (LossTerm("text", config.ntp_weight), LossTerm("image", config.flow_weight))
        self.fields = {
            "patches": FieldSpec("float32", (self.patch_dim,), 0.0, (FRONT,)),
            "velocity": FieldSpec("float32", (self.patch_dim,), 0.0, (BACK,)),
            "time": FieldSpec("int32", (), NO_TIME, (FRONT, BACK)),
            "clock": FieldSpec("int32", (), NO_TIME, (FRONT,)),
            "labels": FieldSpec("int64", (), IGNORE, (BACK,)),
        }

    def length(self, text_tokens: int, texts: int, images: int) -> int:
        """Positions of a document; one without its caption turns out shorter."""
        h, w = self.grid
        return 2 + text_tokens + images * (3 + h * w)

    def encoded_images(self, texts: int, images: int, task: str) -> float:
        return float(images)

    def lay_out(self, sample: Sample, streams: Streams) -> Document:
        """See `Family.lay_out`.

        Raises:
            ValueError: an image is not of the configured size.
        """
        task = task_of(sample, streams, self.config.generation_share)
        segments = in_task_order(drop_condition(sample.segments, task, streams, self.config.condition_dropout), task)
        draws = task != "understanding" and isinstance(segments[-1], ImageSegment)
        tokens, images, fields = self._sequence(sample, segments, streams if draws else None)
        labels = next_token_labels(tokens)
        for first, h, w in images.tolist():
            labels[first - 2 : first + h * w] = IGNORE
        labels[: max(prompt_end(sample, lambda given: self._sequence(sample, given, None)[0]) - 1, 0)] = IGNORE
        if task == "generation":
            labels[:] = IGNORE
        return Document(sample.uid, tokens, _mask(len(tokens), images), {**fields, "labels": labels}, images, images)

    def lay_out_prompt(self, sample: Sample, open_image: bool = False) -> Document:
        """See `Family.lay_out_prompt`: images are clean. Raises as `lay_out` does."""
        tokens, images, fields = self._sequence(sample, sample.segments, None)
        tokens = open_end(tokens, self.vocab, open_image)
        fields = {name: fields[name][: len(tokens)] for name in ("patches", "time", "clock")}
        return Document(sample.uid, tokens, _mask(len(tokens), images), fields, images, images)

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        return {
            "text": int((batch.fields["labels"] != IGNORE).sum()),
            "image": int(_noised(batch.fields["time"]).sum()),
        }

    def build_front(self, ops: ParallelOps) -> nn.Module:
        return ShowoFlowFront(self.config, self.vocab, self.patch_dim, self.grid, ops)

    def build_back(self, ops: ParallelOps) -> nn.Module:
        return ShowoFlowBack(self.config, self.vocab, self.patch_dim, ops)

    def _sequence(
        self, sample: Sample, segments: tuple[Segment, ...], noise: Streams | None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Tokens, images and the fields of patches; `noise` draws that of the last image, the others are clean."""
        clock = [self.vocab.pad]
        tokens, images = token_sequence(segments, self.vocab, lambda _: np.full(self.grid, self.vocab.pad), clock)
        patches, velocity = np.zeros((2, len(tokens), self.patch_dim), dtype=np.float32)
        times, clocks = np.full((2, len(tokens)), NO_TIME, dtype=np.int32)
        latents = images_of(sample, segments, self.config.image)
        for number, ((first, h, w), x1) in enumerate(zip(images.tolist(), latents, strict=True)):
            time, x0 = UNIT, x1
            if noise is not None and number == len(latents) - 1:
                time = self.times.draw(noise.generator("time"))
                x0 = noise.generator("noise").standard_normal(x1.shape, dtype=np.float32)
            where = slice(first, first + h * w)
            patches[where] = patchify(interpolate(x1, x0, time), self.config.patch_size)
            velocity[where] = patchify(x1 - x0, self.config.patch_size)
            times[where] = clocks[first - 1] = time
        return tokens, images, {"patches": patches, "velocity": velocity, "time": times, "clock": clocks}


class ShowoFlowFront(nn.Module):
    """PackedBatch -> embeddings [B, S, D]."""

    def __init__(
        self, config: ShowoFlowConfig, vocab: Vocabulary, patch_dim: int, grid: tuple[int, int], ops: ParallelOps
    ) -> None:
        super().__init__()
        hidden = config.trunk.hidden_size
        encoder = siglip().SiglipVisionConfig(
            hidden_size=config.semantic_hidden_size,
            intermediate_size=config.semantic_ffn_size,
            num_hidden_layers=config.semantic_layers,
            num_attention_heads=config.semantic_heads,
            attn_implementation="sdpa",
        )
        self.embedding = ops.vocab_embedding(vocab.size, hidden)
        self.semantic = SemanticLayers(patch_dim, grid, encoder)
        self.projector = linear(patch_dim, hidden)
        self.fusion = Fusion(encoder.hidden_size, hidden)
        self.time = TimestepEmbedding(hidden)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        patches, time, clock = (batch.fields[name] for name in ("patches", "time", "clock"))
        image = self.fusion(self.semantic(patches, batch.grids), self.projector(patches))
        x = torch.where((time != NO_TIME)[..., None], image, self.embedding(batch.tokens))
        return torch.where((clock != NO_TIME)[..., None], self.time(clock / 1000), x)


class ShowoFlowBack(nn.Module):
    """(hidden [B, S, D], PackedBatch) -> sums of both losses; its parts serve sampling as well."""

    def __init__(self, config: ShowoFlowConfig, vocab: Vocabulary, patch_dim: int, ops: ParallelOps) -> None:
        super().__init__()
        hidden = config.trunk.hidden_size
        self.ops = ops
        self.head = ops.vocab_head(hidden, vocab.size, config.trunk.head_bias)
        self.flow = FlowHead(hidden, config.flow_attention_heads, config.flow_layers, patch_dim)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's share of the logits [B, S, V / TP]."""
        return self.head(hidden)

    def predict_velocity(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """The velocity of every patch vector [B, S, P]; zero where there is no patch."""
        return self.flow(hidden, batch.fields["time"] / 1000, batch.grids)

    def forward(self, hidden: torch.Tensor, batch: PackedBatch) -> LossSums:
        text, _ = self.head.cross_entropy(hidden, batch.fields["labels"])
        predicted = self.predict_velocity(hidden, batch)
        precise = torch.promote_types(predicted.dtype, torch.float32)
        error = (predicted.to(precise) - batch.fields["velocity"].to(precise)).square().mean(dim=-1)
        return {"text": text.sum(), "image": torch.where(_noised(batch.fields["time"]), error, 0.0).sum()}


def _noised(time: torch.Tensor) -> torch.Tensor:
    return (time != NO_TIME) & (time < UNIT)


def _mask(n: int, images: np.ndarray) -> np.ndarray:
    """Causal, but for an image's time and patches, which see each other."""
    return with_spans(n, [(first - 1, first + h * w) for first, h, w in images.tolist()])
