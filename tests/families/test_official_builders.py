"""Documents of Show-o and MMaDA against the builders of the official code, restated densely.

Show-o: training/prompting_utils.py and models/modeling_showo.py of github.com/showlab/Show-o; MMaDA: the same files of
github.com/Gen-Verse/MMaDA and its `prepare_inputs_and_labels_for_*`. What they pad to a common length is cut off.
"""

from dataclasses import replace

import numpy as np
import pytest
from documents import lay_out

from megatron_mm import mask as masks
from megatron_mm.config.masked import MMaDAConfig, ShowoConfig
from megatron_mm.config.model import ImageConfig, TrunkConfig
from megatron_mm.data.shape import ImagePart, Shape, TextPart
from megatron_mm.families.mmada import MMaDA
from megatron_mm.families.showo import Showo
from megatron_mm.types import IGNORE, ImageSegment, Sample, TextSegment

SIZES = {"trunk": TrunkConfig(hidden_size=16), "image": ImageConfig(height=2, width=3), "image_codes": 32}
WORDS, ANSWER, CODES = [5, 6, 7], [8, 9], np.array([[3, 1, 4], [1, 5, 9]])


def sample(*segments, task="auto", uid=0):
    return Sample(uid, "s", segments, task=task)


def text(ids, loss=True):
    return TextSegment(np.array(ids), loss)


@pytest.fixture
def showo():
    return Showo(ShowoConfig(**SIZES, condition_dropout=0.0), 100)


@pytest.fixture
def mmada():
    return MMaDA(MMaDAConfig(**SIZES, condition_dropout=0.0, text_block=8), 100)


def codes_of(family):
    return (CODES.ravel() + family.vocab.image_start).tolist()


def t2i_prompt(family, words):
    """`t2i_prompt`, and `lvg_prompt`, which is the same: [T2I BOS text EOS] [BOI codes EOI]."""
    v = family.vocab
    return [v.special["t2i"], v.bos, *words, v.eos, v.boi, *codes_of(family), v.eoi]


def predict_next_mask(sequence, boi, eoi):
    """`create_attention_mask_predict_next` where nothing is padded: text is causal, BOI to EOI see all of a row."""
    n = len(sequence)
    starts, ends = np.array(sequence) == boi, np.array(sequence) == eoi
    inside = (starts.cumsum() > ends.cumsum()) | starts | ends
    seen = np.tri(n, dtype=bool)
    seen[inside] = True
    return seen


def mmu_mask(sequence, eoi):
    """`create_attention_mask_for_mmu`: causal, and everyone sees up to EOI."""
    seen = np.tri(len(sequence), dtype=bool)
    seen[:, : sequence.index(eoi) + 1] = True
    return seen


def unmasked(family, document):
    """Its tokens with labels in the place of masks, and where those stand."""
    hidden = document.tokens == family.mask_id
    return np.where(hidden, document.fields["labels"], document.tokens).tolist(), hidden


@pytest.mark.parametrize("words", [WORDS, []])
def test_showo_text_to_image(showo, words):
    parts = [text(words)] * bool(words) + [ImageSegment(CODES)]
    document = lay_out(showo, sample(*parts, task="generation"))
    sequence, hidden = unmasked(showo, document)
    assert sequence == t2i_prompt(showo, words)
    np.testing.assert_array_equal(
        masks.dense(document.mask), predict_next_mask(sequence, showo.vocab.boi, showo.vocab.eoi)
    )
    # mask_or_random_replace_tokens: labels are codes where they are masked, ignored elsewhere; logits are not shifted
    labels = np.where(hidden, sequence, IGNORE)
    assert document.fields["labels"].tolist() == labels.tolist() and hidden.any()
    inside = np.isin(np.arange(len(sequence)), np.arange(len(sequence) - 7, len(sequence) - 1))
    assert not hidden[~inside].any()


def test_showo_language(showo):
    document = lay_out(showo, sample(text(WORDS)))
    sequence = [showo.vocab.bos, *WORDS, showo.vocab.eos]
    assert document.tokens.tolist() == sequence
    assert document.fields["labels"].tolist() == [*sequence[1:], IGNORE], "logits[:-1] against labels[1:]"
    np.testing.assert_array_equal(masks.dense(document.mask), np.tri(len(sequence), dtype=bool))


@pytest.mark.parametrize("question", [[], WORDS])
def test_showo_understanding(showo, question):
    v = showo.vocab
    parts = [ImageSegment(CODES, loss=False), *([text(question, loss=False)] if question else []), text(ANSWER)]
    document = lay_out(showo, sample(*parts))
    sequence = [v.special["mmu"], v.boi, *codes_of(showo), v.eoi, v.bos, *question, *ANSWER, v.eos]
    assert document.tokens.tolist() == sequence
    # mmu_prompt ignores all up to EOI, and then shifts; that BOS is then predicted at EOI is the code's own, not here
    shifted = [IGNORE] * (9 + len(question)) + [*ANSWER, v.eos, IGNORE]
    assert document.fields["labels"].tolist() == shifted
    np.testing.assert_array_equal(masks.dense(document.mask), mmu_mask(sequence, v.eoi))


def test_mmada_text_to_image(mmada):
    document = lay_out(mmada, sample(text(WORDS), ImageSegment(CODES), task="generation"))
    sequence, hidden = unmasked(mmada, document)
    assert sequence == t2i_prompt(mmada, WORDS)
    assert hidden[-7:-1].any() and not hidden[:-7].any() and not hidden[-1]
    assert (document.fields["weight"][hidden] == 1).all() and document.mask[1].tolist() == [len(sequence)] * 14


def answer_of(family, document, prompt):
    """What `prepare_inputs_and_labels_for_mmu` and `_chat` say of it: (p, that every mask weighs 1 / p / length)."""
    sequence, hidden = unmasked(family, document)
    length = len(sequence) - prompt
    assert not hidden[:prompt].any(), "prompts are never masked"
    assert document.fields["labels"].tolist() == np.where(hidden, sequence, IGNORE).tolist()
    (weight,) = set(document.fields["weight"][hidden].tolist())
    return sequence, hidden, 1 / (weight * length)


def masked_documents(family, *segments):
    """Some documents of one sample in which anything is masked."""
    documents = [lay_out(family, sample(*segments, uid=uid)) for uid in range(60)]
    return [document for document in documents if (document.tokens == family.mask_id).any()]


def test_mmada_language(mmada):
    """`prepare_inputs_and_labels_for_text`: each token masked with p, weight 1 / p, over all tokens."""
    shares = []
    for document in masked_documents(mmada, text(WORDS * 20)):
        sequence, hidden = unmasked(mmada, document)
        assert sequence == [mmada.vocab.bos, *WORDS * 20, mmada.vocab.eos] and not hidden[0]
        (weight,) = set(document.fields["weight"][hidden].tolist())
        shares.append(hidden[1:].mean() * weight)
        assert (document.fields["counted"] == 1).sum() == len(sequence) - 1
    assert abs(np.median(shares) - 1) < 0.15, "as many are masked as p says"


@pytest.mark.parametrize("asked", [["text"], ["image"], ["image", "text"]])
def test_mmada_answers(mmada, asked):
    """`lm_chat_prompt` and `mmu_prompt`: what is asked is never masked, EOS fills the answer up (here to a block), and
    a loss is divided by p and by the answer's length, EOS included."""
    v = mmada.vocab
    given = {"text": text(WORDS, loss=False), "image": ImageSegment(CODES, loss=False)}
    head = [v.special["mmu"], v.boi, *codes_of(mmada), v.eoi, v.bos] if "image" in asked else [v.bos]
    head += WORDS * ("text" in asked)
    shares = []
    for document in masked_documents(mmada, *(given[kind] for kind in asked), text(ANSWER)):
        sequence, hidden, p = answer_of(mmada, document, len(head))
        assert sequence == [*head, *ANSWER, *[v.eos] * 6]
        assert document.mask[1].tolist() == [len(sequence)] * len(sequence)
        shares.append(hidden[len(head) :].mean() - p)
        counted = document.fields["counted"]
        assert (counted >= 0).sum() == 1 and counted[len(head)] == (2 if "image" in asked else 3)
    assert abs(np.mean(shares)) < 0.1


def test_mmada_text_and_image_as_one_answer(mmada):
    """`r2i_prompt`, EOS up to a block in place of `max_text_len`; and of `forward_process_with_r2i` that a mask weighs
    1 / p / length of the whole answer, EOS and codes included. BOI and EOI are given, as its `prompt_mask` says."""
    family = MMaDA(replace(mmada.config, r2i_share=1.0, r2i_weight=0.5), 100)
    v, terms = family.vocab, [term.name for term in family.terms]
    head = [v.special["r2i"], v.bos, *WORDS]
    answer = [*ANSWER, *[v.eos] * 6]
    given = np.array([True] * len(head) + [False] * len(answer) + [True] + [False] * 6 + [True])
    assert (v.special["r2i"], v.size) == (mmada.vocab.size, mmada.vocab.size + 1), "no other id moves"
    shares = []
    for document in masked_documents(family, text(WORDS, loss=False), text(ANSWER), ImageSegment(CODES)):
        sequence, hidden = unmasked(family, document)
        assert sequence == [*head, *answer, v.boi, *codes_of(family), v.eoi]
        assert not hidden[given].any() and document.mask[1].tolist() == [len(sequence)] * len(sequence)
        assert document.fields["labels"].tolist() == np.where(hidden, sequence, IGNORE).tolist()
        (weight,) = set(document.fields["weight"][hidden].tolist())
        shares.append(hidden[~given].mean() - 1 / (weight * (~given).sum()))
        counted = document.fields["counted"]
        assert (counted >= 0).sum() == 1 and counted[len(head)] == terms.index("r2i")
    assert abs(np.mean(shares)) < 0.1 and dict(family.weights())["r2i"] == 0.5


def test_mmada_answers_with_text_or_image_otherwise(mmada):
    """A share of such documents, and no others, teach both at once."""
    family = MMaDA(replace(mmada.config, r2i_share=0.25), 100)
    given, learnt, image = TextPart(0, 3, loss=False), TextPart(1, 2), ImagePart(2, 2, 3)
    asked = family.choices(Shape((given, learnt, image)))
    assert [(weight, shape.task) for weight, shape in asked if weight] == [
        (0.25, "r2i"),
        (0.375, "auto"),
        (0.375, "auto"),
    ]
    for parts in ([given, image], [learnt, image], [learnt, given, image], [given, learnt, image, TextPart(3, 2)]):
        assert all(shape.task == "auto" for _, shape in family.choices(Shape(tuple(parts))))


def test_condition_dropout_is_an_empty_caption(showo, mmada):
    """`t2i_prompt` puts [T2I BOS EOS] in its place."""
    for family in (showo, mmada):
        dropped = type(family)(replace(family.config, condition_dropout=1.0), 100)
        document = lay_out(dropped, sample(text(WORDS), ImageSegment(CODES), task="generation"))
        assert unmasked(dropped, document)[0] == t2i_prompt(dropped, [])
