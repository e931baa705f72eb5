"""The vision encoder of families that read images as pixels: transformers' SigLIP, new or from a local folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from megatron_mm.config.janus import EncoderConfig
from megatron_mm.nn.images import over_images
from megatron_mm.nn.init import linear, scale_init
from megatron_mm.nn.siglip import siglip
from megatron_mm.types import Grids

_PREFIX = "vision_model."
"""What older SigLIP files put before the names of the vision half."""
_NOT_READ = ("head.", "text_model.", "logit_", "embeddings.position_ids")
"""Parts of a SigLIP that are not ours: pooling head and text half."""
_SIZES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_act": "activation",
}
"""config.json's names of our keys."""


class Adaptor(nn.Sequential):
    """Linear, GELU, Linear: [..., inputs] -> [..., outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(linear(inputs, outputs), nn.GELU(), linear(outputs, outputs))


class VisionIn(nn.Module):
    """Patch vectors [B, S, 3 * p * p] of images -> embeddings [B, S, D], zero outside the images; encoder and adaptor.

    path: folder of a pretrained SigLIP, which `load_pretrained` reads. frozen: the encoder is not trained. adaptor:
    makes what leads from the encoder's width to the trunk's.
    """

    def __init__(
        self,
        config: EncoderConfig,
        hidden_size: int,
        path: str | None,
        frozen: bool,
        adaptor: Callable[[int, int], nn.Module] = Adaptor,
    ) -> None:
        super().__init__()
        self.config, self.hidden_size, self.path = config, hidden_size, path
        self.encoder = _build(config).requires_grad_(not frozen)
        self.adaptor = adaptor(config.hidden_size, hidden_size)

    def load_pretrained(self) -> None:
        """Replaces the encoder's weights by those of its folder, if it has one.

        Raises:
            ValueError: it holds no SigLIP, or one that the configuration does not fit.
        """
        if self.path is not None:
            load_siglip(self.encoder, Path(self.path), self.config)

    def forward(self, patches: torch.Tensor, images: Sequence[Grids]) -> torch.Tensor:
        """`images`: those that are to be read."""
        return over_images(self._read, [patches], images, self.hidden_size, self)

    def _read(self, patches: torch.Tensor) -> torch.Tensor:
        """[N, h, w, 3 * p * p] -> [N, h * w, D]."""
        pixels = F.pixel_shuffle(patches.movedim(-1, 1), self.config.patch_size)
        return self.adaptor(self.encoder(pixels).last_hidden_state)


def load_siglip(encoder: nn.Module, folder: Path, config: EncoderConfig) -> None:
    """Copies the weights of a SigLIP's vision half into `encoder`.

    Raises:
        ValueError: the folder holds none, its sizes are not `config`'s, or weights are missing, left over or misshapen.
    """
    key = f"model.encoder_path={folder}"
    _check_sizes(key, _vision_config(key, folder), config)
    wanted = dict(encoder.named_parameters())
    found: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for full in file.keys():  # noqa: SIM118
                    name = full.removeprefix(_PREFIX)
                    if name.startswith(_NOT_READ):
                        continue
                    found.add(name)
                    if name in wanted:
                        _copy(key, name, file.get_tensor(full), wanted[name])
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{key}: {path.name} cannot be read ({error}); download it again.") from error
    for word, names in (("lacks", wanted.keys() - found), ("has the unknown", found - wanted.keys())):
        if names:
            shown = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ValueError(f"{key} {word} {shown}: it is not a SigLIP vision encoder of model.encoder's sizes.")


@torch.no_grad()
def _copy(key: str, name: str, weight: torch.Tensor, target: torch.Tensor) -> None:
    if weight.shape != target.shape:
        raise ValueError(
            f"{key}: {name} is {list(weight.shape)}, but model.encoder makes it {list(target.shape)}; change its sizes."
        )
    target.copy_(weight)


def _vision_config(key: str, folder: Path) -> dict[str, Any]:
    """The vision half of config.json, with what transformers leaves out at its defaults."""
    try:
        given = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{key} has no readable config.json ({error}): give the folder of a SigLIP.") from error
    kind = given.get("model_type")
    if kind not in ("siglip", "siglip_vision_model"):
        raise ValueError(f"{key} is a model of type {kind}, not siglip: give the folder of a SigLIP.")
    sizes = {name: value for name, value in given.get("vision_config", given).items() if name in _SIZES}
    return siglip().SiglipVisionConfig(**sizes).to_dict()


def _check_sizes(key: str, theirs: dict[str, Any], config: EncoderConfig) -> None:
    ours = vars(config) | {"ffn_hidden_size": config.ffn_size}
    wrong = [f"model.encoder.{ours_}={theirs[name]}" for name, ours_ in _SIZES.items() if theirs[name] != ours[ours_]]
    if wrong:
        raise ValueError(f"{key} is of other sizes than model.encoder: set {' '.join(wrong)}.")


def _build(config: EncoderConfig) -> nn.Module:
    """A SigLIP vision encoder [N, 3, H, W] -> last_hidden_state [N, h * w, width], with our initialisation."""
    modules = siglip()
    encoder = modules.SiglipVisionModel(
        modules.SiglipVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act=config.activation,
            vision_use_head=False,
        )
    )
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            scale_init(module)
        elif isinstance(module, nn.Embedding):
            module.weight.init_std = config.hidden_size**-0.5  # as SigLIP's own
    return encoder
