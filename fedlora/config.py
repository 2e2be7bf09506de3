"""What to run: frozen dataclasses, read from TOML, changed by `--set`, flat for the wire.

One flat dict (`section.key` -> bool, int, float or str; lists and tables as JSON) is the same
config for files, for overrides and for other engines. Checks values; opens no file but the config.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from fedlora.hints import near
from fedlora.partition import check_names
from fedlora.policy import residual_policy
from fedlora.rules import Option, get_rule, is_file
from fedlora.settings import (
    ClientSettings,
    DataSettings,
    EvaluateSettings,
    FlowerSettings,
    MergeSettings,
    ModelSettings,
    PartitionSettings,
    PrivacySettings,
    RunSettings,
)
from fedlora.sources import anchored_data, anchored_model

Flat: TypeAlias = dict[str, bool | int | float | str]

FILE_RULE = ".py:"  # what a rule is named by that comes from a file


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's result, section by section."""

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    partition: PartitionSettings = field(default_factory=PartitionSettings)
    client: ClientSettings = field(default_factory=ClientSettings)
    merge: MergeSettings = field(default_factory=MergeSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    flower: FlowerSettings = field(default_factory=FlowerSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)

    def flat(self) -> Flat:
        """`section.key` -> value, lists and tables as JSON: the form for the wire."""
        return {
            f"{section.name}.{key.name}": _to_flat(getattr(getattr(self, section.name), key.name))
            for section in fields(self)
            for key in fields(getattr(self, section.name))
        }

    def toml(self) -> str:
        """The whole config as TOML that `load_config` reads back to an equal one."""
        lines: list[str] = []
        for section in fields(self):
            values = getattr(self, section.name)
            rows = [f"{key.name} = {to_toml(getattr(values, key.name))}" for key in fields(values)]
            lines += [f"[{section.name}]", *rows, ""]
        return "\n".join(lines)


def load_config(
    path: Path | str,
    overrides: Iterable[str] = (),
    *,
    own_rule: Callable[[str], None] | None = None,
    merges: bool = True,
) -> Config:
    """Reads a TOML file and applies `section.key=value` overrides; ValueError says what is wrong.

    Relative paths of data, model and a rule of one's own in the file are meant from the file's
    folder, those in overrides from the working directory. `own_rule` is called with a rule that is
    named as a file, `./mine.py:name`, and must make it known; without it such rules are refused.
    `merges=False` leaves the rule unchecked, for those who only read what a run left.
    """
    source = Path(path)
    try:
        tables = tomllib.loads(source.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read the config {source}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is not valid TOML: {error}") from error
    flat: dict[str, Any] = {}
    if "sweep" in tables:
        raise ValueError(f"{source} has a [sweep] section: it is for `fedlora sweep`")
    for section, values in tables.items():
        _known(section, _SECTIONS, "section")
        if not isinstance(values, dict):
            raise ValueError(f"[{section}] in {source} must be a table")
        flat |= {f"{section}.{key}": value for key, value in values.items()}
    settings = anchored(flat, source.parent)
    settings |= anchored(parse_overrides(overrides), Path.cwd())
    rule = settings.get("merge.rule")
    if own_rule is not None and isinstance(rule, str) and is_file(rule):
        own_rule(rule)
    return make_config(settings, merges=merges)


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["run.seed=3", ...]` as a flat dict, values still text; ValueError for one without `=`."""
    flat: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"--set {override!r} has no '=': write section.key=value")
        flat[key.strip()] = value.strip()
    return flat


def make_config(flat: Mapping[str, Any], *, merges: bool = True) -> Config:
    """A checked config from flat keys; values may be text (from a command line) or typed.

    ValueError for an unknown key (with the nearest), a wrong type, a value out of range or a bad
    rule (unless `merges` is False). Runs no code: a rule in a file must be known already.
    """
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        table, _, entry = name.partition(".")
        kind = _HINTS[section].get(table) if section in _SECTIONS else None
        if entry and kind in _TABLES:
            option = value if kind == dict[str, str] else _parsed_option(value)
            sections[section][table] = sections[section].get(table, {}) | {entry: option}
            continue
        _known(key, [f"{s}.{f}" for s in _SECTIONS for f in _HINTS[s]], "setting")
        sections[section][name] = _coerced(key, value, _HINTS[section][name])
    config = Config(**{name: _SECTIONS[name](**values) for name, values in sections.items()})
    _check(config)
    if sections["privacy"] and "unit" not in sections["privacy"]:
        raise ValueError(
            f"privacy.{next(iter(sections['privacy']))} is set, privacy.unit is not: take "
            "'example' (or 'client'), or say 'none'"
        )
    if merges:
        _check_merge(config)
    return config


def settings_table() -> list[tuple[str, str, str]]:
    """(key, default as TOML, meaning) of every setting, in order: for help texts and docs."""
    return [
        (
            f"{section.name}.{key.name}",
            to_toml(getattr(getattr(Config(), section.name), key.name)),
            text,
        )
        for section in fields(Config)
        for key in fields(_SECTIONS[section.name])
        for text in [_meaning(key.metadata)]
    ]


_SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in fields(Config)}
_HINTS: dict[str, dict[str, Any]] = {name: get_type_hints(kind) for name, kind in _SECTIONS.items()}
_TABLES = (dict[str, str], dict[str, Option])


def _known(name: str, known: Iterable[str], kind: str) -> None:
    names = list(known)
    if name not in names:
        hint = near(name, names) or f"; `fedlora config` lists every {kind}"
        raise ValueError(f"unknown {kind} {name!r}{hint}")


def _coerced(key: str, value: Any, kind: Any) -> Any:
    """The value as its setting's type; text is parsed, wrong types are refused with the place."""
    wanted = get_origin(kind) or kind
    wanted = str if wanted is Literal else wanted
    problem = ValueError(f"{key} = {value!r} is not {_READABLE[wanted]}")
    try:
        value = _from_text(value, wanted) if isinstance(value, str) else value
    except json.JSONDecodeError:
        raise problem from None
    if wanted is float and _is_number(value):
        value = float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise problem
    if wanted is list:
        return _list_of(get_args(kind)[0], value, problem)
    if kind == dict[str, str]:
        for name, entry in value.items():
            if not isinstance(entry, str):
                raise ValueError(f"{key}.{name} = {entry!r} is not {_READABLE[str]}")
    if wanted is dict:
        return {name: entry for name, entry in value.items() if entry is not None}
    return value


def _list_of(kind: Any, values: list[Any], problem: ValueError) -> list[Any]:
    """The entries as texts, whole numbers, or lists of numbers."""
    if kind is str:
        return [entry if isinstance(entry, str) else json.dumps(entry) for entry in values]
    if kind is int:
        if not all(str(entry).isdecimal() for entry in values):
            raise problem
        return [int(entry) for entry in values]
    if not all(isinstance(row, list) and all(map(_is_number, row)) for row in values):
        raise problem
    return [[float(share) for share in row] for row in values]


def _from_text(text: str, wanted: Any) -> Any:
    """What a text on a command line stands for: `a,b` is a list, all else is read as JSON."""
    if wanted is str:
        return text
    if wanted is list and not text.startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    return json.loads(text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_READABLE = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes",
    list: "a list, such as [\"a\", \"b\"]", dict: "a table, such as {a = \"x\"}",
}  # fmt: skip


def _parsed_option(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value


def _check(config: Config) -> None:
    for section in fields(config):
        values = getattr(config, section.name)
        for key in fields(values):
            _in_range(f"{section.name}.{key.name}", getattr(values, key.name), key.metadata)
    if config.partition.by == "shares" and len(config.partition.shares) != config.partition.clients:
        raise ValueError(
            f"partition.shares lists {len(config.partition.shares)} clients, "
            f"partition.clients is {config.partition.clients}: give one list of shares per client"
        )
    if config.partition.by == "column" and not config.partition.column:
        raise ValueError("partition.by = 'column' needs partition.column, the column's name")
    for setting, names in (
        ("data.labels", config.data.labels),
        ("data.label_names", config.data.label_names),
        ("flower.clients", config.flower.clients),
    ):
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{setting} lists {twice[0]!r} twice: one name means one thing")
    check_names("flower.clients", config.flower.clients)
    if config.data.label_names and len(config.data.label_names) != len(config.data.labels):
        raise ValueError(
            f"data.label_names has {len(config.data.label_names)} names for "
            f"{len(config.data.labels)} data.labels: give one name per label, in the same order"
        )
    if config.run.save_best and config.data.holdout == 0:
        raise ValueError(
            "run.save_best needs data.holdout above 0: it chooses on held-out training rows"
        )


def _check_merge(config: Config) -> None:
    """Rule, options, residual and ranks must go together."""
    merge, ranks = config.merge, config.client.ranks
    try:
        rule = get_rule(merge.rule, **merge.options)
        residual_policy(rule, None if merge.residual == "rule" else merge.residual)
    except ValueError as error:
        raise ValueError(f"merge.rule: {error}") from None
    if (rank := rule.options.get("rank")) not in (None, config.model.rank):
        raise ValueError(
            f"merge.options.rank = {rank} is not model.rank = {config.model.rank}: rounds go on at "
            "the rank they began with, set model.rank (the option is for `fedlora merge`)"
        )
    if any(not 1 <= rank <= config.model.rank for rank in ranks):
        raise ValueError(
            f"client.ranks = {ranks} must lie in 1..{config.model.rank}, the global model.rank"
        )
    if set(ranks) - {config.model.rank}:
        if rule.laws["mixed_ranks"] is not True:
            raise ValueError(
                f"client.ranks = {ranks} do not go with rule {rule.name!r}: "
                f"{rule.laws['mixed_ranks']}; fra takes them"
            )
        if rule.options.get("gauge") == "aligned":
            raise ValueError(
                "gauge 'aligned' mixes the pairs, so that the first ones are not the strongest: "
                "with client.ranks take 'balanced', and client.optimiser = 'transport'"
            )


def _meaning(metadata: Mapping[str, Any]) -> str:
    choices = metadata["choices"]
    return f"{metadata['help']} ({' | '.join(choices)})" if choices else str(metadata["help"])


def _in_range(key: str, value: Any, metadata: Mapping[str, Any]) -> None:
    choices = metadata["choices"]
    if choices and value not in choices:
        hint = near(str(value), choices)
        raise ValueError(f"{key} = {value!r} is not one of {', '.join(choices)}{hint}")
    if not isinstance(value, int | float):
        return
    low, high, above = metadata["low"], metadata["high"], metadata["above"]
    if (
        not math.isfinite(value)
        or (low is not None and value < low)
        or (high is not None and value > high)
        or (above is not None and value <= above)
    ):
        least = f"above {above}" if above is not None else f"at least {low}"
        most = f" and at most {high}" if high is not None else ""
        raise ValueError(f"{key} = {value!r} is out of range: it must be {least}{most}")


def anchored(flat: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative paths of data and model made absolute, as meant from this folder."""
    anchored = dict(flat)
    for key in flat:
        if key in ("data.train", "data.evaluate") or key.startswith("data.clients."):
            anchored[key] = anchored_data(flat[key], folder)
    if "data.clients" in flat:
        files = _coerced("data.clients", flat["data.clients"], dict[str, str])
        anchored["data.clients"] = {c: anchored_data(file, folder) for c, file in files.items()}
    path, ending, rule = str(flat.get("merge.rule", "")).rpartition(".py")
    if ending and rule[:1] in ("", ":"):
        anchored["merge.rule"] = f"{(folder / f'{path}.py').resolve()}{rule}"
    if "model.name" in flat:
        anchored["model.name"] = anchored_model(flat["model.name"], folder)
    return anchored


def _to_flat(value: Any) -> bool | int | float | str:
    return json.dumps(value) if isinstance(value, list | dict) else value


def to_toml(value: Any) -> str:
    """A setting's value as TOML has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_toml(k)} = {to_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(to_toml(entry) for entry in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
