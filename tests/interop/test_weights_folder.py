"""Which files of a folder are a model's, and what they hold."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_mm.interop.safetensors_folder import WeightsFolder

HEAD, NORM = torch.arange(6.0).view(2, 3), torch.ones(3)


def write(path, **tensors):
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)


def write_index(folder, kind, **files):
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def test_weights_in_torch_s_own_files_are_read(tmp_path):
    torch.save({"a": torch.arange(3), "b": torch.ones(2, 2).bfloat16()}, tmp_path / "pytorch_model.bin")
    weights = WeightsFolder(tmp_path)
    assert list(weights) == ["a", "b"] and weights["a"].tolist() == [0, 1, 2] and weights["b"].dtype == torch.bfloat16
    (tmp_path / "pytorch_model.bin").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read .*download it again") as error:
        WeightsFolder(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_tensor_in_two_files_is_refused(tmp_path, kind):
    write(tmp_path / f"model.{kind}", head=HEAD, norm=NORM)
    write(tmp_path / f"stray.{kind}", head=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=rf"/model\.{kind} and .*/stray\.{kind} both hold head: remove"):
        WeightsFolder(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_says_which_files_belong(tmp_path, kind, caplog):
    write(tmp_path / f"model-1.{kind}", head=HEAD)
    write(tmp_path / f"model-2.{kind}", norm=NORM, head=torch.zeros(2, 3))  # the index places head in the other
    write(tmp_path / f"stray.{kind}", head=torch.zeros(2, 3), more=NORM)
    write_index(tmp_path, kind, head=f"model-1.{kind}", norm=f"model-2.{kind}")
    weights = WeightsFolder(tmp_path)
    assert weights.keys() == {"head", "norm"} and torch.equal(weights["head"], HEAD)
    assert caplog.messages == [f"{next(tmp_path.glob('*.index.json'))} does not name stray.{kind}: left out"]


def test_a_file_that_the_index_names_must_be_there(tmp_path):
    write(tmp_path / "model-1.safetensors", head=HEAD)
    write_index(tmp_path, "safetensors", head="model-1.safetensors", norm="model-2.safetensors")
    with pytest.raises(
        ValueError, match=r"model-2\.safetensors is missing, which model\.safetensors\.index\.json names"
    ):
        WeightsFolder(tmp_path)
    write(tmp_path / "model-2.safetensors", bias=NORM)
    with pytest.raises(ValueError, match=r"model-2\.safetensors lacks norm, which the index places there"):
        WeightsFolder(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {"head": "../model.safetensors"}}', "not JSON"])
def test_a_damaged_index_is_named(tmp_path, content):
    write(tmp_path / "model.safetensors", head=HEAD)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"model\.safetensors\.index\.json (holds no|has no weight_map|is not JSON)"
    ) as error:
        WeightsFolder(tmp_path)
    assert "\n" not in str(error.value)
