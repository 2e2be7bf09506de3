"""A sweep file as read: what it expands to, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.config import Config, make_config
from fedlora.own_rules import import_rule, rule_digest
from fedlora.sweep import _work
from fedlora.sweep_plan import Sweep, Trial, load_sweep
from fedlora.tables import evaluation_source

METHODS = """
[[sweep.methods]]
merge.rule = ["fra", "fedavg"]
client.lr = [1e-3, 2e-3, 4e-3]
[[sweep.methods]]
name = "own"
merge.rule = "fra"
merge.options.gauge = "orthonormal"
"""


CASES = """
[[sweep.cases]]
name = "cold"
[[sweep.cases]]
name = "warm up"
client.warmup = 0.5
"""


def read(tmp_path: Path, text: str, *overrides: str) -> Sweep:
    path = tmp_path / "small.toml"
    path.write_text(text, encoding="utf-8")
    return load_sweep(path, overrides)


def test_lists_are_crossed_but_for_the_keys_that_are_tuned(tmp_path: Path) -> None:
    sweep = read(
        tmp_path, f"[client]\nsteps = 5\n[sweep]\nseeds = 2\ntune = ['client.lr']{METHODS}",
        "data.evaluate=dev.csv",
    )  # fmt: skip
    assert [method.name for method in sweep.methods] == ["fra", "fedavg", "own"]
    assert (sweep.name, sweep.seeds, sweep.tune_seeds) == ("small", [0, 1], [1000])
    fra, case = sweep.groups[0]
    tuning = sweep.tuning_trials(fra, case)
    assert [trial.grid for trial in tuning] == [{"client.lr": lr} for lr in (1e-3, 2e-3, 4e-3)]
    assert {trial.seed for trial in tuning} == {1000}
    assert all(not trial.config.evaluate.clients and trial.tuning for trial in tuning)
    (source,) = {trial.config.data.evaluate for trial in tuning}
    assert evaluation_source(replace(tuning[0].config.data, train="builtin:reviews")) == ""
    assert source == "none"  # it is not even read, and nor is one that comes with the training set
    counted = sweep.trials(fra, case, {"client.lr": 2e-3})
    assert [(t.seed, t.config.run.seed, t.config.client.lr) for t in counted] == [
        (0, 0, 2e-3), (1, 1, 2e-3)
    ]  # fmt: skip
    assert counted[0].config.client.steps == 5
    assert counted[0].config.data.evaluate.endswith("dev.csv")
    own = sweep.methods[2]
    assert sweep.tuning_trials(own, case) == []
    assert sweep.trials(own, case, {})[0].config.merge.options == {"gauge": "orthonormal"}


def test_a_method_runs_in_the_cases_that_it_names(tmp_path: Path) -> None:
    sweep = read(
        tmp_path,
        f"""[sweep]
        seeds = 1
        tune = ["client.lr"]
        {CASES}
        [[sweep.methods]]
        cases = ["cold"]
        merge.rule = ["fra", "ffa"]
        client.lr = [1e-3, 2e-3]
        [[sweep.methods]]
        cases = ["w*m*"]
        merge.rule = "fra"
        client.lr = 4e-3
        [[sweep.methods]]
        merge.rule = "fedavg"
        """,
    )
    names = [(case.name, method.name) for method, case in sweep.groups]
    assert names == [
        ("cold", "fra"), ("cold", "ffa"), ("cold", "fedavg"), ("warm up", "fra"),
        ("warm up", "fedavg"),
    ]  # fmt: skip
    assert [len(sweep.tuning_trials(*group)) for group in sweep.groups] == [2, 2, 0, 0, 0]
    (warm,) = sweep.trials(*sweep.groups[3], {})
    assert (warm.config.client.lr, warm.config.client.warmup) == (4e-3, 0.5)
    assert "cases" not in warm.varied


def test_without_tuning_every_value_is_a_method(tmp_path: Path) -> None:
    sweep = read(tmp_path, f"[sweep]{METHODS}")
    names = [method.name for method in sweep.methods]
    assert names[:2] == ["fra, lr 0.001", "fra, lr 0.002"]
    assert len(names) == 7


def test_a_name_tells_what_varies_and_rule_files_may_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.sweep_plan.make_config", lambda flat: Config())  # runs no file
    text = "[sweep]\n[[sweep.methods]]\nmerge.rule = ['fra', './m.py:median']\nclient.lr = [1e-3]"
    sweep = read(tmp_path, text)
    assert [method.name for method in sweep.methods] == ["fra", "median"]
    assert sweep.methods[1].settings["merge.rule"] == f"{tmp_path / 'm.py'}:median"


def test_cases_of_other_files_are_meant_from_the_sweeps_folder(tmp_path: Path) -> None:
    sweep = read(tmp_path, "[sweep]\n[[sweep.cases]]\ndata.train = ['a.csv', 'b.csv']" + METHODS)
    assert [case.settings["data.train"] for case in sweep.cases] == [
        str(tmp_path / "a.csv"), str(tmp_path / "b.csv")
    ]  # fmt: skip


def test_a_setting_that_is_a_list_is_a_grid_only_as_a_list_of_lists(tmp_path: Path) -> None:
    sweep = read(tmp_path, """
[sweep]
[[sweep.methods]]
merge.rule = "fra"
[[sweep.cases]]
name = "skewed"
partition.by = "shares"
partition.shares = [[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]]
[[sweep.cases]]
name = "ranks"
client.ranks = [[2, 4, 8], [8, 8, 8]]
""")  # fmt: skip
    assert [case.name for case in sweep.cases] == ["skewed", "ranks, ranks [2, 4, 8]",
                                                   "ranks, ranks [8, 8, 8]"]  # fmt: skip
    method = sweep.methods[0]
    ranks = [sweep.trials(method, case, {})[0].config.client.ranks for case in sweep.cases]
    assert ranks == [[], [2, 4, 8], [8, 8, 8]]


def test_the_id_of_a_run_is_that_of_its_settings_and_not_of_its_name() -> None:
    def trial(**changes: object) -> Trial:
        flat = {key.replace("__", ".", 1): value for key, value in changes.items()}
        return Trial("fra", "", 0, make_config(flat), {}, {})

    assert trial(run__name="x", run__out="y").id == trial().id
    assert len({trial().id, trial(run__seed=1).id, trial(client__lr=2e-3).id}) == 3


OWN = '''"""A mean of the factors."""

from fedlora.adapter import mean_factors
from fedlora.rules import LAWS, rule


@rule(**dict.fromkeys(LAWS, "not looked at"))
def swept(prev, clients, weights):
    """The mean."""
    return mean_factors(clients, weights, prev.scaling)
'''


@pytest.mark.usefixtures("no_trace")
@pytest.mark.parametrize("tuned", [False, True])
def test_an_edited_rule_file_is_another_run(tmp_path: Path, tuned: bool) -> None:
    source = tmp_path / "swept.py"
    (tmp_path / "small.toml").write_text(
        "[sweep]\ntune = ['merge.rule']\n" if tuned else "[sweep]\n", encoding="utf-8"
    )
    with (tmp_path / "small.toml").open("a", encoding="utf-8") as file:
        file.write(f"[[sweep.methods]]\nname = 'm'\nmerge.rule = ['fra', '{source}:swept']\n")

    def ids() -> list[str]:
        sweep = load_sweep(
            tmp_path / "small.toml",
            own_rule=lambda rule: import_rule(rule) if ".py:" in rule else None,
        )
        groups = [t for group in sweep.groups for t in sweep.tuning_trials(*group)] or [
            t for group in sweep.groups for t in sweep.trials(*group, {})
        ]
        return [trial.id for trial in groups]

    source.write_text(OWN, encoding="utf-8")
    first = ids()
    assert ids() == first
    source.write_text(f"{OWN}\n", encoding="utf-8")
    again = ids()
    assert again[0] == first[0]  # fra
    assert again[1] != first[1]


@pytest.mark.usefixtures("no_trace")
def test_a_rule_file_that_is_edited_while_a_sweep_runs_ends_it(tmp_path: Path) -> None:
    """An OSError: it says nothing about the settings that were to be tried."""
    source = tmp_path / "swept.py"
    source.write_text(OWN, encoding="utf-8")
    code = rule_digest(f"{source}:swept")
    source.write_text(f"{OWN}\n", encoding="utf-8")
    with pytest.raises(OSError, match=r"swept\.py:swept' was changed meanwhile: start again"):
        _work({"merge.rule": f"{source}:swept"}, str(tmp_path / "run"), 1, code)
    assert not (tmp_path / "run").exists()


def test_the_ids_of_registered_rules_are_those_of_their_settings_alone() -> None:
    """Finished sweeps of earlier versions are found again."""
    config = make_config({"client.lr": 2e-3})
    flat = {k: v for k, v in config.flat().items() if k not in ("run.name", "run.out")}
    want = hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:12]
    assert Trial("fra", "", 0, config, {}, {}).id == want


def test_shared_settings_may_be_changed_from_outside(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n", encoding="utf-8")
    text = f"[data]\ntrain = 'rows.csv'\n[sweep]{METHODS}"
    sweep = read(tmp_path, text, "run.rounds=3")
    config = sweep.trials(sweep.methods[0], sweep.cases[0], {})[0].config
    assert (config.run.rounds, config.data.train) == (3, str(tmp_path / "rows.csv"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[run]\nrounds = 2", "has no .sweep. section"),
        ("[sweep]\nsedes = 2" + METHODS, "no 'sedes'; did you mean 'seeds'"),
        ("[sweep]\nseeds = 0" + METHODS, "sweep.seeds = 0 must be"),
        ("[sweep]\nseeds = [1, 1]" + METHODS, "must be a number of seeds or a list of different"),
        ("[sweep]\nseeds = [true]" + METHODS, "must be a number of seeds"),
        ("[sweep]", "at least one ..sweep.methods"),
        ("[sweep]\nmethods = 3", "must be a list of tables"),
        ("[sweep]\ntune = ['client.batch']" + METHODS, "'client.batch', but no method lists"),
        ("[sweep]\ntune = 'client.lr'" + METHODS, r"'client.lr' is no list of settings: \["),
        ("[sweep]\ntune = 5" + METHODS, "sweep.tune = 5 is no list"),
        ("[sweep]\nseeds = [1000]\ntune = ['client.lr']" + METHODS, "seed 1000 is in seeds and"),
        ("[sweep]\n[[sweep.methods]]\nmerge.rule = 'fro'", "unknown rule 'fro'"),
        ("[sweep]\n[[sweep.methods]]\nclient.learning = 3", "unknown setting 'client.learning'"),
        ("[sweep]\n[[sweep.methods]]\nrun.seed = 3", "list the seeds in .sweep."),
        ("[sweep]\n[[sweep.methods]]\nclient.lr = []", "client.lr is an empty list"),
        ("[data]\nholdout = 0\n[sweep]\ntune = ['client.lr']" + METHODS, "needs data.holdout"),
        ("[privacy]\nunit = 'client'\n[sweep]\ntune = ['client.lr']" + METHODS, "without noise"),
        (
            "[sweep]\ntune = ['privacy.unit']\n[[sweep.methods]]\n"
            "privacy.unit = ['none', 'client']",
            "unit = 'client'",
        ),
        ("[sweep]" + METHODS + METHODS, "two are called 'fra, lr 0.001'"),
        (
            f"[sweep]{CASES}" + METHODS.replace("merge", "cases = ['warm']\nmerge", 1),
            r"method 'fra, lr 0\.001': there is no case 'warm'; did you mean 'warm up'",
        ),
        (f"[sweep]{CASES}[[sweep.methods]]\ncases = ['cold']", "no .* runs in case 'warm up'"),
        (f"[sweep]{CASES}[[sweep.methods]]\ncases = 'cold'", "cases = 'cold' is no list"),
        (f"[sweep]{CASES}cases = ['cold']{METHODS}", "unknown setting 'cases'"),
        ("[sweep", "is not valid TOML"),
    ],
)
def test_a_bad_sweep_is_refused_before_anything_runs(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read(tmp_path, text)


def test_a_sweep_is_no_config_and_says_so(tmp_path: Path) -> None:
    from fedlora.config import load_config

    (tmp_path / "s.toml").write_text(f"[sweep]{METHODS}", encoding="utf-8")
    with pytest.raises(ValueError, match="fedlora sweep"):
        load_config(tmp_path / "s.toml")
