"""A config in TOML, in overrides and flat is one and the same; mistakes are named with a remedy."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import Config, load_config, make_config, parse_overrides, settings_table
from fedlora.rules import described, get_rule, option_types, rule_names

Write = Callable[[str], Path]

UNUSUAL: dict[str, Any] = {
    "run.name": 'a "quoted" name\\with\ttabs, ünïcode and 雪',
    "run.mode": "local",
    "run.seed": 2**53 + 1,
    "run.save_merged": True,
    "model.alpha": 1e-5,
    "model.rslora": True,
    "model.targets": ["q_proj", "v,proj"],
    "data.clients": {"hospital a.b": "/data/ä.csv", "b": "/data/b=c.tsv"},
    "data.labels": ["no", "yes"],
    "data.label_names": ["negative", "positive"],
    "partition.by": "shares",
    "partition.shares": [[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]],
    "client.lr": 3e16,
    "merge.rule": "fra",
    "merge.options": {"gauge": "orthonormal", "rank": 8},
    "evaluate.clients": False,
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return written


def test_an_empty_file_is_the_default_config(write: Write) -> None:
    assert load_config(write("")) == Config() == make_config({})


@pytest.mark.parametrize("settings", [{}, UNUSUAL])
def test_a_config_survives_toml(settings: dict[str, Any], write: Write) -> None:
    config = make_config(settings)
    assert load_config(write(config.toml())) == config


@pytest.mark.parametrize("settings", [{}, UNUSUAL])
def test_a_config_survives_its_flat_form_which_holds_plain_values_only(
    settings: dict[str, Any],
) -> None:
    flat = make_config(settings).flat()
    assert all(type(value) in (bool, int, float, str) for value in flat.values())
    assert make_config(flat) == make_config(settings)
    assert make_config(json.loads(json.dumps(flat))) == make_config(settings)


def test_flat_keys_are_section_and_setting() -> None:
    flat = Config().flat()
    assert flat["run.seed"] == 0
    assert flat["merge.rule"] == "fra"
    assert set(flat) == {
        f"{section.name}.{key.name}"
        for section in fields(Config)
        for key in fields(getattr(Config(), section.name))
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"merge.options": {"rank": None}},
        {"data.clients": {"клиника": "/x/a.csv", "😀": "/x/b.csv"}},
        {"run.name": "\x7f"},
    ],
)
def test_whatever_is_accepted_can_be_written_as_toml(
    settings: dict[str, Any], write: Write
) -> None:
    config = make_config(settings)
    tomllib.loads(config.toml())
    assert load_config(write(config.toml())) == config


def test_every_setting_is_in_the_file_it_writes_with_a_line_of_help() -> None:
    tables = tomllib.loads(Config().toml())
    for section in fields(Config):
        values = getattr(Config(), section.name)
        assert set(tables[section.name]) == {key.name for key in fields(values)}
        assert all(len(key.metadata["help"]) > 8 for key in fields(values))


def test_the_table_of_settings_has_a_line_for_each_with_its_default_and_choices() -> None:
    table = {key: (default, meaning) for key, default, meaning in settings_table()}
    flat = Config().flat()
    assert list(table) == list(flat)
    for key, (default, meaning) in table.items():
        value = tomllib.loads(f"x = {default}")["x"]
        assert value == flat[key] or json.dumps(value) == flat[key]
        assert len(meaning) > 8
    assert table["merge.head"][1].endswith("(average | freeze | local)")


def test_defaults_pass_their_own_checks_and_are_not_shared() -> None:
    assert make_config(Config().flat()) == Config()
    assert Config().data.clients is not Config().data.clients


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("run.seed=3", "run", "seed", 3),
        (" run.seed = 3 ", "run", "seed", 3),
        ("client.lr=1e-4", "client", "lr", 1e-4),
        ("client.lr=2", "client", "lr", 2.0),
        ("model.rslora=true", "model", "rslora", True),
        ("run.name=a=b", "run", "name", "a=b"),
        ("run.name=3", "run", "name", "3"),
        ("model.targets=q_proj,v_proj", "model", "targets", ["q_proj", "v_proj"]),
        ("model.targets=q_proj, v_proj", "model", "targets", ["q_proj", "v_proj"]),
        ('model.targets=["q_proj"]', "model", "targets", ["q_proj"]),
        ("model.targets=", "model", "targets", []),
        ("data.labels=0,1", "data", "labels", ["0", "1"]),
        ("data.labels=[0, 1]", "data", "labels", ["0", "1"]),
        ('data.clients={"a": "x.csv"}', "data", "clients", {"a": "x.csv"}),
        ("data.clients.a=x.csv", "data", "clients", {"a": "x.csv"}),
        ("data.clients.hospital.b=x.csv", "data", "clients", {"hospital.b": "x.csv"}),
        ("data.clients.2024=2024", "data", "clients", {"2024": "2024"}),
        ("merge.options.gauge=orthonormal", "merge", "options", {"gauge": "orthonormal"}),
        ("merge.options.rank=8", "merge", "options", {"rank": 8}),
    ],
)
def test_an_override_is_read_as_its_settings_type(
    override: str, section: str, key: str, value: object
) -> None:
    config = make_config(parse_overrides([override]))
    got = getattr(getattr(config, section), key)
    assert (got, type(got)) == (value, type(value))


def test_overrides_win_over_the_file_and_later_ones_over_earlier(write: Write) -> None:
    path = write("[run]\nseed = 1\nrounds = 4\n[merge]\noptions = {gauge = 'orthonormal'}\n")
    config = load_config(path, ["run.seed=2", "run.seed=3", "merge.options.rank=8"])
    assert (config.run.seed, config.run.rounds) == (3, 4)
    assert config.merge.options == {"gauge": "orthonormal", "rank": 8}


def test_an_override_of_one_entry_keeps_the_other_entries_of_the_file(write: Write) -> None:
    path = write("[data.clients]\na = '/x/a.csv'\nb = '/x/b.csv'\n")
    config = load_config(path, ["data.clients.b=/y/b.csv"])
    assert config.data.clients == {"a": "/x/a.csv", "b": "/y/b.csv"}


def test_making_a_config_leaves_its_argument_alone() -> None:
    flat = {"merge.options": {"rank": 8}, "merge.options.gauge": "orthonormal"}
    make_config(flat)
    assert flat["merge.options"] == {"rank": 8}


def test_an_override_without_an_equals_sign_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--set 'run\.seed' has no '='"):
        parse_overrides(["run.seed"])


# ---------------------------------------------------------------- paths


def test_paths_in_a_file_are_meant_from_its_folder_and_in_overrides_from_where_one_stands(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = write(
        "[data]\ntrain = 'x/train.csv'\nevaluate = '../dev.TSV'\nclients = {a = 'a.jsonl'}\n"
        "[model]\nname = 'base'\n"
    )
    config = load_config(path)
    assert config.data.train == str(tmp_path / "x" / "train.csv")
    assert config.data.evaluate == str(tmp_path.parent / "dev.TSV")
    assert config.data.clients == {"a": str(tmp_path / "a.jsonl")}
    assert config.model.name == str(tmp_path / "base")
    config = load_config(path, ["data.train=train.csv", "data.clients.b=b.csv"])
    there = str(tmp_path / "elsewhere" / "b.csv")
    assert config.data.train == str(tmp_path / "elsewhere" / "train.csv")
    config = load_config(path, ["data.train=notes.xlsx", "model.name=../base"])
    assert config.data.train == str(tmp_path / "elsewhere" / "notes.xlsx")
    assert config.model.name == str(tmp_path / "base")
    (tmp_path / "notes").touch()  # no ending, and there
    path.write_text("[data]\ntrain = 'notes'\nevaluate = 'base/dev'\n[model]\nname = './none'\n")
    config = load_config(path)
    assert config.data.train == str(tmp_path / "notes")
    assert config.data.evaluate == str(tmp_path / "base" / "dev")
    assert config.model.name == str(tmp_path / "none")
    config = load_config(path, ["data.train=train.csv", "data.clients.b=b.csv"])
    path.write_text("[data]\nclients = {a = 'a.jsonl'}\n")
    config = load_config(path, ["data.train=train.csv", "data.clients.b=b.csv"])
    assert config.data.clients == {"a": str(tmp_path / "a.jsonl"), "b": there}


@pytest.mark.parametrize("name", ["glue/sst2", "builtin:reviews", "/abs/train.csv", ""])
def test_hub_names_builtins_and_absolute_paths_stay_as_they_are(name: str, write: Write) -> None:
    config = load_config(write(f"[data]\ntrain = '{name}'\n[model]\nname = 'bert-base'\n"))
    assert config.data.train == name
    assert config.model.name == "bert-base"


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("run.sed", 1, r"unknown setting 'run\.sed'; did you mean 'run\.seed'\?"),
        ("seed", 1, r"unknown setting 'seed'; "),
        ("rnu.seed", 1, r"unknown setting 'rnu\.seed'; did you mean 'run\.seed'\?"),
        ("run.xyzzyxyzzy", 1, r"unknown setting 'run\.xyzzyxyzzy'; `fedlora config` lists every"),
        ("run.name.first", "x", r"unknown setting 'run\.name\.first'"),
        ("run.seed", "three", r"run\.seed = 'three' is not a whole number"),
        ("run.seed", 3.0, r"run\.seed = 3\.0 is not a whole number"),
        ("run.seed", "3.5", r"run\.seed = '3\.5' is not a whole number"),
        ("run.seed", True, r"run\.seed = True is not a whole number"),
        ("run.seed", "", r"run\.seed = '' is not a whole number"),
        ("run.seed", -1, r"run\.seed = -1 is out of range: it must be at least 0"),
        ("run.rounds", 0, r"run\.rounds = 0 is out of range: it must be at least 1"),
        ("run.name", 5, r"run\.name = 5 is not a text in quotes"),
        ("run.save_best", "yes", r"run\.save_best = 'yes' is not true or false"),
        ("run.save_best", 1, r"run\.save_best = 1 is not true or false"),
        ("run.mode", "centrall", r"'centrall' is not one of .*; did you mean 'central'\?"),
        ("run.device", "tpu", r"run\.device = 'tpu' is not one of auto, cuda, mps, cpu"),
        ("client.lr", "fast", r"client\.lr = 'fast' is not a number"),
        ("client.lr", True, r"client\.lr = True is not a number"),
        ("client.lr", 0, r"client\.lr = 0\.0 is out of range: it must be above 0"),
        ("client.lr", "NaN", r"client\.lr = nan is out of range"),
        ("client.lr", "Infinity", r"client\.lr = inf is out of range"),
        ("merge.participation", 1.5, r"1\.5 is out of range: it must be above 0 and at most 1"),
        ("merge.participation", 0.0, r"merge\.participation = 0\.0 is out of range"),
        ("model.dropout", 1.0, r"must be at least 0 and at most 0\.999"),
        ("data.holdout", 0.95, r"data\.holdout = 0\.95 is out of range: .* at most 0\.9"),
        ("merge.head", "avarage", r"'avarage' is not one of .*; did you mean 'average'\?"),
        ("merge.weights", "even", r"merge\.weights = 'even' is not one of examples, uniform"),
        ("model.targets", 3, r"model\.targets = 3 is not a list"),
        ("model.targets", "[q_proj", r"model\.targets = '\[q_proj' is not a list"),
        ("data.clients", "a.csv", r"data\.clients = 'a\.csv' is not a table"),
        ("data.clients", {"a": 1}, r"data\.clients\.a = 1 is not a text in quotes"),
        ("data.labels", ["x", "y", "x"], r"data\.labels lists 'x' twice"),
        ("data.label_names", ["x", "x"], r"data\.label_names lists 'x' twice"),
        ("flower.clients", ["x", "x"], r"flower\.clients lists 'x' twice"),
        ("flower.clients", ["Nord", "nord"], r"flower\.clients names clients 'Nord' and 'nord'"),
        ("flower.clients", ["a/b"], r"flower\.clients names a client 'a/b'"),
        ("run.device", "gpu", r"did you mean 'cuda'\?"),
        ("merge.rule", "fedvag", r"merge\.rule: unknown rule 'fedvag'; did you mean 'fedavg'\?"),
        ("merge.options.guage", "balanced", r"no option 'guage'; did you mean 'gauge'\?"),
        ("merge.options.gauge", "ortho", r"'ortho', expected one of 'balanced', 'orthonormal'"),
        ("merge.options.rank", "four", r"'four', expected int or None"),
        ("partition.by", "column", r"partition\.by = 'column' needs partition\.column"),
        ("partition.by", "shares", r"partition\.shares lists 0 clients, partition\.clients is 3"),
        ("partition.shares", [0.5, 0.5], r"partition\.shares = \[0\.5, 0\.5\] is not a list"),
        ("partition.shares", "0.5,0.5", r"partition\.shares = '0\.5,0\.5' is not a list"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_mistake_is_refused_with_value_place_and_remedy(
    key: str, value: object, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        make_config({key: value})


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.label_names has 1 names for 2 data\.labels"):
        make_config({"data.labels": ["0", "1"], "data.label_names": ["no"]})
    with pytest.raises(ValueError, match=r"save_best needs data\.holdout above 0"):
        make_config({"run.save_best": True, "data.holdout": 0})
    with pytest.raises(ValueError, match=r"rank = 4 is not model\.rank = 2: .* set model\.rank"):
        make_config({"model.rank": 2, "merge.options.rank": 4})
    with pytest.raises(ValueError, match=r"merge\.options\.rank = 0 is not model\.rank = 8"):
        make_config({"merge.options.rank": 0})
    with pytest.raises(ValueError, match="rule 'ffa' has no option 'gauge'; it has no options"):
        make_config({"merge.rule": "ffa", "merge.options": {"gauge": "balanced"}})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[run\nseed = 1", "is not valid TOML"),
        ("[runs]\nseed = 1", r"unknown section 'runs'; did you mean 'run'\?"),
        ("run = 3", r"\[run\] in .*config.toml must be a table"),
        ("[run]\nsede = 1", r"unknown setting 'run\.sede'; did you mean 'run\.seed'\?"),
    ],
)
def test_a_file_with_a_mistake_is_refused(text: str, says: str, write: Write) -> None:
    with pytest.raises(ValueError, match=says):
        load_config(write(text))


def test_a_file_that_is_not_there_or_not_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the config .*none.toml: No such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary.toml is not valid TOML"):
        load_config(tmp_path / "binary.toml")


# ---------------------------------------------------------------- rules by name


@pytest.mark.parametrize("name", rule_names())
def test_every_rule_and_every_value_of_its_choices_can_be_configured(name: str) -> None:
    assert make_config({"merge.rule": name}).merge.rule == name
    for option, kind in option_types(get_rule(name)).items():
        for value in getattr(kind, "__args__", ()):
            if isinstance(value, str):
                assert f"{value!r}" in described(kind)
                config = make_config({"merge.rule": name, f"merge.options.{option}": value})
                assert config.merge.options == {option: value}
