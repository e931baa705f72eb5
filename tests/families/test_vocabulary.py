"""Where ids stand: our own arrangement, and a converted model's."""

from dataclasses import replace

import pytest
import torch

from megatron_mm.config.masked import MaskedVocabularyConfig, MMaDAConfig, ShowoConfig
from megatron_mm.config.model import ChameleonConfig, VocabularyConfig
from megatron_mm.documents.vocabulary import Vocabulary
from megatron_mm.families.chameleon import Chameleon
from megatron_mm.families.mmada import MMaDA
from megatron_mm.families.showo import Showo
from megatron_mm.sampling.text import grammar

IDS = VocabularyConfig(pad=1, bos=0, eos=2, boi=20, eoi=19, image_start=4)


def test_given_ids_are_used():
    vocab = Chameleon(ChameleonConfig(vocabulary=IDS, image_codes=15, vocab_size=300), 256).vocab
    assert vocab == Vocabulary(
        text_size=256, pad=1, bos=0, eos=2, boi=20, eoi=19, image_start=4, image_codes=15, size=300
    )


@pytest.mark.parametrize(("family", "config"), [(Showo, ShowoConfig), (MMaDA, MMaDAConfig)])
def test_masked_families_have_ids_of_their_own(family, config):
    """MASK among the text tokenizer's entries; one id begins and ends a text, as Phi's does."""
    ids = MaskedVocabularyConfig(**(vars(IDS) | {"bos": 2}), t2i=21, mmu=22, mask=50)
    built = family(config(vocabulary=ids, image_codes=15, vocab_size=300), 256)
    assert built.mask_id == 50 and built.vocab.bos == built.vocab.eos == 2
    assert built.vocab.special == {"t2i": 21, "mmu": 22, "mask": 50}
    text, _ = grammar(built.vocab, 384, torch.device("cpu"))
    assert not text[[1, 19, 20, 21, 22, 50]].any() and text[2], "EOS is BOS, and may follow"
    assert int(text.sum()) == 256 - 6 - 15
    with pytest.raises(ValueError, match=r"but for model\.vocabulary\.mask: set all"):
        family(config(vocabulary=replace(ids, mask=None), image_codes=15, vocab_size=300), 256)


def test_without_ids_everything_stands_behind_the_text():
    vocab = Chameleon(ChameleonConfig(image_codes=15), 256).vocab
    assert vocab == Vocabulary.after_text(256, 15)
    assert [vocab.pad, vocab.bos, vocab.eos, vocab.boi, vocab.eoi, vocab.image_start] == list(range(256, 262))


@pytest.mark.parametrize(
    ("ids", "size", "message"),
    [
        (
            replace(IDS, eoi=None, image_start=None),
            300,
            r"but for model\.vocabulary\.eoi, model\.vocabulary\.image_start",
        ),
        (IDS, None, r"model\.vocab_size must be too"),
        (IDS, 255, r"vocab_size=255 is too small .* raise it to 256"),
        (replace(IDS, boi=300), 300, "raise it to 301"),
        (replace(IDS, image_start=290), 300, "raise it to 305"),
        (replace(IDS, boi=18), 300, "among its 15 image codes"),
        (replace(IDS, boi=2), 300, "has an id twice"),
        (replace(IDS, pad=2, bos=2), 300, "has an id twice"),
        (MaskedVocabularyConfig(**vars(IDS), t2i=21, mmu=22, mask=7), 300, "among its 15 image codes"),
    ],
)
def test_contradictions_are_named(ids, size, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary.at(ids, 256, 15, size)
