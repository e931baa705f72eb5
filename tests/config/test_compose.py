"""Every shipped configuration composes; every mistake is named in one sentence."""

from dataclasses import FrozenInstanceError, asdict, is_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_mm.config.compose import FAMILIES, Config, ConfigError, compose, from_dict_config, to_yaml
from megatron_mm.config.model import ChameleonConfig, TransfusionConfig, TrunkConfig
from megatron_mm.config.schema import SourceConfig
from megatron_mm.config.validate import validate

CONFIGS = Path(__file__).parents[2] / "configs"
GROUPS = [name for name, default in vars(Config()).items() if is_dataclass(default) and name != "model"]
MANDATORY = ["run.name=test", "data.path=data/none"]


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize("name", names("experiment"))
def test_experiment_composes_and_validates(name):
    config = compose([f"experiment={name}"])
    assert config.run.dir == f"runs/{config.run.name}" and config.checkpoint.save == f"{config.run.dir}/checkpoints"
    validate(config, config.parallel.model_parallel_size)


@pytest.mark.parametrize("name", names("model"))
def test_model_composes_and_validates(name):
    config = compose([f"model={name}", *MANDATORY])
    assert f"{name}_".startswith(f"{config.model.family}_")
    validate(config, config.parallel.model_parallel_size)


@pytest.mark.parametrize("group", GROUPS)
def test_default_mirrors_its_dataclass(group):
    written = OmegaConf.to_container(OmegaConf.load(CONFIGS / group / "default.yaml"), resolve=False)
    # The two folders that follow from the run's name are written in YAML only.
    derived = {"checkpoint": {"save": "${run.dir}/checkpoints"}, "run": {"dir": "runs/${run.name}"}}
    default = OmegaConf.to_container(OmegaConf.create(asdict(getattr(Config(), group))))  # tuples as lists
    assert written == default | derived.get(group, {})


@pytest.mark.parametrize("family", FAMILIES)
def test_family_base_mirrors_its_dataclass(family):
    assert OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / f"{family}.yaml")) == asdict(FAMILIES[family]())


def test_command_line_beats_experiment():
    config = compose(["experiment=demo", "train.train_iters=7", "model=chameleon_tiny", "optim.lr=1"])
    assert config.train.train_iters == 7 and config.optim.lr == 1.0 and type(config.optim.lr) is float
    assert isinstance(config.model, ChameleonConfig)


def test_left_out_keys_keep_the_family_default():
    model = from_dict_config(OmegaConf.create({"model": {"family": "chameleon", "trunk": {"num_layers": 2}}})).model
    assert model.trunk == TrunkConfig(num_layers=2, qk_layernorm=True)


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        compose(["experiment=demo"]).train.seed = 1


def test_yaml_round_trip():
    lists = ["optim.frozen=[front.*,*norm*]", "optim.lr_multipliers={*bias: 2, back.*: 0.5}"]
    lists += ["data.path=null", "data.sources=[{path: a, weight: 2, task: generation}, {path: b}]"]
    config = compose(["experiment=demo", "optim.lr=0.1234567890123", *lists])
    assert config.data.sources == (SourceConfig("a", 2.0, "generation"), SourceConfig("b"))
    assert config.optim.frozen == ("front.*", "*norm*") and config.optim.lr_multipliers == {"*bias": 2.0, "back.*": 0.5}
    assert from_dict_config(OmegaConf.create(to_yaml(config))) == config
    assert isinstance(config.model, TransfusionConfig)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "train.train_itres=3",
            r"train_itres is not a known key \(did you mean train\.train_iters\?\); keys of train",
        ),
        (
            "+train.train_itres=3",
            r"train_itres is not a known key \(did you mean train\.train_iters\?\); keys of train",
        ),
        ("model.trunk.layers=3", r"model\.trunk\.layers is not a known key \(did you mean model\.trunk\.num_layers"),
        ("trian.seed=3", r"trian is not a known key \(did you mean train\?\); groups: model, data"),
        ("+bogus=3", r"bogus is not a known key; groups: model"),
        ("model=transfusion_7", r"model=transfusion_7 does not exist \(did you mean model=transfusion_7b\?\); options"),
        ("experiment=dmo", r"experiment=dmo does not exist \(did you mean experiment=demo\?\)"),
        ("train.seed", r"'train\.seed': missing EQUAL.*written key=value"),
        ("train.seed=soon", r"train\.seed=soon must be a whole number\."),
        ("train.seed=1.5", r"train\.seed=1\.5 must be a whole number\."),
        ("train.seed=true", r"train\.seed=True must be a whole number\."),
        ("train.exit_interval=x", r"train\.exit_interval=x must be a whole number or null\."),
        ("train.seed=null", r"train\.seed=null must be a whole number\."),
        ("optim.lr=fast", r"optim\.lr=fast must be a number\."),
        ("parallel.sequence_parallel=1", r"parallel\.sequence_parallel=1 must be true or false\."),
        ("optim.frozen=front", r"optim\.frozen=front must be a list such as \[a, b\]\."),
        ("optim.frozen=[1,null]", r"optim\.frozen\[1\]=null must be text\."),
        ("optim.lr_multipliers=2", r"optim\.lr_multipliers=2 must be a mapping such as \{a: 1\}\."),
        ("optim.lr_multipliers={a: x}", r"optim\.lr_multipliers\.a=x must be a number\."),
        ("data.sources=[{weight: 2}]", r"data\.sources\[0\]\.path is not set: add it to the entry"),
        ("data.sources=[{path: a, wight: 2}]", r"data\.sources\[0\]\.wight is not a known key \(did you mean .*weight"),
        ("data.sources=[a]", r"data\.sources\[0\]=a must be a group with the keys path, weight, task"),
        ("data.path=[a,b]", r"data\.path=\['a', 'b'\] must be text or null\."),
        ("model.trunk=3", r"model\.trunk=3 must be a group with the keys num_layers"),
        ("model.family=gpt", r"model\.family=gpt is unknown; families: .*chameleon.*showo"),
        ("run.name=???", r"run\.name is not set: add run\.name=\.\.\. or choose an experiment"),
        ("run.dir=${nowhere}", r"cannot be resolved: Interpolation key 'nowhere' not found"),
    ],
)
def test_mistakes_are_one_sentence(override, said):
    with pytest.raises(ConfigError, match=said) as error:
        compose(["experiment=demo", override])
    assert "\n" not in str(error.value)
