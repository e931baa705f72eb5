"""Nothing is sampled in a layout that was never trained: the table in docs/families.md, cell by cell."""

from pathlib import Path

import pytest
from tiny_models import config_for

from megatron_mm.data.shape import ImagePart, Shape, TextPart
from megatron_mm.documents.spans import Span, cut
from megatron_mm.families.registry import build_family
from megatron_mm.sampling.generation import SAMPLERS, refusal

DATA = {"captions": ["TI"], "counting": ["TITI", "TITITI", "ITI", "ITITI"], "questions": ["tT", "itT"]}
"""Documents of MNIST and of `questions`: capitals may be learnt."""
COMBINATIONS = {
    "text → text": ("t", "t"),
    "image → text": ("i", "t"),
    "text → image": ("t", "i"),
    "image, text → image": ("it", "i"),
    "image, text → image, text": ("it", "it"),
}
FAMILIES = sorted(SAMPLERS)


def shape(letters, image, given=0):
    parts = [
        TextPart(n, 3, loss=kind == "T" or n >= given > 0)
        if kind in "tT"
        else ImagePart(n, image.height, image.width, loss=kind == "I")
        for n, kind in enumerate(letters)
    ]
    return Shape(tuple(parts))


def signature(items):
    """What stands in a prompt, whatever its size, role and noise; texts that follow one another are one."""
    found = []
    for item in items:
        if not isinstance(item, Span):
            found.append(("together", *signature(item.items)))
            continue
        what = (item.token,) if item.token is not None else (item.grid, item.encoded)
        if what != (None, False) or found[-1:] != [what]:
            found.append(what)
    return tuple(found)


def openings_in_training(family, letters):
    """(kind, signature of what stands before it) of every part that some choice of a document learns."""
    found = set()
    for weight, choice in family.choices(shape(letters, family.config.image)):
        items = family.spans(choice)
        for part in choice.parts if weight else ():
            image = isinstance(part, ImagePart)
            if not (part.drawn if image else part.loss):
                continue
            before, _ = cut(items, part.source)
            found.add(("i" if image else "t", signature(before)))
            if not image:  # a text may be continued at each of its tokens
                found.add(("t", signature([*before, Span(3, source=part.source)])))
    return found


def opening(family, context, kind):
    """The same of sampling, behind a context of which the last part may have been written."""
    letters = context + kind
    parts = list(shape(letters, family.config.image, given=len(context)).parts)
    if kind == "i":
        parts[-1] = ImagePart(len(context), family.config.image.height, family.config.image.width, drawn=True)
    before, _ = cut(family.spans(Shape(tuple(parts))), len(context))
    return kind, signature(before)


def taught_by(family, prompt, write):
    """The data that teach every step of it."""
    wanted = {opening(family, prompt + write[:n], write[n]) for n in range(len(write))}
    taught = {name: {o for d in kinds for o in openings_in_training(family, d)} for name, kinds in DATA.items()}
    by = [name for name, found in taught.items() if wanted & found]
    return ", ".join(by) if wanted <= {o for name in by for o in taught[name]} else None


def table():
    """(family, combination) -> cell."""
    text = (Path(__file__).parents[2] / "docs/families.md").read_text()
    rows = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("|")]
    first = next(number for number, row in enumerate(rows) if "text → text" in row)
    head, body = rows[first], rows[first + 2 : first + 2 + len(FAMILIES)]
    return {(row[0].strip("`"), name): cell for row in body for name, cell in zip(head, row, strict=True)}


class Model:
    def __init__(self, family):
        self.family = family


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_says_what_is_trained(name, tmp_path):
    family = build_family(config_for(name, tmp_path).model, 256)
    for combination, (prompt, write) in COMBINATIONS.items():
        kinds = ["image" if kind == "i" else "text" for kind in write]
        refused = refusal(Model(family), kinds)
        taught = None if refused else taught_by(family, prompt, write)
        expected = "no: it draws no images" if refused else taught
        assert table()[name, combination] == expected, (name, combination)
