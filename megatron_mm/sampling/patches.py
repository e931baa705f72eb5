"""Images of patches that stand in the sequence and are denoised in place: Transfusion and Show-o2.

A step overwrites the noised patches in the cache; what follows the finished image reads it once more, clean.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from megatron_mm.documents.builder import Opening
from megatron_mm.families.patches import places
from megatron_mm.nn.flow import UNIT
from megatron_mm.nn.patch import patchify, unpatchify
from megatron_mm.sampling.decoder import piece
from megatron_mm.sampling.row import Row
from megatron_mm.sampling.sampler import Sampler
from megatron_mm.types import PackedBatch


class PatchSampler(Sampler):
    """See `Sampler`."""

    @abstractmethod
    def denoise(self, indices: Sequence[int], opening: Opening, x: torch.Tensor) -> torch.Tensor:
        """The clean patches of each row's image from noise `x`, float [b, h * w, P]."""

    @abstractmethod
    def predict(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """What the model predicts of patches [B, n, P], from its hidden states."""

    @abstractmethod
    def set_time(self, fields: dict[str, torch.Tensor], time: int, at: slice) -> None:
        """Says in the fields [b, n] of an image's block, whose patches are `at`, what its time is."""

    def draw(self, rows: Sequence[Row], openings: Sequence[Opening]) -> Sequence[np.ndarray]:
        channels, p = self.model.config.model.image.channels, self.model.config.model.patch_size
        _, h, w = openings[0].block.images[0].tolist()
        noise = [patchify(row.noise((channels, h * p, w * p)), p) for row in rows]
        indices, _ = self.read_all(rows, openings)
        x = self.denoise(indices, openings[0], torch.from_numpy(np.stack(noise)).to(self.model.device))
        return [unpatchify(patches, h, w, p) for patches in x.cpu().numpy()]

    def guided_prediction(self, indices: Sequence[int], opening: Opening, x: torch.Tensor, time: int) -> torch.Tensor:
        """What the model predicts of patches `x` [b, h * w, P] at a time, guided; leaves nothing in the cache."""
        block = opening.block
        first, h, w = block.images[0].tolist()
        at = slice(first, first + h * w)
        everyone = x.repeat(1 + self.twins, 1, 1)
        tokens = np.tile(block.tokens, (len(everyone), 1))
        fields = {name: values.to(self.model.device) for name, values in self.blank_fields(tokens.shape).items()}
        fields["patches"] = fields["patches"].to(x.dtype)
        fields["patches"][:, at] = everyone
        if "place" in fields:
            fields["place"][:, at] = torch.from_numpy(places((h, w))).to(x.device)
        self.set_time(fields, time, at)
        batch = piece(tokens, block.mask[1], fields, [(row, first, h, w) for row in range(len(everyone))])
        hidden = self.decoder.forward(indices, batch, keep=0)
        return self.guide(self.predict(hidden, batch.to(self.model.device))[:, at].to(x.dtype))


class TransfusionSampler(PatchSampler):
    """DDIM steps."""

    def denoise(self, indices: Sequence[int], opening: Opening, x: torch.Tensor) -> torch.Tensor:
        schedule, limit = self.model.family.schedule, self.model.codec.limit
        timesteps = schedule.timesteps(min(self.decoding.steps, schedule.num_train_timesteps))
        for number, (t, t_prev) in enumerate(zip(timesteps, [*timesteps[1:], -1], strict=True), 1):
            self.report(f"denoising, step {number} of {len(timesteps)}")
            x = schedule.step(x, self.guided_prediction(indices, opening, x, t), t, t_prev, limit)
        return x

    def predict(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        return self.model.from_back(lambda back: back.predict_noise(hidden, batch))

    def set_time(self, fields: dict[str, torch.Tensor], time: int, at: slice) -> None:
        fields["timestep"][:, at] = time


class ShowoFlowSampler(PatchSampler):
    """Euler steps along the flow."""

    def denoise(self, indices: Sequence[int], opening: Opening, x: torch.Tensor) -> torch.Tensor:
        times = self.model.family.times(x.shape[1]).sampling(self.decoding.steps)
        for number, (time, following) in enumerate(zip(times[:-1], times[1:], strict=True), 1):
            self.report(f"denoising, step {number} of {len(times) - 1}")
            x = x + (following - time) / UNIT * self.guided_prediction(indices, opening, x, time)
        limit = self.model.codec.limit
        return x if limit is None else x.clamp(-limit, limit)

    def predict(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        return self.model.from_back(lambda back: back.velocity(hidden))

    def set_time(self, fields: dict[str, torch.Tensor], time: int, at: slice) -> None:
        fields["time"][:, at] = fields["clock"][:, at.start - 1] = time
