"""The loss curves that are checked in: nobody changes what a family learns without saying so."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import make_shards

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))

from make_curves import CURVES, NAMES, curves


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curves")
    make_shards(folder)
    return folder


@pytest.mark.parametrize("family", NAMES)
def test_the_curve_is_the_one_that_is_checked_in(family, shards):
    """To 1e-8: rounding of fp64, by another machine's products, grown over 20 steps."""
    expected = json.loads(CURVES.read_text())[family]
    found = curves(family, shards)
    assert found.keys() == expected.keys() and all(len(values) == 20 for values in found.values())
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-8, atol=1e-10, err_msg=f"{name}: {MEND}")


MEND = "if this is meant, write the curves anew (tests/oracles/make_curves.py) and say why"
