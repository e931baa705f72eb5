"""What each family is decoded with, and what is said of guidance that was never trained."""

from dataclasses import replace

import pytest

from megatron_mm.config.compose import FAMILIES
from megatron_mm.config.generate import SamplingConfig
from megatron_mm.sampling.decoding import PUBLISHED, Decoding


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_the_published_ones_and_other_options_are_refused(family):
    model = FAMILIES[family]()
    trained = (
        replace(model, condition_dropout=0.1) if hasattr(model, "condition_dropout") and family != "unimoe" else model
    )
    decoding, told = Decoding.of(SamplingConfig(), trained)
    assert told == "" and all(getattr(decoding, name) == value for name, value in PUBLISHED[family].items())
    for name in {"steps", "image_top_p", "repetition_penalty", "block_length", "cfg_scale"} - PUBLISHED[family].keys():
        with pytest.raises(ValueError, match=f"{name}=2 does nothing in a {family} model: leave it out"):
            Decoding.of(SamplingConfig(**{name: 2}), trained)


def test_guidance_that_was_never_trained_is_said_aloud():
    model = replace(FAMILIES["janus"](), condition_dropout=0.0)
    for asked, scale, said in (
        (None, 1.0, "images have no guidance"),
        (4.0, 4.0, "cfg_scale=4.0 leads away"),
        (1.0, 1.0, ""),
    ):
        decoding, told = Decoding.of(SamplingConfig(cfg_scale=asked), model)
        assert decoding.cfg_scale == scale and told.startswith(said) and bool(told) == bool(said)
    decoding, told = Decoding.of(SamplingConfig(), FAMILIES["chameleon"]())
    assert (decoding.cfg_scale, decoding.image_cfg_scale, told) == (3.0, 1.2, ""), "as published, without dropout"
