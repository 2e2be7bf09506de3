"""What a sweep runs: methods x cases x seeds, each a config, with settings chosen by a tuning
round.

A sweep file is an ordinary config with a [sweep] section. Reads and expands; runs nothing.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from fedlora.config import FILE_RULE, Config, anchored, make_config, parse_overrides
from fedlora.hints import near
from fedlora.own_rules import rule_digest
from fedlora.settings import NO_EVALUATION, shares_metrics

KEYS = ("name", "seeds", "tune", "tune_seeds", "methods", "cases")
TUNING = {  # held-out rows after the last round, and nothing else
    "data.evaluate": NO_EVALUATION, "run.save_best": False,
    "evaluate.clients": False, "evaluate.every": 10**6, "evaluate.limit": 1,
}  # fmt: skip
RULE = "merge.rule"
NAMELESS = ("run.name", "run.out")  # what a run is called does not make it another run


@dataclass(frozen=True)
class Trial:
    """One run of a sweep; `varied` are the settings in which the trials of the sweep differ.

    `tuning` trials are run to choose among the values of `grid`, on held-out training rows. `code`
    is the digest of the user's own rule file, empty for a rule of the registry.
    """

    method: str
    case: str
    seed: int
    config: Config
    grid: Mapping[str, Any]
    varied: Mapping[str, Any]
    tuning: bool = False
    code: str = ""

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits of everything that decides the run's result."""
        flat = {k: v for k, v in self.config.flat().items() if k not in NAMELESS}
        text = json.dumps(flat, sort_keys=True) + self.code
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Variant:
    """One method or case: its name, its settings, and the grid that is to be tuned.

    A method runs in the cases whose names fit one of its patterns (`*` stands for any text).
    """

    name: str
    settings: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    patterns: Sequence[str] = ("*",)

    def runs_in(self, case: Variant) -> bool:
        """Whether this method is one of the case's."""
        return any(fnmatchcase(case.name, pattern) for pattern in self.patterns)


@dataclass(frozen=True)
class Sweep:
    """A sweep as read: every method with every case and seed, on the shared settings.

    `codes` holds the digests of rule files, by the rule's name, as they were when it was read.
    """

    name: str
    shared: Mapping[str, Any]
    methods: Sequence[Variant]
    cases: Sequence[Variant]
    seeds: Sequence[int]
    tune_seeds: Sequence[int]
    codes: Mapping[str, str] = field(default_factory=dict)

    @property
    def groups(self) -> list[tuple[Variant, Variant]]:
        """Every case with its methods."""
        return [
            (method, case) for case in self.cases for method in self.methods if method.runs_in(case)
        ]

    def tuning_trials(self, method: Variant, case: Variant) -> list[Trial]:
        """The trials that choose the grid's values; none where there is nothing to choose."""
        grid = [dict(zip(method.grid, values, strict=True)) for values in _points(method)]
        if len(grid) < 2:
            return []
        return [
            self._trial(method, case, seed, point, tuning=True)
            for point in grid
            for seed in self.tune_seeds
        ]

    def trials(self, method: Variant, case: Variant, chosen: Mapping[str, Any]) -> list[Trial]:
        """The trials that count, one a seed, with the chosen values of the grid."""
        return [self._trial(method, case, seed, chosen) for seed in self.seeds]

    def sole_point(self, method: Variant) -> dict[str, Any]:
        """The grid's values where there is nothing to choose."""
        return {key: values[0] for key, values in method.grid.items()}

    def _trial(
        self,
        method: Variant,
        case: Variant,
        seed: int,
        point: Mapping[str, Any],
        tuning: bool = False,
    ) -> Trial:
        varied = {**case.settings, **method.settings, **point}
        settings = {**self.shared, **varied, "run.seed": seed}
        if tuning:
            settings |= TUNING
        words = [self.name, case.name, method.name, *(f"{v}" for v in point.values()), f"s{seed}"]
        settings["run.name"] = " ".join(word for word in words if word)
        config = make_config(settings)
        code = self.codes.get(config.merge.rule, "")
        return Trial(method.name, case.name, seed, config, dict(point), varied, tuning, code)


def load_sweep(
    path: Path,
    overrides: Iterable[str] = (),
    own_rule: Callable[[str], None] = lambda rule: None,
) -> Sweep:
    """Reads a sweep file; ValueError says what is wrong. `overrides` change the shared settings.

    In a method or a case a list stands for a grid (a list of lists where the setting itself is a
    list): every combination becomes a method or case of its own, named by its values, unless the
    key is in `tune`: then the value is chosen for each method and case. A method's `cases` are
    the names of those that it runs in, or patterns of them; by default all. `own_rule` as in
    `load_config`.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read the sweep {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    own = tables.pop("sweep", None)
    if not isinstance(own, dict):
        raise ValueError(f"{path} has no [sweep] section: `fedlora run` takes an ordinary config")
    for key in own:
        if key not in KEYS:
            hint = near(key, KEYS)
            raise ValueError(f"[sweep] has no {key!r}{hint}; it takes {', '.join(KEYS)}")
    shared = anchored(flattened(tables), path.parent)
    shared |= anchored(parse_overrides(overrides), Path.cwd())
    tune = own.get("tune", [])
    if not isinstance(tune, list) or not all(isinstance(key, str) for key in tune):
        raise ValueError(f'{path}: sweep.tune = {tune!r} is no list of settings: ["client.lr"]')
    sweep = Sweep(
        str(own.get("name", path.stem)),
        shared,
        _variants("methods", own.get("methods", []), tune, path.parent),
        _variants("cases", own.get("cases", [{"name": ""}]), [], path.parent),
        _seeds("seeds", own.get("seeds", [0])),
        _seeds("tune_seeds", own.get("tune_seeds", [1000])),
    )
    named = _rules(sweep)
    for rule in named:
        own_rule(rule)
    sweep = replace(sweep, codes={rule: code for rule in named if (code := rule_digest(rule))})
    _check(sweep, tune)
    return sweep


def flattened(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as `section.key` (and `section.table.entry`) -> value."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        name = f"{prefix}{key}"
        flat |= flattened(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _rules(sweep: Sweep) -> list[str]:
    """The names of all rules that the sweep's settings and grids hold, each once."""
    variants = (*sweep.methods, *sweep.cases)
    given = [settings.get(RULE) for settings in (sweep.shared, *(v.settings for v in variants))]
    tuned = [value for variant in variants for value in variant.grid.get(RULE, [])]
    return sorted({str(rule) for rule in (*given, *tuned) if rule})


def _variants(kind: str, entries: Any, tune: Sequence[str], folder: Path) -> list[Variant]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"[[sweep.{kind}]] must be a list of tables, each with its settings")
    if not entries:
        raise ValueError(f"a sweep needs at least one [[sweep.{kind}]], such as merge.rule = 'fra'")
    return [variant for entry in entries for variant in _expanded(kind, entry, tune, folder)]


def _expanded(
    kind: str, entry: Mapping[str, Any], tune: Sequence[str], folder: Path
) -> list[Variant]:
    """A method or case for every combination of its lists; lists of keys to tune stay a grid."""
    own = ("name", "cases") if kind == "methods" else ("name",)
    flat = flattened({k: v for k, v in entry.items() if k not in own})
    patterns = entry.get("cases", ["*"]) if "cases" in own else ["*"]
    if not isinstance(patterns, list) or not all(isinstance(one, str) for one in patterns):
        raise ValueError(f"[[sweep.methods]] cases = {patterns!r} is no list of cases' names")
    if "run.seed" in flat:
        raise ValueError("run.seed cannot be set in a method or case: list the seeds in [sweep]")
    axes = {key: value for key, value in flat.items() if _is_grid(key, value)}
    if empty := [key for key, values in axes.items() if not values]:
        raise ValueError(f"[sweep]: {empty[0]} is an empty list: give it at least one value")
    tuned = {key: values for key, values in axes.items() if key in tune}
    grid = {k: [anchored({k: v}, folder)[k] for v in values] for k, values in tuned.items()}
    crossed = {key: values for key, values in axes.items() if key not in tune}
    fixed = {key: value for key, value in flat.items() if key not in axes}
    variants = []
    for values in product(*crossed.values()):
        point = dict(zip(crossed, values, strict=True))
        told = {key: value for key, value in point.items() if len(crossed[key]) > 1}
        name = _name(str(entry.get("name", "")), {**fixed, **point}, told)
        variants.append(Variant(name, anchored({**fixed, **point}, folder), grid, patterns))
    return variants


def _name(given: str, settings: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    """The name that was given, else the rule or the mode; then what the point adds."""
    main = "" if given else next((key for key in ("merge.rule", "run.mode") if key in settings), "")
    more = [f"{key.rpartition('.')[2]} {value}" for key, value in point.items() if key != main]
    own = str(settings.get(main, "")).rpartition(FILE_RULE)[2]  # a file's rule: its name
    return ", ".join(word for word in [given or own, *more] if word)


def _is_grid(key: str, value: Any) -> bool:
    """Whether a list stands for several values of the setting and not for one that is a list."""
    section, _, name = key.partition(".")
    kinds = {f.name: get_type_hints(f.default_factory) for f in fields(Config)}
    kind, depth = kinds.get(section, {}).get(name.partition(".")[0]), 0
    while get_origin(kind) is list:
        kind, depth = get_args(kind)[0], depth + 1
    for _ in range(depth):
        value = value[0] if isinstance(value, list) and value else None
    return isinstance(value, list)


def _points(method: Variant) -> list[tuple[Any, ...]]:
    return list(product(*method.grid.values()))


def _seeds(key: str, value: Any) -> list[int]:
    seeds = list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(
            f"sweep.{key} = {value!r} must be a number of seeds or a list of different ones"
        )
    return list(seeds)


def _check(sweep: Sweep, tune: Sequence[str]) -> None:
    """Every trial's config is made once, so that a mistake shows before anything runs."""
    _check_cases(sweep)
    used = {key for method in sweep.methods for key in method.grid}
    if idle := sorted(set(tune) - used):
        raise ValueError(f"sweep.tune names {idle[0]!r}, but no method lists values of it")
    if both := sorted(set(sweep.seeds) & set(sweep.tune_seeds)):
        raise ValueError(f"seed {both[0]} is in seeds and in tune_seeds: tune on other seeds")
    for method, case in sweep.groups:
        for trial in sweep.tuning_trials(method, case):
            _check_tuning(trial.config)
        sweep.trials(method, case, sweep.sole_point(method))


def _check_cases(sweep: Sweep) -> None:
    """ValueError for two cases of a name, two methods of a name in one, and one without any."""
    names = [case.name for case in sweep.cases]
    _check_different("cases", names)
    for case in sweep.cases:
        methods = [method.name for method, its_case in sweep.groups if its_case is case]
        _check_different("methods", methods)
        if not methods:
            raise ValueError(f"no [[sweep.methods]] runs in case {case.name!r}")
    for method in sweep.methods:
        for pattern in method.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"method {method.name!r}: there is no case {pattern!r}{near(pattern, names)}; "
                    f"cases are {', '.join(map(repr, names))}"
                )


def _check_different(kind: str, names: Sequence[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"[[sweep.{kind}]]: two are called {twice[0]!r}: give each a name")


def _check_tuning(config: Config) -> None:
    """ValueError where there are no held-out scores to choose on, or they may not be looked at."""
    if config.privacy.unit == "client":
        raise ValueError(
            "sweep.tune does not go with privacy.unit = 'client': it chooses on the clients' "
            "held-out rows, without noise; tune on public data without privacy and set the values"
        )
    if config.data.holdout == 0 or not shares_metrics(config.privacy):
        raise ValueError(
            "sweep.tune needs data.holdout above 0, and with privacy privacy.share_metrics: it "
            "chooses on held-out rows"
        )
