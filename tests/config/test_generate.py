"""The command line of `megatron_mm.generate`."""

import pytest

from megatron_mm.config.compose import ConfigError
from megatron_mm.config.generate import parse

CHECKPOINT = "checkpoint=runs/demo"


def test_values_are_typed_and_text_is_kept():
    config = parse([CHECKPOINT, "prompt=a: {b}, [c] = 1.0", "cfg_scale=2", "temperature=0", "out=1", "seed=3"])
    assert config.prompt == ("a: {b}, [c] = 1.0",)
    assert (config.cfg_scale, config.temperature, config.out, config.seed) == (2.0, 0.0, "1", 3)


def test_several_prompts(tmp_path):
    assert parse([CHECKPOINT, "prompt=[a cat, 'b, c', 3]"]).prompt == ("a cat", "b, c", "3")
    (tmp_path / "prompts.txt").write_text("one\n\n two: 2 \n")
    assert parse([CHECKPOINT, f"prompt=@{tmp_path}/prompts.txt"]).prompt == ("one", " two: 2 ")


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        (["prompt=x"], "text_to_image"),
        (["image={file}"], "image_to_text"),
        (["image={file}", "prompt=x"], "image_to_text"),
        (["image={file}", "mode=interleaved"], "interleaved"),
        (["prompt="], "text_to_image"),
    ],
)
def test_mode(arguments, mode, tmp_path):
    (tmp_path / "a.png").touch()
    assert parse([CHECKPOINT, *(a.format(file=tmp_path / "a.png") for a in arguments)]).effective_mode == mode


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prompt=x"], r"checkpoint is not set: add checkpoint=DIR"),
        ([CHECKPOINT], r'Nothing to continue: add prompt="\.\.\." or image=FILE\.'),
        ([CHECKPOINT, "promt=x"], r"promt is not a known key \(did you mean prompt\?\); keys: num_samples, seed"),
        ([CHECKPOINT, "prompt"], r"'prompt' is not understood: arguments are written key=value\."),
        ([CHECKPOINT, "image=no.png"], r"image=no\.png is no file"),
        ([CHECKPOINT, "prompt=@no.txt"], r"prompt=@no\.txt names no file"),
        ([CHECKPOINT, "prompt=[a, b"], r"prompt=\[a, b cannot be read: .*; put texts in quotes\."),
        ([CHECKPOINT, "prompt=[]"], r"prompt=\[\] must be a list such as"),
        ([CHECKPOINT, "prompt=x", "steps=many"], r"steps=many must be a whole number or null\."),
        ([CHECKPOINT, "prompt=x", "steps=0"], r"steps=0 must be 1 or more\."),
        ([CHECKPOINT, "prompt=x", "top_p=1.5"], r"top_p=1\.5 must be between 0 and 1\."),
        ([CHECKPOINT, "prompt=x", "temperature=-1"], r"temperature=-1\.0 must be 0 or more, and finite\."),
        ([CHECKPOINT, "prompt=x", "mode=video"], r"mode=video must be one of auto, text_to_image"),
    ],
)
def test_mistakes(arguments, said):
    with pytest.raises(ConfigError, match=said) as error:
        parse(arguments)
    assert "\n" not in str(error.value)
