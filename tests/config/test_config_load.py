"""Loading settings from files and command line; each error is one line with key, value and what to do."""

import dataclasses
import errno
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evocomp.arguments import parse
from evocomp.config import load as files
from evocomp.config.load import load, shipped, to_dict, to_yaml
from evocomp.config.options import settings as all_settings
from evocomp.config.schema import RunConfig
from evocomp.log import UserError


@pytest.fixture
def yaml(tmp_path):
    def write(text: str, name: str = "a.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def leaves(cls=RunConfig, prefix: str = "") -> dict[str, type]:
    """Dotted key -> annotated type, found by dataclasses alone."""
    found = {}
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(kind):
            found |= leaves(kind, f"{prefix}{field.name}.")
        else:
            found[f"{prefix}{field.name}"] = kind
    return found


def value(config, key: str):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def refused(*settings: str, match: str, config=()) -> str:
    with pytest.raises(UserError, match=match) as caught:
        load(config, list(settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------ order of sources


def test_later_sources_win(yaml):
    first = yaml("seed: 1\ndata: {max_samples: 10, max_bad: 3}\n", "1.yaml")
    second = yaml("seed: 2\ndata:\n  max_samples: 20\n", "2.yaml")
    config = load([first, second], ["data.max_samples=30"])
    assert (config.seed, config.data.max_samples, config.data.max_bad) == (2, 30, 3)
    assert config.search == RunConfig().search


def test_no_source_gives_the_defaults():
    assert load() == RunConfig()


def test_files_and_command_line_override_the_recipe(yaml):
    published = load([], ["recipe=published"])
    assert (published.labels.target, published.labels.refresh, published.loss.name) == ("hard", "search", "ghm_cs")
    assert not published.compressor.budget_input and published.optim.ema == 0
    assert published.search == RunConfig().search, "Algorithm 1 is the default search of both"
    # a setting in a file overrides the recipe, wherever the recipe is named
    file = yaml("labels: {refresh: none}\noptim: {ema: 0.9}\n")
    mixed = load([file], ["recipe=published"])
    assert (mixed.labels.refresh, mixed.optim.ema, mixed.labels.target) == ("none", 0.9, "hard")
    # the last named recipe applies
    assert load([yaml("recipe: published\n", "p.yaml")], ["recipe=plus"]) == RunConfig()
    refused("recipe=nonsense", match="recipe.*nonsense")


@pytest.mark.parametrize(
    "words",
    [["--seed=3", "--data.max_bad=4"], ["--seed", "3", "--data.max_bad", "4"], ["seed=3", "data.max_bad=4"]],
)
def test_settings_may_be_written_in_three_ways(words):
    asked = parse(["config", *words])
    config = load(asked.config, asked.settings)
    assert (config.seed, config.data.max_bad) == (3, 4)


def test_the_command_line_is_split_into_files_and_settings():
    words = ["--config", "a", "--config=b", "--labels.overwrite", "--run_dir", "x=y", "seed=1"]
    asked = parse(["config", *words, "--trainer.devices", "2", "--seed", "2"])
    assert asked.config == ["a", "b"]
    assert asked.settings == ("labels.overwrite=true", "run_dir=x=y", "seed=1", "trainer.devices=2", "seed=2")
    with pytest.raises(UserError, match="unexpected argument stray; write options as --key=value"):
        parse(["config", "stray"])


def test_the_config_is_frozen_and_plain():
    config = load([], ["trainer.max_epochs=2", "eval.kept=[4,8]"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3
    assert type(config) is RunConfig and type(config.trainer) is dict and tuple(config.eval.kept) == (4, 8)


def test_the_trainer_section_is_open():
    config = load([], ["trainer.max_epochs=2", "trainer.strategy=ddp", "trainer.precision=bf16-mixed"])
    assert config.trainer == {"max_epochs": 2, "strategy": "ddp", "precision": "bf16-mixed"}


def test_references_are_resolved_once(yaml):
    config = load([yaml("run_dir: runs/${recipe}-${seed}\n")], ["seed=5"])
    assert config.run_dir == "runs/plus-5"
    refused("run_dir=${nowhere}", match="run_dir.*nowhere.* not found")


@settings(max_examples=25)
@given(
    st.integers(0, 2**31),
    st.text("abcXYZ/_-. ", min_size=1).filter(str.strip),
    st.lists(st.integers(1, 500), min_size=1, max_size=5),
    st.floats(1e-9, 1.0),
    st.booleans(),
)
def test_what_is_saved_loads_as_the_same_config(tmp_path_factory, seed, run_dir, kept, lr, relation):
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    settings = [f"seed={seed}", f"eval.kept={kept}", f"optim.lr={lr!r}", f"data.relation={relation}"]
    config = dataclasses.replace(load([], settings), run_dir=run_dir)
    files.save(config, path)
    again = load([path])
    assert to_dict(again) == to_dict(config) and again.run_dir == run_dir
    assert again.seed == seed and again.optim.lr == lr and list(again.eval.kept) == kept
    assert to_yaml(again) == path.read_text()


# ------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("data.max_sample=5", "data.max_samples"),
        ("max_samples=5", "data.max_samples"),
        ("sed=5", "seed"),
        ("search.generation=5", "search.generations"),
        ("data.max_samples.x=3", "data.max_samples"),
        ("labels={dirr: x}", "labels.dir"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(setting, hint, yaml):
    refused(setting, match=f"command line: unknown setting .*; did you mean {hint}\\?")


def test_unknown_keys_in_files_are_named_with_the_file(yaml):
    path = yaml("data:\n  max_sample: 3\n")
    refused(config=[path], match=f"{path}: unknown setting data.max_sample; did you mean data.max_samples\\?")
    path = yaml("zzzzqqq: 3\n")
    refused(config=[path], match="unknown setting zzzzqqq; evocomp config lists them")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed=x", ["seed", "'x'", "Integer"]),
        ("seed=1.5", ["seed", "1.5", "Integer"]),
        ("data.relation=maybe", ["data.relation", "maybe"]),
        ("loss.name=ghm_sc", ["loss.name", "ghm_sc", "ghm_cs", "bce"]),
        ("eval.kept=[4,x]", ["eval.kept", "integer"]),
        ("eval.kept=4", ["eval.kept"]),
        ("data=3", ["data", "3"]),
        ("trainer=3", ["trainer"]),
        ("model.name=null", ["model.name"]),
    ],
)
def test_wrong_types_name_key_and_value(setting, words):
    message = refused(setting, match="^command line: ")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (["search.population=5"], "search.population=5 is smaller than search.parents=12: raise the population or"),
        (["search.parents=0"], "search.parents=0: must be at least 1"),
        (["search.mutation=1.5"], r"search.mutation=1.5: must lie in \[0, 1\]"),
        (["search.generations=-1"], "search.generations=-1: must not be negative"),
        (["data.max_samples=-1"], "data.max_samples=-1: must not be negative"),
        (["data.scenes=huge"], "data.scenes: Invalid value 'huge', expected one of"),
        (["model.name=nano576"], "model.name=nano576 needs large scenes: set data.scenes=large"),
        (["data.scenes=large"], "model.name=nano needs small scenes: set data.scenes=small"),
        (["labels.chunk_size=0"], "labels.chunk_size=0: must be at least 1"),
        (["labels.credit_samples=-1"], "labels.credit_samples=-1: must not be negative"),
        (["labels.batch=0"], "labels.batch=0: must be at least 1"),
        (["optim.batch_size=0"], "optim.batch_size=0: must be at least 1"),
        (["optim.lr=-1"], "optim.lr=-1.0: must be above 0"),
        (["optim.lr=0"], "optim.lr=0.0: must be above 0"),
        (["optim.refresh_lr=-1"], "optim.refresh_lr=-1.0: must not be negative"),
        (["optim.flat=2"], "optim.flat=2.0: must be a fraction"),
        (["optim.ema=1"], "optim.ema=1.0: must lie below 1"),
        (["labels.credit_sizes=[]"], "labels.credit_sizes=.*: give at least one size above 0"),
        (["labels.proposal_sizes=[8,0]"], "labels.proposal_sizes=.*: give at least one size above 0"),
        (["model.shard=-1"], "model.shard"),
        (["loss.alpha=-1"], "loss.alpha"),
        (["eval.sheet=0"], "eval.sheet"),
        (["compressor.lora.r=4"], "set compressor.init=layer"),
        (["compressor.lora.r=-1"], "compressor.lora.r"),
        (["loss.bins=0"], "loss.bins=0: must be at least 1"),
        (["loss.eps=0"], "loss.eps=0.0: must be above 0"),
        (["eval.kept=[]"], "eval.kept: give at least one count"),
        (["eval.kept=[8,0]"], "eval.kept: give at least one count >= 1"),
        (["eval.monitor_every=0"], "eval.monitor_every=0: must be at least 1"),
        (["eval.batch=0"], "eval.batch=0: must be at least 1"),
        (["compressor.layers=0"], "compressor.layers=0: must be at least 1"),
        (["seed=-1"], "^seed=-1: must not be negative"),
        (["threads=-1"], "^threads=-1: must not be negative"),
        (["grouping.method=dpc_knn"], "grouping.method=dpc_knn needs grouping.count > 0"),
        (["labels.probes=1"], "labels.probes=1: must be 0, or from 2 to labels.proposals=16"),
        (["labels.probes=8", "labels.proposals=4"], "labels.probes=8"),
        (["recipe=published", "loss.name=listwise"], "loss.name=listwise needs labels.target=credit, not hard"),
        (["model.attention=flash_attention_2"], "set model.attention=sdpa or compressor.sharp=0"),
        (["compressor.sharp=-1"], "compressor.sharp=-1"),
        (["compressor.width=8", "compressor.init=layer"], "set compressor.init=random"),
        (["labels.credit_of=group", "loss.name=bce"], "labels.credit_of=group requires"),
        (["labels.credit_of=group", "labels.credit_masks_from=search"], "labels.credit_of=group requires"),
        (["labels.target=credit", "labels.refresh=none", "loss.name=focal_cs"], "loss.name=focal_cs needs hard labels"),
    ],
)
def test_invalid_values_are_refused(settings, match):
    refused(*settings, match=match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("seed: [1\n", r"a.yaml:2: not valid YAML"),
        ("seed: 1\n\tdata: 2\n", r"a.yaml:2: not valid YAML"),
        ("- seed\n", "must hold settings"),
        ("seed: x\n", "a.yaml: seed: Value 'x'"),
    ],
)
def test_errors_of_unreadable_files_name_the_file(text, match, yaml):
    refused(config=[yaml(text)], match=match)


def test_errors_of_binary_files_name_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"seed: 1 # \xff")
    refused(config=[path], match=r"a.yaml: not UTF-8 text \(byte 10\); save it as UTF-8$")
    path.write_bytes(b"seed: 1\0")
    refused(config=[path], match=r"a.yaml: not valid YAML \(unacceptable character [^\n]*\)$")

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("omegaconf.OmegaConf.load", denied)
    refused(config=[path], match=r"a.yaml: cannot be read \(Permission denied\); give a file with settings")


def test_missing_files_are_refused():
    refused(config=["nowhere.yaml"], match="--config=nowhere.yaml: no such file")


# ------------------------------------------------------------ every setting


def test_every_setting_is_described():
    known = {setting.key: setting for setting in all_settings()}
    assert known.keys() == leaves().keys()
    for key, setting in known.items():
        assert len(setting.meaning.split()) >= 2, f"{key} has no docstring in schema.py"
        assert setting.default == value(RunConfig(), key)


def test_names_of_installed_configurations_are_known_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"nano", "nano_published", "llava15_7b"} <= set(shipped())
    assert load(["llava15_7b"]) == load(["llava15_7b.yaml"]) != load()
    (tmp_path / "nano").mkdir()  # a folder, not a file
    assert load(["nano"]).run_dir == "runs/nano"
    (tmp_path / "llava15_7b").write_text("seed: 7\n")
    assert load(["llava15_7b"]) == load([], ["seed=7"]), "a file comes first"
    refused(match="--config=nan: no such file .*did you mean nano", config=["nan"])
    refused(match="--config=elsewhere/nano.yaml: no such file", config=["elsewhere/nano.yaml"])


@pytest.mark.parametrize("key", [k for k, kind in leaves().items() if typing.get_origin(kind) is typing.Literal])
def test_unknown_choices_are_refused(key):
    message = refused(f"{key}=nonsense", match=f"{key}: Invalid value 'nonsense', expected one of")
    assert str(typing.get_args(leaves()[key])[0]) in message


@pytest.mark.parametrize("key", [k for k, kind in leaves().items() if kind in (int, float, bool)])
def test_every_number_refuses_words(key):
    refused(f"{key}=word", match=key)
