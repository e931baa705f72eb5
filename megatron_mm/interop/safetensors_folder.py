"""*.safetensors files: a folder of them as one mapping that reads a tensor only when asked for it, and writing one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_mm.data.files import replacing


class SafetensorsFolder(Mapping[str, torch.Tensor]):
    """Name -> tensor over all *.safetensors files of `folder`.

    Raises:
        ValueError: there is no such file, or one is damaged.
    """

    def __init__(self, folder: Path):
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ValueError(f"{folder} holds no *.safetensors files: give the folder of a downloaded model.")
        self._files = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read ({error}): download it again.") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def save_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes `tensors` to `path`, as transformers reads them; `path` appears when it is complete."""
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
