"""Weights on disk: a folder of them as one mapping that reads a tensor only when asked for it, and writing one file."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_mm.data.files import replacing


class WeightsFolder(Mapping[str, torch.Tensor]):
    """Name -> tensor over all *.safetensors files of `folder`, or, where there are none, its *.bin files (torch's).

    Raises:
        ValueError: there is no such file, or one is damaged.
    """

    def __init__(self, folder: Path):
        paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        if not paths:
            raise ValueError(f"{folder} holds no *.safetensors files: give the folder of a downloaded model.")
        self._read: dict[str, Callable[[], torch.Tensor]] = {}
        for path in paths:
            try:
                self._read |= _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)
            except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError) as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(f"{path} cannot be read ({reason}): download it again.") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def _open_safetensors(path: Path) -> dict[str, Callable[[], torch.Tensor]]:
    file = safe_open(path, framework="pt")
    return {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118, it is no mapping


def _open_torch(path: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Tensors alone, which stay on disk until they are read."""
    tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return {name: partial(tensors.__getitem__, name) for name in tensors}


def save_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes `tensors` to `path`, as transformers reads them; `path` appears when it is complete."""
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
