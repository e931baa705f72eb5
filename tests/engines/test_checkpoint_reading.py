"""A checkpoint from somebody else runs nothing, wherever it is read; what is no data ends in one sentence."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_mm.config.schema import ParallelConfig
from megatron_mm.engines.derived import checkpoint_config
from megatron_mm.engines.format import FORMAT, common_state, resolve
from megatron_mm.engines.reading import CheckpointError, read_common, read_shapes, read_tensors
from megatron_mm.engines.weights import load_weights
from megatron_mm.engines.whole_weights import load_whole_weights, save_whole_weights
from megatron_mm.parallel.distributed import process_groups

NAME = "back.head.weight"
REFUSED = r"iter_0000000 is refused: reading {} in it may run code, which no checkpoint needs\. Load one whose origin"


class Command:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


def in_a_job(fn, *args):
    (result,) = run_ranks(_in_a_job, 1, fn, *args)
    return result


def _in_a_job(init_kwargs, fn, *args):
    with process_groups(ParallelConfig(), 0, torch.device("cpu"), **init_kwargs):
        return fn(*args)


def _save(folder: Path) -> None:
    save_whole_weights(folder, [(NAME, torch.arange(12.0).view(3, 4))], "run: {name: mine}")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    in_a_job(_save, folder)
    return folder


@pytest.fixture
def checkpoint(written, tmp_path) -> Path:
    """The iter_* folder of a checkpoint of one weight."""
    shutil.copytree(written, tmp_path / "checkpoints")
    return resolve(tmp_path / "checkpoints")


@pytest.fixture
def ran(tmp_path) -> Path:
    """What a command would make."""
    return tmp_path / "ran"


class Model:
    """What `load_weights` needs of a model chunk."""

    def sharded_state_dict(self) -> dict:
        return {NAME: ShardedTensor.from_rank_offsets(NAME, torch.empty(3, 4))}


def _load_weights(folder: Path) -> None:
    load_weights([Model()], folder)


def index_of(checkpoint: Path):
    return pickle.loads((checkpoint / ".metadata").read_bytes())


def test_our_own_is_read(checkpoint):
    assert read_common(checkpoint)["config"] == "run: {name: mine}"
    assert read_shapes(checkpoint)[NAME].global_shape == (3, 4)
    assert in_a_job(load_whole_weights, checkpoint)[NAME].equal(torch.arange(12.0).view(3, 4))


@pytest.mark.parametrize("read", [read_shapes, load_whole_weights, _load_weights])
@pytest.mark.parametrize("hidden", [False, True], ids=["whole", "inside"])
def test_an_index_runs_nothing(read, hidden, checkpoint, ran):
    index = index_of(checkpoint)
    index.planner_data = Command(ran)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index if hidden else Command(ran)))
    with pytest.raises(CheckpointError, match=REFUSED.format(r"posix\.system")):
        read(checkpoint)
    assert not ran.exists()


@pytest.mark.parametrize("forced", [False, True], ids=["", "weights-only-off"])
@pytest.mark.parametrize("read", [common_state, checkpoint_config])
def test_plain_values_run_nothing(read, forced, checkpoint, ran, monkeypatch):
    if forced:  # torch's own switch, which some containers set
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"config": Command(ran)}, checkpoint / "common.pt")
    with pytest.raises(CheckpointError, match=REFUSED.format(r"posix\.system")):
        read(checkpoint)
    assert not ran.exists()


def read_in_a_job(checkpoint: Path) -> str:
    """The sentence with which reading its tensors ends."""

    def attempt() -> str:
        try:
            load_whole_weights(checkpoint)
        except CheckpointError as error:
            return str(error)
        return "loaded"

    return in_a_job(attempt)


def test_tensors_run_nothing(checkpoint, ran):
    index = index_of(checkpoint)
    (data,) = checkpoint.glob("*.distcp")
    torch.save(Command(ran), data)
    for info in index.storage_data.values():
        info.offset, info.length = 0, data.stat().st_size
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    said = read_in_a_job(checkpoint)
    assert "is refused: reading posix.system in it" in said and "\n" not in said
    assert not ran.exists()


def test_an_object_in_place_of_a_tensor_runs_nothing(checkpoint, ran):
    """torch unpickles objects without any care, and the index says what is one: here with a shape, as a tensor has."""
    index = index_of(checkpoint)
    disguised = BytesStorageMetadata()
    disguised.size = index.state_dict_metadata[NAME].size
    disguised.properties = index.state_dict_metadata[NAME].properties
    index.state_dict_metadata[NAME] = disguised
    (data,) = checkpoint.glob("*.distcp")
    torch.save(Command(ran), data)
    (info,) = index.storage_data.values()
    info.offset, info.length = 0, data.stat().st_size
    index.storage_data = {type(next(iter(index.storage_data)))(NAME): info}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))

    def attempt() -> str:
        try:
            read_tensors({NAME: ShardedTensor.from_rank_offsets(NAME, torch.empty(3, 4))}, checkpoint)
        except CheckpointError as error:
            return str(error)
        return "loaded"

    said = in_a_job(attempt)
    assert f"is refused: reading {NAME} in it may run code" in said and "\n" not in said
    assert not ran.exists()


@pytest.mark.parametrize(
    ("file", "content"), [(".metadata", b"no pickle"), (".metadata", pickle.dumps([])), ("common.pt", b"no archive")]
)
def test_what_is_no_checkpoint_is_named(file, content, checkpoint):
    (checkpoint / file).write_bytes(content)
    read = read_common if file == "common.pt" else read_shapes
    with pytest.raises(CheckpointError, match=r"iter_0000000 is corrupt: .+\. Load an older iter_\* folder\.$"):
        read(checkpoint)


def test_a_later_format_is_refused_and_the_first_one_read(checkpoint):
    common = read_common(checkpoint)
    assert "format_version" not in common and common_state(checkpoint).keys() == common.keys()
    torch.save({**common, "format_version": FORMAT + 1}, checkpoint / "common.pt")
    with pytest.raises(CheckpointError, match=f"has format {FORMAT + 1}, of a later megatron_mm; .* up to {FORMAT}"):
        common_state(checkpoint)
