"""Writes `curves.json`: the losses of 20 steps of every family, tiny and in fp64, which `test_curves.py` compares.

A change that moves them is one of data, layout, mathematics or initialisation, and says so in its message. To write the
file anew, from the project's root:

    python tests/oracles/make_curves.py
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_runs import FAMILIES, make_shards, overrides_for, run_training

CURVES = Path(__file__).with_name("curves.json")
FP64 = ["train.precision=fp64", "parallel.use_distributed_optimizer=false"]
NAMES = (*FAMILIES, "transfusion_unet", "unimoe")


def curves(family: str, folder: Path) -> dict[str, list[float]]:
    """Term -> its loss at each step, and the gradient's norm. `folder` holds `make_shards`."""
    steps = run_training(overrides_for(family, folder, folder / family, *FP64))
    found = {name: [step["losses"][name] for step in steps] for name in steps[0]["losses"]}
    return found | {"grad_norm": [step["grad_norm"] for step in steps]}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        make_shards(Path(name))
        found = {family: curves(family, Path(name)) for family in NAMES}
    CURVES.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{CURVES}: {len(found)} families")


if __name__ == "__main__":
    main()
