"""Drawing the next token."""

import numpy as np
import pytest
import torch

from megatron_mm.config.model import VocabularyConfig
from megatron_mm.documents.vocabulary import Vocabulary
from megatron_mm.sampling.text import Next, choose, grammar, penalise

CPU = torch.device("cpu")


def drawn(probabilities, count=1000, temperature=1.0, top_p=1.0, allowed=None):
    """How often each id is drawn when the uniforms are spread evenly: its probability, exactly."""
    logits = torch.tensor(probabilities).log().expand(count, -1)
    allowed = torch.tensor([True] * len(probabilities) if allowed is None else allowed).expand(count, -1)
    uniforms = torch.tensor((np.arange(count) + 0.5) / count)
    return np.bincount(choose(logits, allowed, uniforms, temperature, top_p), minlength=len(probabilities)) / count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.2, 0.5, 0.05, 0.25]),
        ({"temperature": 0.5}, [0.04 / 0.355, 0.25 / 0.355, 0.0025 / 0.355, 0.0625 / 0.355]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"top_p": 0.7}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.8}, [0.2 / 0.95, 0.5 / 0.95, 0, 0.25 / 0.95]),
        ({"top_p": 0.0}, [0, 1, 0, 0]),
        ({"allowed": [True, False, True, False]}, [0.8, 0, 0.2, 0]),
        ({"allowed": [True, False, True, False], "temperature": 0}, [1, 0, 0, 0]),
        ({"allowed": [False, False, True, False], "top_p": 0.1}, [0, 0, 1, 0]),
    ],
)
def test_frequencies(options, expected):
    np.testing.assert_allclose(drawn([0.2, 0.5, 0.05, 0.25], **options), expected, atol=1.5e-3)


def test_extreme_draws_stay_inside():
    logits = torch.zeros(2, 300)
    allowed = torch.zeros(2, 300, dtype=torch.bool)
    allowed[:, 5:250] = True
    uniforms = torch.tensor([0.0, np.nextafter(1, 0)], dtype=torch.float64)
    ids = choose(logits, allowed, uniforms, 1.0, 1.0)
    assert ids.tolist() == [5, 249]


def test_repetition_penalty():
    logits = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    penalised = penalise(logits, [[0, 1, 1], []], 2.0)
    assert penalised.tolist() == [[1.0, -4.0, 1.0], [2.0, -2.0, 1.0]]
    assert logits[0].tolist() == [2.0, -2.0, 1.0]


def test_grammar_behind_the_text():
    vocab = Vocabulary.after_text(10, image_codes=4)
    ids = [set(row.nonzero()[:, 0].tolist()) for row in grammar(vocab, 128, CPU)]
    text = {*range(10), vocab.eos}
    assert ids == [text, text | {vocab.boi}]


def test_grammar_of_a_converted_vocabulary():
    """Specials and codes that lie among the tokenizer's entries are no text."""
    ids = VocabularyConfig(pad=1, bos=0, eos=2, boi=9, eoi=8, image_start=4)
    allowed = grammar(Vocabulary.at(ids, 12, 3, 12), 12, CPU)
    assert allowed[Next.TEXT].nonzero()[:, 0].tolist() == [2, 3, 7, 10, 11]
