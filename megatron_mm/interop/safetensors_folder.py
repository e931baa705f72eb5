"""Weights on disk: a folder of them as one mapping that reads a tensor only when asked for it, and writing one file."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_mm.data.files import replacing
from megatron_mm.interop.json_object import read_object

logger = logging.getLogger(__name__)


class WeightsFolder(Mapping[str, torch.Tensor]):
    """Name -> tensor over all *.safetensors files of `folder`, or, where there are none, its *.bin files (torch's).

    An index beside them (model.safetensors.index.json) says which files belong, and which of them holds a tensor.

    Raises:
        ValueError: there is no such file, one is damaged or missing, or two hold a tensor of the same name.
    """

    def __init__(self, folder: Path):
        index, paths = _find(folder)
        self._read: dict[str, Callable[[], torch.Tensor]] = {}
        where: dict[str, Path] = {}
        for path in paths:
            for name, read in _open(path).items():
                if index.get(name, path.name) != path.name:
                    continue
                if name in where:
                    raise ValueError(
                        f"{where[name]} and {path} both hold {name}: remove the file that does not belong."
                    )
                self._read[name], where[name] = read, path
        if missing := sorted(index.keys() - where.keys()):
            path = folder / index[missing[0]]
            raise ValueError(f"{path} lacks {missing[0]}, which the index places there: download both again.")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def _find(folder: Path) -> tuple[dict[str, str], list[Path]]:
    """(name of a tensor -> name of its file, empty where there is no index; the files)."""
    for kind in ("safetensors", "bin"):
        found, indices = sorted(folder.glob(f"*.{kind}")), sorted(folder.glob(f"*.{kind}.index.json"))
        if len(indices) > 1:
            raise ValueError(f"{indices[0]} and {indices[1].name} beside it are two indices: leave the model's own.")
        if indices:
            index = _read_index(indices[0])
            paths = [folder / name for name in sorted(set(index.values()))]
            if missing := [path for path in paths if not path.is_file()]:
                raise ValueError(f"{missing[0]} is missing, which {indices[0].name} names: download it too.")
            if others := [path.name for path in found if path not in paths]:
                logger.warning("%s does not name %s: left out", indices[0], ", ".join(others))
            return index, paths
        if found:
            return {}, found
    raise ValueError(f"{folder} holds no *.safetensors files: give the folder of a downloaded model.")


def _read_index(path: Path) -> dict[str, str]:
    index = read_object(path).get("weight_map")
    if not isinstance(index, dict) or not all(Path(str(name)).name == name for name in index.values()):
        raise ValueError(f"{path} has no weight_map from tensors to files beside it: download it again.")
    return index


def _open(path: Path) -> dict[str, Callable[[], torch.Tensor]]:
    try:
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)
    except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read ({reason}): download it again.") from error


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
