"""Sweeps of tiny runs: what is run, chosen and written, and that interruptions cost nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from bench import adapter_bytes, records
from tiny import toy_config, toy_rows, write_csv

from fedlora.config import make_config
from fedlora.resume import refuse_changes
from fedlora.run import execute, prepare
from fedlora.sweep import _problem, _work, best_point
from fedlora.sweep_plan import Trial, load_sweep
from fedlora.sweep_report.write import sweep_report
from fedlora.sweepdir import Score, heldout_score, is_finished, read_sweep, run_path

pytest_plugins = ["tiny"]
pytestmark = pytest.mark.slow
SWEEP = """
[sweep]
seeds = [0, 1]
tune = ["client.lr"]
[[sweep.methods]]
merge.rule = "fra"
client.lr = [1e-5, 3e-2]
[[sweep.methods]]
name = "alone"
run.mode = "local"
"""


@pytest.fixture
def file(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    data = str(write_csv(tmp_path / "rows.csv", toy_rows(90)))
    config = toy_config(tiny("bert"), data, evaluate__limit=10, run__rounds=4)
    path = tmp_path / "tiny.toml"
    path.write_text(config.toml() + SWEEP, encoding="utf-8")
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fedlora", "sweep", *map(str, arguments)]


def said(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False,
        env=os.environ | {"COLUMNS": "140"},
    )  # fmt: skip


def by_hand(folder: Path) -> tuple[float, float]:
    """Accuracy and minus the loss over all clients' held-out rows after the last round."""
    scores = records(folder)[-1]["heldout"]["clients"].values()
    rows = sum(score["examples"] for score in scores)
    hits = sum(score["accuracy"] * score["examples"] for score in scores)
    loss = sum(score["loss"] * score["examples"] for score in scores)
    return hits / rows, -loss / rows


def test_a_sweep_runs_what_is_missing_and_chooses_on_held_out_rows(
    file: Path, tmp_path: Path
) -> None:
    """Killed in the middle it goes on, a second time it runs nothing; runs are ordinary ones."""
    out = tmp_path / "sweep"
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command(file, "--out", out), stdout=stream, stderr=stream, start_new_session=True
        )
        while "2/6" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGSTOP)  # its worker too: nothing more ends meanwhile
        second = said(file, "--out", out)
        assert (second.returncode, "in use by another process" in second.stderr) == (2, True)
        process.send_signal(signal.SIGKILL)
        process.wait()
    known = {path.parent.name for path in out.glob("runs/*/summary.json")}
    assert len(known) in (2, 3)
    times = {name: (run_path(out, name) / "summary.json").stat().st_mtime_ns for name in known}
    os.killpg(process.pid, signal.SIGCONT)
    time.sleep(2)  # its worker has noticed

    done = said(file, "--out", out, "--jobs", 2)
    assert done.returncode == 0, done.stderr
    found = read_sweep(out)
    assert [(e.method, e.seed, e.tuning) for e in found.entries] == [
        ("fra", 1000, True), ("fra", 1000, True),
        ("fra", 0, False), ("fra", 1, False), ("alone", 0, False), ("alone", 1, False),
    ]  # fmt: skip
    assert {n: (run_path(out, n) / "summary.json").stat().st_mtime_ns for n in known} == times
    first, *_ = re.findall(r"1/6  fra, client.lr 1e-05, seed 1000, tuning: (.*)", log.read_text())
    assert re.fullmatch(r"held-out accuracy \d+\.\d%  about \d+ min left", first)
    *_, last = re.findall(r"6/6  .*, seed [01]: (.*)", done.stdout)
    assert re.fullmatch(r"accuracy \d+\.\d%", last)

    tuning = [entry for entry in found.entries if entry.tuning]
    scores = {e.grid["client.lr"]: by_hand(run_path(out, e.id)) for e in tuning}
    assert found.chosen("fra", "") == {"client.lr": max(scores, key=lambda lr: scores[lr])}
    for entry in tuning:
        score = heldout_score(run_path(out, entry.id))
        assert (score.accuracy, -score.loss) == pytest.approx(scores[entry.grid["client.lr"]])

    sweep = load_sweep(file)
    method, case = sweep.groups[0]
    trial = sweep.trials(method, case, found.chosen("fra", ""))[1]
    plain = execute(prepare(make_config({**trial.config.flat(), "run.out": str(tmp_path / "p")})))
    assert adapter_bytes(run_path(out, trial.id)) == adapter_bytes(plain)

    rows = pyarrow.parquet.read_table(out / "results.parquet").to_pylist()
    assert [row["finished"] for row in rows] == [True] * 6
    (row,) = [row for row in rows if row["id"] == trial.id]
    run = found.runs[trial.id]
    chosen = str(found.chosen("fra", "")["client.lr"])
    assert (row["method"], row["client.lr"], row["seed"]) == ("fra", chosen, 1)
    assert row["accuracy"] == run.final("accuracy")
    assert row["bytes_up"] == run.summary["bytes_up_total"]
    assert rows[4]["client.lr"] is None

    again = said(file, "--out", out)
    assert again.returncode == 0
    assert "seed" not in again.stdout.split("accuracy")[0]  # no line of a run
    assert "2/2" in again.stdout
    assert "other data" not in again.stdout

    rows_file = tmp_path / "rows.csv"
    rows_file.write_text(rows_file.read_text() + "good,pos\n")
    changed = said(file, "--out", out)
    assert changed.returncode == 0
    assert "4 of the finished runs were made with other data than is there now" in changed.stdout
    assert f"{rows_file} (data.train)" in changed.stdout


def test_a_killed_worker_ends_the_sweep_and_no_choice_is_made_without_its_run(
    file: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "sweep", tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command(file, "--out", out), stdout=stream, stderr=stream)
        while not any(out.glob("runs/*/metrics.jsonl")):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        (run,) = out.glob("runs/*")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [pid for pid in children if b"spawn_main" in cmdline(pid)]
        os.kill(int(workers[0]), signal.SIGKILL)
        assert process.wait(timeout=60) == 2
    assert "was killed, perhaps for memory" in log.read_text()
    assert not is_finished(run)
    assert [entry.tuning for entry in read_sweep(out).entries] == [True] * 2
    with pytest.raises(ValueError, match=r"not chosen yet \(0 of 2 tuning runs have ended\)"):
        sweep_report(out)


def cmdline(pid: str) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_run_that_fails_is_named_and_the_others_go_on(file: Path, tmp_path: Path) -> None:
    text = file.read_text().replace("client.lr = [1e-5, 3e-2]", "client.lr = [1e30]")
    file.write_text(text)
    out = tmp_path / "sweep"
    done = said(file, "--out", out)
    assert done.returncode == 1
    assert "2 runs did not end" in done.stderr
    assert "diverged" in done.stderr
    found = read_sweep(out)
    assert len(found.counted("alone", "")) == 2
    assert found.counted("fra", "") == []
    assert not any(is_finished(run_path(out, e.id)) for e in found.entries if e.method == "fra")


def test_a_method_whose_tuning_failed_stays_in_the_plan(file: Path, tmp_path: Path) -> None:
    file.write_text(file.read_text().replace("[1e-5, 3e-2]", "[1e29, 1e30]"))
    out = tmp_path / "sweep"
    done = said(file, "--out", out)
    assert "each value tried of 'fra' in case '' failed in a tuning run" in done.stderr
    found = read_sweep(out)
    assert [(e.tuning, e.seed) for e in found.entries if e.method == "fra"] == [
        (True, 1000), (True, 1000), (False, 0), (False, 1),
    ]  # fmt: skip
    assert found.chosen("fra", "") == {}


def test_the_plan_is_shown_without_running(file: Path, tmp_path: Path) -> None:
    done = said(file, "--out", tmp_path / "sweep", "--plan")
    assert done.returncode == 0
    assert "alone" in done.stdout
    assert not (tmp_path / "sweep").exists()


def test_the_plan_counts_the_steps_of_the_clients_that_take_part(tmp_path: Path) -> None:
    file, rows = tmp_path / "few.toml", write_csv(tmp_path / "rows.csv", toy_rows(2000))
    file.write_text(
        f"[run]\nrounds = 3\n[data]\ntrain = '{rows}'\n[partition]\nclients = 50\n"
        "[client]\nsteps = 2\n[merge]\nparticipation = 0.2\n[sweep]\nseeds = 4\n"
        "[[sweep.methods]]\nmerge.rule = 'fra'\n[[sweep.methods]]\nrun.mode = 'local'\n"
    )
    done = said(file, "--plan")
    (fra,) = [line.split() for line in done.stdout.splitlines() if line.startswith("fra")]
    (local,) = [line.split() for line in done.stdout.splitlines() if line.startswith("local")]
    assert fra == ["fra", "0", "4", "240"]
    assert local == ["local", "0", "4", "1,200"]
    done = said(file, "--plan", "--set", "client.epochs=1")
    (fra,) = [line.split() for line in done.stdout.splitlines() if line.startswith("fra")]
    assert fra == ["fra", "0", "4", "-"]
    done = said(file, "--plan", "--set", "partition.by=column", "--set", "partition.column=label")
    (fra,) = [line.split() for line in done.stdout.splitlines() if line.startswith("fra")]
    assert fra == ["fra", "0", "4", "-"]  # two clients, not 50


@pytest.mark.parametrize("plan", [["--plan"], []])
def test_bad_data_is_told_once_before_anything_runs(
    file: Path, tmp_path: Path, plan: list[str]
) -> None:
    with (tmp_path / "rows.csv").open("a") as stream:
        stream.write("a text,unheard of\n")
    text = file.read_text().replace("labels = []", "labels = ['neg', 'pos']")
    file.write_text(text)
    done = said(file, "--out", tmp_path / "sweep", *plan)
    assert done.returncode == 2
    assert done.stderr.count("unheard of") == 1
    assert not (tmp_path / "sweep").exists()


TRIED = {  # learning rate -> held-out accuracy and loss on three tuning seeds
    1e-3: [(0.80, 0.5), (0.80, 0.5), (0.83, 0.5)],
    2e-3: [(0.81, 0.4), (0.82, 0.4), (0.80, 0.4)],  # the same mean, another last bit
    3e-3: [(0.99, 0.1), (0.99, 0.1), (0.99, 0.1)],
}


def chosen(failed: Collection[tuple[float, int]], monkeypatch: pytest.MonkeyPatch) -> object:
    """The rate that is chosen where these (rate, seed) have failed."""
    flat = {"run.rounds": 1}
    trials = [
        Trial("fra", "", seed, make_config({**flat, "client.lr": lr, "run.seed": seed}),
              {"client.lr": lr}, {}, tuning=True)
        for lr in TRIED for seed in range(3)
    ]  # fmt: skip
    scores = {t.id: Score(*TRIED[t.grid["client.lr"]][t.seed]) for t in trials}
    monkeypatch.setattr("fedlora.sweep.heldout_score", lambda path: scores[path.name])
    point = best_point(
        trials, Path(), {t.id for t in trials if (t.grid["client.lr"], t.seed) in failed}
    )
    return point and point["client.lr"]


def test_a_value_that_failed_on_a_tuning_seed_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert chosen([], monkeypatch) == 3e-3
    assert chosen([(3e-3, 1)], monkeypatch) == 2e-3
    assert chosen([(lr, 0) for lr in TRIED], monkeypatch) is None


def test_equal_means_are_a_tie_and_the_lower_loss_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(a for a, _ in TRIED[1e-3]) != sum(a for a, _ in TRIED[2e-3])
    assert chosen([(3e-3, 0)], monkeypatch) == 2e-3


def test_a_renamed_method_goes_on_with_its_stopped_runs() -> None:
    config = make_config({"run.name": "old"})
    refuse_changes(Path("run"), config, make_config({"run.name": "new", "run.out": "there"}))
    with pytest.raises(ValueError, match=r"client\.lr"):
        refuse_changes(Path("run"), config, make_config({"client.lr": 2e-3}))


def ended_by(error: Exception) -> Future[None]:
    future: Future[None] = Future()
    future.set_exception(error)
    return future


def test_a_full_disk_is_no_result_of_a_run() -> None:
    with pytest.raises(OSError, match="No space left"):
        _problem(ended_by(OSError(28, "No space left on device")))


@pytest.mark.parametrize("kind", ["gpu", "cpu", "python"])
def test_nor_is_want_of_memory(kind: str) -> None:
    error: Exception = MemoryError("all is taken")
    if kind == "gpu":
        error = torch.OutOfMemoryError("CUDA out of memory")
    if kind == "cpu":
        with pytest.raises(RuntimeError) as raised:
            torch.empty(10**15)
        error = raised.value
    told = rf"too little memory.*fewer --jobs.*{re.escape(str(error)[:9])}"
    with pytest.raises(ChildProcessError, match=told):
        _problem(ended_by(error))


def test_what_training_raises_is_the_runs_own_problem() -> None:
    assert _problem(ended_by(RuntimeError("shapes\ndiffer"))) == "shapes differ"
    assert _problem(ended_by(ValueError())) == "ValueError"


def test_nor_is_a_stopped_run_that_cannot_go_on(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its rows are other ones now: that must not count against its learning rate."""
    rows = write_csv(tmp_path / "rows.csv", toy_rows(60))
    config = toy_config(tiny("bert"), str(rows), run__out=str(tmp_path / "run"), run__rounds=1)
    execute(prepare(config))
    (tmp_path / "run" / "summary.json").unlink()
    write_csv(rows, toy_rows(50))
    with pytest.raises(ChildProcessError, match=r"cannot go on: .*other data.*or remove .*run to"):
        _work(config.flat(), str(tmp_path / "run"), 1, "")


def test_nor_is_a_private_run_that_stopped_and_has_nothing_left_to_spend(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    def watch(event: str, facts: Mapping[str, Any]) -> None:
        if event == "fitted":
            raise KeyboardInterrupt

    config = toy_config(
        tiny("bert"), str(write_csv(tmp_path / "rows.csv", toy_rows(60))), run__rounds=1,
        run__out=str(tmp_path / "run"), privacy__unit="example", privacy__delta=1e-3,
        privacy__share_metrics=True,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        execute(prepare(config), watch)
    with pytest.raises(ChildProcessError, match=r"cannot pay for it.*or remove .*run to"):
        _work(config.flat(), str(tmp_path / "run"), 1, "")
