"""The command line of `megatron_mm.generate`."""

import json

import pytest

from megatron_mm.config.compose import ConfigError
from megatron_mm.config.generate import parse

CHECKPOINT = "checkpoint=runs/demo"


def texts(prompts):
    """Of each prompt its texts and files, in order."""
    return [tuple(part.get("text", part.get("file")) for part in prompt["segments"]) for prompt in prompts]


def test_values_are_typed_and_text_is_kept():
    config, prompts = parse([CHECKPOINT, "prompt=a: {b}, [c] = 1.0", "cfg_scale=2", "temperature=0", "out=1", "seed=3"])
    assert texts(prompts) == [("a: {b}, [c] = 1.0",)]
    assert (config.cfg_scale, config.temperature, config.out, config.seed) == (2.0, 0.0, "1", 3)
    assert (config.top_p, config.steps, config.write) == (None, None, "")


def test_several_prompts(tmp_path):
    assert texts(parse([CHECKPOINT, "prompt=[a cat, 'b, c', 3]"])[1]) == [("a cat",), ("b, c",), ("3",)]
    (tmp_path / "prompts.txt").write_text("one\n\n two: 2 \n")
    assert texts(parse([CHECKPOINT, f"prompt=@{tmp_path}/prompts.txt"])[1]) == [("one",), (" two: 2 ",)]


def test_a_prompt_is_what_is_given_in_its_order(tmp_path):
    one, two = tmp_path / "a.png", tmp_path / "b.png"
    one.touch()
    two.touch()
    given = [CHECKPOINT, f"image={one}", "prompt=first", "seed=2", f"image={two}", "prompt=[x, y]"]
    assert texts(parse(given)[1]) == [(str(one), "first", str(two), last) for last in ("x", "y")]


def test_a_document_is_a_whole_prompt(tmp_path):
    (tmp_path / "a.png").touch()
    talk = {
        "segments": [{"type": "image", "file": "a.png", "role": "user"}, {"type": "text", "text": "?", "role": "user"}]
    }
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(talk))
    (prompt,) = parse([CHECKPOINT, f"document={path}"])[1]
    assert prompt["segments"][0] == {"type": "image", "file": str(tmp_path / "a.png"), "role": "user"}
    path.write_text(json.dumps([talk, talk]))
    assert len(parse([CHECKPOINT, f"document={path}"])[1]) == 2
    for content, said in (("{", "holds no document"), ('{"a": 1}', "holds no document"), ("[3]", "holds no document")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=said):
            parse([CHECKPOINT, f"document={path}"])
    path.write_text(json.dumps({"segments": [{"type": "image", "file": "b.png"}]}))
    with pytest.raises(ConfigError, match="b.png, which is no file"):
        parse([CHECKPOINT, f"document={path}"])
    with pytest.raises(ConfigError, match="is a whole prompt: leave out prompt="):
        parse([CHECKPOINT, f"document={path}", "prompt=x"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prompt=x"], r"checkpoint is not set: add checkpoint=DIR"),
        ([CHECKPOINT], r'Nothing to continue: add prompt="\.\.\.", image=FILE or document'),
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
        ([CHECKPOINT, "prompt=x", "write=video"], r"write=video must be text, image, several of them"),
        ([CHECKPOINT, "prompt=x", "write=text,auto"], r"write=text,auto must be text, image, several of them"),
        ([CHECKPOINT, "prompt=x", "mode=text_to_image"], r"mode=text_to_image is now written write=image\."),
        ([CHECKPOINT, "prompt=x", "mode=interleaved"], r"mode=interleaved is now written write=auto\."),
        ([CHECKPOINT, "prompt=[a, b]", "prompt=[c, d]"], r"only one of them may be a list"),
    ],
)
def test_mistakes(arguments, said):
    with pytest.raises(ConfigError, match=said) as error:
        parse(arguments)
    assert "\n" not in str(error.value)
