"""A run that stopped goes on to the same bytes, or says why it cannot."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from bench import Place, adapter_bytes, records, summary
from tiny import toy_rows, write_csv

from fedlora.files import locked
from fedlora.own_rules import import_rule
from fedlora.resume import find
from fedlora.run import execute, prepare

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]


@pytest.fixture
def place(tiny: Tiny, tmp_path: Path) -> Place:
    return Place(tiny("bert"), tmp_path)


class Stopped(BaseException):
    """A stop that nothing in the library catches, as a kill would be."""


def stopped_after(
    place: Place, name: str, round: int, event: str = "round", **changes: Any
) -> Path:
    """A run whose process ends in this round, without any saving."""
    job = place.job(name, **changes)

    def watch(happened: str, facts: Any) -> None:
        if happened == event and facts.get("round") == round:
            raise Stopped

    with pytest.raises(Stopped):
        execute(job, watch)
    for left in ("adapter", "best"):  # what `finally` saves, a kill does not
        shutil.rmtree(job.folder / left, ignore_errors=True)
    (job.folder / "summary.json").unlink(missing_ok=True)
    return job.folder


def resumed(folder: Path) -> Path:
    config, state = find(folder)
    return execute(prepare(config, state))


CASES = [
    {},
    {"merge__rule": "fedex"},
    {"merge__rule": "fedsa"},
    {"merge__rule": "rolora", "merge__participation": 0.5},
    {"merge__rule": "hybrid", "merge__options": {"switch": 1}},
    {"merge__rule": "hybrid", "merge__options": {"switch": 3}, "merge__participation": 0.6},
    {"merge__rule": "hybrid", "merge__options": {"patience": 1}},
    {"merge__residual": "carry"},
    {"merge__head": "local", "client__optimiser": "keep"},
    {"client__ranks": [1, 2, 3], "client__optimiser": "transport"},
    {"run__mode": "central"},
    {"run__mode": "local"},
    {"run__save_best": True, "evaluate__every": 2},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_a_resumed_run_ends_in_the_same_bytes(place: Place, changes: dict[str, Any]) -> None:
    whole = place.run("whole", run__rounds=4, **changes)
    folder = stopped_after(place, "stopped", 2, run__rounds=4, **changes)
    assert resumed(folder) == folder
    saved = sorted(path.relative_to(whole) for path in whole.rglob("adapter_model.safetensors"))
    assert saved
    for path in saved:
        assert (folder / path).read_bytes() == (whole / path).read_bytes()
    left, right = records(whole), records(folder)
    for record in [*left, *right]:
        del record["seconds"]
    assert left == right
    assert summary(folder)["final"] == summary(whole)["final"]
    assert summary(folder)["confusion"] == summary(whole)["confusion"]
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize(("event", "round"), [
    ("fit", 1), ("fitted", 1), ("evaluate", 1), ("round", 0), ("round", 1), ("fit", 3), ("round", 3)
])  # fmt: skip
def test_a_run_may_stop_anywhere(place: Place, event: str, round: int) -> None:
    whole = place.run("whole", run__rounds=3)
    folder = stopped_after(place, "stopped", round, event, run__rounds=3)
    resumed(folder)
    assert adapter_bytes(folder) == adapter_bytes(whole)


def test_a_run_that_was_interrupted_by_hand_is_resumed(place: Place) -> None:
    """Its directory holds an adapter and a summary of where it stopped: they are replaced."""
    whole = place.run("whole", run__rounds=3, run__save_best=True)
    job = place.job("stopped", run__rounds=3, run__save_best=True)

    def watch(happened: str, facts: Any) -> None:
        if happened == "fit" and facts["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job, watch)
    assert summary(job.folder)["interrupted"]
    resumed(job.folder)
    assert not summary(job.folder)["interrupted"]
    for kind in ("adapter", "best"):
        assert adapter_bytes(job.folder, kind) == adapter_bytes(whole, kind)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(place: Place) -> None:
    whole = place.run("whole", run__rounds=4)
    folder = stopped_after(place, "stopped", 3, run__rounds=4)
    newest = max((folder / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    config, state = find(folder)
    assert state.checkpoint is not None
    assert state.checkpoint.round == 2
    assert any("round-000003.ckpt is damaged" in problem for problem in state.problems)
    execute(prepare(config, state))
    assert adapter_bytes(folder) == adapter_bytes(whole)


def test_without_a_whole_checkpoint_a_run_is_refused_and_untouched(place: Place) -> None:
    folder = stopped_after(place, "stopped", 3, run__rounds=4)
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"rubbish")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"no whole checkpoint to resume from: .*damaged.*damaged"):
        find(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_changed_data_file_is_refused_by_name(place: Place) -> None:
    """The promise is the same bytes: other rows would give others, with nothing said."""
    folder = stopped_after(place, "stopped", 1)
    written = json.loads((folder / "versions.json").read_text())
    for file, key, rows in ((place.train, "data.train", 48), (place.dev, "data.evaluate", 20)):
        assert written[key] == f"sha256 {sha256(file.read_bytes()).hexdigest()}, {rows} rows"
    for file, key, rows in ((place.train, "data.train", 48), (place.dev, "data.evaluate", 20)):
        kept = file.read_bytes()
        for changed in (kept + b"good,pos\n", b""):
            file.write_bytes(changed) if changed else file.unlink()
            with pytest.raises(ValueError, match="begun with other data") as caught:
                find(folder)
            assert f"{file} ({key})" in str(caught.value)
            assert f"{rows} rows then" in str(caught.value)
            file.write_bytes(kept)
    now = {key: value for key, value in written.items() if not key.startswith("data.")}
    assert find(folder)[1].notes(now) == ["resumed after round 1"]


def test_a_clients_changed_file_is_refused_by_name(place: Place, tmp_path: Path) -> None:
    clients = {name: str(write_csv(tmp_path / f"{name}.csv", toy_rows(16))) for name in "ab"}
    folder = stopped_after(place, "stopped", 1, data__clients=clients, data__labels=["neg", "pos"])
    Path(clients["b"]).write_text(Path(clients["b"]).read_text().replace("good", "bad"))
    with pytest.raises(ValueError, match=r"b\.csv \(data\.clients\.b\) .* 16 rows then") as caught:
        find(folder)
    assert "a.csv" not in str(caught.value)


def test_a_changed_config_is_refused_with_each_difference(place: Place) -> None:
    folder = stopped_after(place, "stopped", 1)
    with pytest.raises(
        ValueError,
        match=r"client\.lr = 0\.01 in the run, 0\.02 now; merge\.rule = 'fra' .*'fedavg'",
    ):
        find(folder, place.config("stopped", client__lr=0.02, merge__rule="fedavg"))
    assert find(folder, place.config("elsewhere", run__name="stopped"))[1].checkpoint is not None


OWN = '''"""A mean of the factors, halved or not."""

from fedlora.adapter import Factors, mean_factors
from fedlora.rules import LAWS, rule


@rule(**dict.fromkeys(LAWS, "not looked at"))
def own(prev, clients, weights):
    """The mean times a number."""
    mean = mean_factors(clients, weights, prev.scaling)
    return Factors(mean.A, 1.0 * mean.B, mean.scaling)
'''


@pytest.mark.usefixtures("no_trace")
def test_a_run_goes_on_with_the_rule_file_that_it_began_with_alone(
    place: Place, tmp_path: Path
) -> None:
    """Its rule.py would else not be the code that made the result."""
    source = tmp_path / "own.py"
    source.write_text(OWN, encoding="utf-8")
    rule = f"{source}:own"
    import_rule(rule)
    whole = place.run("whole", run__rounds=3, merge__rule=rule)
    folder = stopped_after(place, "stopped", 2, run__rounds=3, merge__rule=rule)
    source.write_text(OWN.replace("1.0", "0.5"), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"own\.py was changed since .*copy .*stopped/rule\.py back .* new run"
    ):
        find(folder)
    source.unlink()
    with pytest.raises(ValueError, match=r"own\.py is gone since"):
        find(folder, place.config("stopped", run__rounds=3, merge__rule=rule))
    source.write_bytes((folder / "rule.py").read_bytes())
    assert adapter_bytes(resumed(folder)) == adapter_bytes(whole)


def test_a_run_that_has_ended_is_not_resumed(place: Place) -> None:
    with pytest.raises(ValueError, match="has ended: there is nothing to resume"):
        find(place.run("whole"))


def test_a_run_that_another_process_is_at_is_not_resumed(place: Place) -> None:
    """Two that append to one log damage it, whichever of them began the run."""
    folder = stopped_after(place, "stopped", 2, run__rounds=4)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    config, state = find(folder)
    job = prepare(config, state)
    with locked(folder):
        with pytest.raises(ValueError, match=rf"in use by another process \(process {os.getpid()}"):
            find(folder)
        with pytest.raises(ValueError, match="in use by another process"):
            execute(job)
        with pytest.raises(ValueError, match="in use by another process"):
            place.job("stopped")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_that_went_on_since_it_was_read_is_not_cut_back(place: Place) -> None:
    folder = stopped_after(place, "stopped", 1, run__rounds=4)
    late = prepare(*find(folder))
    resumed(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="went on in another process"):
        execute(late)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_that_stopped_says_how_it_goes_on_where_it_would_be_begun_anew(place: Place) -> None:
    """Its ledger counts what its data have spent: nobody is told to remove it."""
    folder = stopped_after(place, "stopped", 2, run__rounds=4)
    with pytest.raises(
        ValueError, match=rf"stopped after round 2: go on with `fedlora run --resume {folder}`"
    ) as caught:
        place.job("stopped", run__rounds=4)
    assert "remove" not in str(caught.value)
    resumed(folder)
    with pytest.raises(ValueError, match="exists already and was not touched") as caught:
        place.job("stopped")
    assert "remove" not in str(caught.value)
