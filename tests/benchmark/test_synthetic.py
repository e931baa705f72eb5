"""Drawn batches are what a run would train on: packed documents with images, the same every time."""

import pytest
import torch
from documents import label_counts

from megatron_mm.benchmark.synthetic import synthetic_steps
from megatron_mm.config.compose import compose
from megatron_mm.families.registry import build_family
from megatron_mm.mask import validate


def draw(family: str, *overrides: str, count: int = 2):
    options = ["run.name=test", "data.path=none", "data.seq_length=1024", "train.global_batch_size=4"]
    config = compose([f"model={family}_tiny", *options, "train.micro_batch_size=2", *overrides])
    built = build_family(config.model, text_vocab_size=100)
    return built, synthetic_steps(config, built, 100, count)


@pytest.mark.parametrize("name", ["transfusion", "chameleon", "janus"])
def test_batches_of_real_masks(name):
    family, steps = draw(name)
    assert [len(step) for step in steps] == [2, 2]
    batches = [batch for step in steps for batch in step]
    for batch in batches:
        assert batch.tokens.shape == (2, 1024) and int(batch.tokens.max()) < family.vocab.size
        for row in batch.mask.numpy():
            validate(row)
    tokens = sum(batch.real_tokens for batch in batches)
    assert tokens > 0.9 * sum(batch.tokens.numel() for batch in batches), "rows are well filled"
    images = sum(int(h * w) for batch in batches for _, _, h, w in batch.images)
    assert 0.1 < images / tokens < 0.9, "both kinds of tokens"
    assert all(sum(count > 0 for count in label_counts(family, batch).values()) == 2 for batch in batches)
    again = [batch for step in draw(name)[1] for batch in step]
    assert all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.meta, b.meta) for a, b in zip(batches, again, strict=True)
    )
    assert not torch.equal(batches[0].tokens, batches[1].tokens)


def test_a_row_that_holds_nothing_is_refused():
    with pytest.raises(ValueError, match="data.seq_length=3: an image alone takes 53 positions"):
        draw("transfusion", "data.seq_length=3")
