"""Pretrained weights in and out: official releases to megatron-core checkpoints and back, bit for bit.

    python -m megatron_mm.convert from_hf src=HF_DIR out=CHECKPOINT_DIR [model.trunk.hidden_dropout=0.1 ...]
    python -m megatron_mm.convert to_hf checkpoint=CHECKPOINT_DIR out=HF_DIR

One process without a GPU, whatever layout the run that loads the checkpoint has (`checkpoint.load=CHECKPOINT_DIR`).
Chameleon and Janus as transformers has them; Show-o and MMaDA as their own code has them. What a model has besides its
trunk goes along beside the checkpoint: vqmodel.safetensors (the image tokenizer, where the release holds one) and
hf_config.json. To convert a checkpoint of later training, copy these two beside it first; without them `to_hf` writes
the trunk alone.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from megatron_mm.config.cli import user_errors
from megatron_mm.config.compose import Config, compose, from_dict_config, to_yaml
from megatron_mm.config.validate import validate
from megatron_mm.data.files import replacing
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.engines.checkpoint import TRACKER, CheckpointError, common_state, resolve
from megatron_mm.engines.whole_weights import load_whole_weights, save_whole_weights
from megatron_mm.families.base import Vocabulary
from megatron_mm.families.registry import build_family
from megatron_mm.interop.registry import CONVERTERS, family_of
from megatron_mm.interop.rules import VQ_PREFIX, check_trunk
from megatron_mm.interop.safetensors_folder import WeightsFolder, save_safetensors
from megatron_mm.parallel.distributed import single_process

logger = logging.getLogger(__name__)

VQ_FILE, CONFIG_FILE = "vqmodel.safetensors", "hf_config.json"


def from_hf(src: Path, out: Path, overrides: list[str]) -> Config:
    """Converts the Hugging Face folder `src` to a checkpoint in `out`; `overrides` win over what its config says.

    Raises:
        ValueError: it is not a model we can hold, its weights are not those of its config, or `out` is taken.
    """
    if (out / TRACKER).exists():
        raise CheckpointError(f"out={out} already holds a checkpoint: choose another folder, or remove it.")
    hf = _read_json(src / "config.json")
    kind, tokenizer = family_of(hf), src / "tokenizer.json"
    converter = CONVERTERS[kind]
    described = converter.overrides_from_hf(hf, _read_json(tokenizer) if tokenizer.exists() else {})
    derived = ["run.name=converted", "data.path=data", *described]
    derived += [f"data.tokenizer='{tokenizer.absolute()}'"] if tokenizer.exists() else []
    derived += [] if any(o.startswith("model=") for o in overrides) else [f"model={kind}"]
    config = compose([*derived, *overrides])
    validate(config, world_size=1)
    check_trunk(config.model.trunk, converter.trunk, converter.theirs)
    vocab = _vocabulary(config)
    tensors = WeightsFolder(src)
    _make_folder(out)
    _write_json(out / CONFIG_FILE, hf)
    image_tokenizer = {name: tensors[name] for name in tensors if name.startswith(VQ_PREFIX)}
    if image_tokenizer:
        save_safetensors(out / VQ_FILE, image_tokenizer)
        logger.info("%s is no part of our trunk: kept as %s", VQ_PREFIX.rstrip("."), out / VQ_FILE)
    with single_process(torch.device("cpu")):
        save_whole_weights(out, converter.weights_from_hf(tensors, config.model, vocab.size), to_yaml(config))
    logger.info("converted %s to %s", src, out)
    return config


def to_hf(checkpoint: Path, out: Path) -> None:
    """Converts the newest (or the given iter_*) checkpoint to config.json and *.safetensors in `out`.

    Raises:
        ValueError: there is no complete checkpoint, or its model exists nowhere else.
    """
    path = resolve(checkpoint)
    config = from_dict_config(OmegaConf.create(common_state(path)["config"]))
    if config.model.family not in CONVERTERS:
        known = " and ".join(CONVERTERS)
        raise ValueError(f"{path} is a {config.model.family} model, but to_hf converts only {known}.")
    converter = CONVERTERS[config.model.family]
    vocab = _vocabulary(config)
    original = path.parent / CONFIG_FILE
    hf = converter.config_to_hf(config.model, vocab, _read_json(original) if original.exists() else {})
    with single_process(torch.device("cpu")):
        weights = load_whole_weights(path)
    tensors = dict(converter.weights_to_hf(weights, config.model, vocab.size))
    if (path.parent / VQ_FILE).exists():
        tensors |= load_file(path.parent / VQ_FILE)
    elif converter.image_tokenizer:
        logger.warning("there is no %s: writing the trunk without an image tokenizer", path.parent / VQ_FILE)
    _make_folder(out)
    save_safetensors(out / converter.weights_file, tensors)
    _write_json(out / "config.json", hf)
    logger.info("converted %s to %s", path, out)


def main(arguments: list[str]) -> None:
    """The command line; raises ValueError for what it cannot make sense of."""
    direction, *pairs = arguments or ["help"]
    needed = {"from_hf": ("src", "out"), "to_hf": ("checkpoint", "out")}.get(direction)
    if needed is None:
        raise ValueError(f"{direction} is neither from_hf nor to_hf: write from_hf src=DIR out=DIR.")
    given = dict(pair.split("=", 1) for pair in pairs if pair.partition("=")[0] in needed)
    for name in needed:
        if not given.get(name):
            raise ValueError(f"{name}= is not given: write {direction} {' '.join(f'{n}=DIR' for n in needed)}.")
    others = [pair for pair in pairs if pair.partition("=")[0] not in needed]
    if direction == "from_hf":
        from_hf(Path(given["src"]), Path(given["out"]), others)
    elif others:
        raise ValueError(f"to_hf takes only {' and '.join(needed)}: leave out {others[0]}.")
    else:
        to_hf(Path(given["checkpoint"]), Path(given["out"]))


def _vocabulary(config: Config) -> Vocabulary:
    return build_family(config.model, load_tokenizer(config.data.tokenizer).size).vocab


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read: {error.strerror}. Give the folder of a Hugging Face model."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def _write_json(path: Path, content: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2))


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={path} cannot be made: {error.strerror}. Choose another folder.") from error


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with user_errors():
        main(sys.argv[1:])
