"""Pretrained weights in and out: official releases to megatron-core checkpoints and back, bit for bit.

    python -m megatron_mm.convert from_hf src=HF_DIR out=CHECKPOINT_DIR [model.trunk.hidden_dropout=0.1 ...]
    python -m megatron_mm.convert to_hf checkpoint=CHECKPOINT_DIR out=HF_DIR
    python -m megatron_mm.convert to_peft checkpoint=CHECKPOINT_DIR out=PEFT_DIR        (its LoRA adapters alone)
    python -m megatron_mm.convert merge_lora checkpoint=CHECKPOINT_DIR out=CHECKPOINT_DIR
    python -m megatron_mm.convert assemble_experts checkpoints=[DIR,...] out=CHECKPOINT_DIR [model.trunk.KEY=...]

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
from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from megatron_mm.config.cli import user_errors
from megatron_mm.config.compose import Config, compose, from_dict_config, to_yaml
from megatron_mm.config.validate import validate
from megatron_mm.data.files import replacing
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.documents.vocabulary import Vocabulary
from megatron_mm.engines.derived import assemble_experts, checkpoint_config, merge_lora
from megatron_mm.engines.format import TRACKER, common_state, resolve
from megatron_mm.engines.reading import CheckpointError
from megatron_mm.engines.whole_weights import load_whole_weights, save_whole_weights
from megatron_mm.families.registry import build_family
from megatron_mm.interop.json_object import read_object
from megatron_mm.interop.peft import adapters_to_peft, config_to_peft
from megatron_mm.interop.registry import CONVERTERS, family_of
from megatron_mm.interop.rules import VQ_PREFIX, check_trunk, with_tied_head
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
    hf = read_object(src / "config.json")
    kind, tokenizer = family_of(hf), src / "tokenizer.json"
    converter = CONVERTERS[kind]
    if not (tokenizer.exists() or any(o.startswith("data.tokenizer=") for o in overrides)):
        raise ValueError(f"{tokenizer} is missing: put it there, or give data.tokenizer=PATH (or bytes).")
    described = converter.overrides_from_hf(hf, read_object(tokenizer) if tokenizer.exists() else {})
    derived = ["run.name=converted", "data.path=data", *described]
    derived += [f"data.tokenizer='{tokenizer.absolute()}'"] if tokenizer.exists() else []
    derived += [] if any(o.startswith("model=") for o in overrides) else [f"model={kind}"]
    config = compose([*derived, *overrides])
    validate(config, world_size=1)
    check_trunk(config.model.trunk, converter.trunk, converter.theirs)
    vocab = _vocabulary(config)
    tensors: Mapping[str, torch.Tensor] = WeightsFolder(src)
    if converter.ties_head(hf):
        tensors = with_tied_head(converter.rules(config.model, vocab.size), tensors)
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


def to_hf(checkpoint: Path, out: Path, averaged: bool = False) -> None:
    """Converts the newest (or the given iter_*) checkpoint, or the moving averages of its weights, to config.json and
    *.safetensors in `out`.

    Raises:
        ValueError: there is no complete checkpoint, or its model exists nowhere else.
    """
    path = resolve(checkpoint)
    config = from_dict_config(OmegaConf.create(common_state(path)["config"]))
    if config.lora.rank:
        raise ValueError(f"{path} holds LoRA adapters: merge_lora merges them first, and to_peft exports them alone.")
    if config.model.family not in CONVERTERS:
        raise ValueError(f"{path} is a {config.model.family} model, but to_hf converts only {_known()}.")
    converter = CONVERTERS[config.model.family]
    vocab = _vocabulary(config)
    original = path.parent / CONFIG_FILE
    hf = converter.config_to_hf(config.model, vocab, read_object(original) if original.exists() else {})
    with single_process(torch.device("cpu")):
        weights = load_whole_weights(path, averaged)
    tensors = dict(converter.weights_to_hf(weights, config.model, vocab.size))
    if (path.parent / VQ_FILE).exists():
        tensors |= load_file(path.parent / VQ_FILE)
    elif converter.image_tokenizer:
        logger.warning("there is no %s: writing the trunk without an image tokenizer", path.parent / VQ_FILE)
    _make_folder(out)
    save_safetensors(out / converter.weights_file, tensors)
    _write_json(out / "config.json", hf)
    logger.info("converted %s to %s", path, out)


def to_peft(checkpoint: Path, out: Path, averaged: bool = False) -> None:
    """Writes the LoRA adapters of the checkpoint, or their moving averages, as adapter_config.json and
    adapter_model.safetensors in `out`, which peft puts on the Hugging Face model that the rest of the weights is.

    Raises:
        ValueError: the checkpoint has no adapters, or Hugging Face does not have its model.
    """
    config = checkpoint_config(checkpoint)
    if config.model.family not in CONVERTERS:
        raise ValueError(f"{checkpoint} is a {config.model.family} model, but to_peft converts only {_known()}.")
    if not config.lora.rank:
        raise ValueError(f"{checkpoint} has no LoRA adapters: it was written with lora.rank=0.")
    with single_process(torch.device("cpu")):
        weights = load_whole_weights(checkpoint, averaged)
    rules = CONVERTERS[config.model.family].rules(config.model, _vocabulary(config).size)
    tensors = dict(adapters_to_peft(weights, rules))
    _make_folder(out)
    save_safetensors(out / "adapter_model.safetensors", tensors)
    _write_json(out / "adapter_config.json", config_to_peft(config.lora, tensors))
    logger.info("exported the adapters of %s to %s", checkpoint, out)


def merge(checkpoint: Path, out: Path, averaged: bool = False) -> None:
    """Writes the checkpoint to `out` with its LoRA adapters merged; raises as `engines.derived.merge_lora`."""
    with single_process(torch.device("cpu")):
        merge_lora(checkpoint, out, averaged)
    logger.info("merged the adapters of %s into %s", checkpoint, out)


def assemble(checkpoints: str, out: Path, overrides: list[str]) -> None:
    """Writes a model to `out` whose experts are the feed-forwards of `checkpoints` ("[a, b]"), dense models all; raises
    as `engines.derived.assemble_experts`."""
    folders = [Path(folder.strip()) for folder in checkpoints.strip("[]").split(",")]
    nested = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    with single_process(torch.device("cpu")):
        config = assemble_experts(folders, out, nested)
    validate(config, config.parallel.model_parallel_size)
    logger.info("assembled %d experts a layer in %s", len(folders), out)


FROM_CHECKPOINT = {"to_hf": to_hf, "to_peft": to_peft, "merge_lora": merge}
NEEDED = {
    "from_hf": ("src", "out"),
    **dict.fromkeys(FROM_CHECKPOINT, ("checkpoint", "out")),
    "assemble_experts": ("checkpoints", "out"),
}
"""What each command cannot do without."""


def main(arguments: list[str]) -> None:
    """The command line; raises ValueError for what it cannot make sense of."""
    command, *pairs = arguments or ["help"]
    if command not in NEEDED:
        raise ValueError(f"{command} is none of {', '.join(NEEDED)}: write from_hf src=DIR out=DIR.")
    needed = NEEDED[command]
    given = dict(pair.split("=", 1) for pair in pairs if pair.partition("=")[0] in needed)
    for name in needed:
        if not given.get(name):
            raise ValueError(f"{name}= is not given: write {command} {' '.join(f'{n}=DIR' for n in needed)}.")
    others = [pair for pair in pairs if pair.partition("=")[0] not in needed]
    if command == "from_hf":
        from_hf(Path(given["src"]), Path(given["out"]), others)
    elif command == "assemble_experts":
        assemble(given["checkpoints"], Path(given["out"]), others)
    elif others not in ([], ["weights=model"], ["weights=ema"]):
        raise ValueError(f"{command} takes only {', '.join(needed)} and weights=model|ema: leave out {others[0]}.")
    else:
        FROM_CHECKPOINT[command](Path(given["checkpoint"]), Path(given["out"]), others == ["weights=ema"])


def _known() -> str:
    return " and ".join(CONVERTERS)


def _vocabulary(config: Config) -> Vocabulary:
    return build_family(config.model, load_tokenizer(config.data.tokenizer).size).vocab


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
