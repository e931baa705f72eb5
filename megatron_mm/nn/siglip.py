"""transformers' SigLIP: an optional package, imported when a model that has its layers is built."""

from __future__ import annotations

import importlib.util
from types import ModuleType


def siglip() -> ModuleType:
    """The module that holds SiglipVisionConfig, SiglipVisionModel and SiglipEncoder.

    Raises:
        ValueError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("This model reads images by SigLIP's layers, from a package: run `pip install transformers`.")
    from transformers.models.siglip import modeling_siglip

    return modeling_siglip
