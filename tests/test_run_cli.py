"""The command line on whole runs: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from bench import Place, records, summary
from tiny import LABELS, toy_rows, write_csv

from fedlora import __version__
from fedlora.cli import main
from fedlora.runlog import read_config

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]


@dataclass(frozen=True)
class Said:
    """What a command said and its exit code."""

    code: int
    out: str
    err: str


class Cli:
    """The command line in this process, in the folder of a config file."""

    def __init__(
        self, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.place, self.monkeypatch, self.capsys = place, monkeypatch, capsys
        self.file = place.folder / "config.toml"
        self.file.write_text(place.config().toml(), encoding="utf-8")
        monkeypatch.chdir(place.folder)
        monkeypatch.setenv("COLUMNS", "120")

    def __call__(self, *arguments: object) -> Said:
        self.monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = self.capsys.readouterr()
        return Said(int(ended.value.code or 0), captured.out, captured.err)

    def run(self, *changes: str) -> Said:
        sets = [part for change in changes for part in ("--set", change)]
        return self("run", self.file, *sets)


@pytest.fixture
def cli(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Cli:
    return Cli(Place(tiny("bert"), tmp_path), monkeypatch, capsys)


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with named labels and local heads beside one for all."""
    place = Place(tiny("bert"), tmp_path_factory.mktemp("finished"))
    names = {"data__labels": list(LABELS), "data__label_names": ["bad", "nice"]}
    place.run("own", merge__head="local", run__rounds=1)
    return place.run("run", **names)


# ---------------------------------------------------------------- a run


def test_a_run_into_a_pipe_is_one_line_a_round(cli: Cli) -> None:
    said = cli.run("run.rounds=3")
    folder = cli.place.folder / "run"
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0] == f"{folder}: 3 clients, 36 training rows"
    log = records(folder)
    for round, line in enumerate(lines[1:5]):
        assert line.startswith(f"round {round}/3  accuracy {log[round]['global']['accuracy']:.1%}")
    assert len(lines) == 4 + 1 + 3
    assert lines[-3:] == [
        f"adapter  {folder / 'adapter'}",
        f"figure   {folder / 'report.png'}",
        f"log      {folder / 'metrics.jsonl'}",
    ]
    assert all(Path(line.split(maxsplit=1)[1]).exists() for line in lines[-3:])
    assert "\x1b" not in said.out


def test_overrides_with_relative_paths_are_still_right_in_the_run_directory(cli: Cli) -> None:
    """Paths on the command line are meant from the working directory, those in a file from its."""
    said = cli.run(
        "data.train=train.csv", "data.evaluate=dev.csv", "run.out=deep/er", "run.rounds=1"
    )
    assert said.code == 0
    kept = read_config(cli.place.folder / "deep" / "er")
    assert Path(kept.data.train) == cli.place.train
    assert Path(kept.data.evaluate) == cli.place.dev


@pytest.mark.slow
def test_an_interrupt_from_the_keyboard_leaves_a_readable_run(cli: Cli) -> None:
    place = cli.place
    command = [sys.executable, "-c", "from fedlora.cli import main; main()", "run", str(cli.file)]
    process = subprocess.Popen(
        [*command, "--set", "run.rounds=10000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # a test run in the background of a shell ignores SIGINT, and hands that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stdout or ():
            if line.startswith("round 2/"):
                break
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    folder = place.folder / "run"
    assert err.startswith(f"fedlora: interrupted; {folder} stopped after round ")
    assert err.endswith(f"go on with `fedlora run --resume {folder}`\n")
    assert len(err.splitlines()) == 1
    assert summary(folder)["interrupted"] is True
    assert summary(folder)["rounds"] == records(folder)[-1]["round"] >= 2
    for said in (cli("report", folder), cli("evaluate", folder, place.dev)):
        assert (said.code, said.err) == (0, "")


# ---------------------------------------------------------------- mistakes

MISTAKES = [
    ("run.nmae=x", "unknown setting 'run.nmae'; did you mean 'run.name'?"),
    ("client.steps=0", "client.steps = 0 is out of range"),
    ("client.lr=fast", "client.lr = 'fast' is not a number"),
    ("merge.rule=frra", "unknown rule 'frra'; did you mean 'fra'?"),
    ("merge.options.gague=balanced", "did you mean 'gauge'?"),
    ("run.mode=centrall", "did you mean 'central'?"),
    ("noequals", "has no '='"),
    ("data.train=nosuch.csv", "nosuch.csv"),
    ("data.text=txet", "did you mean 'text'?"),
    ('data.labels=["neg", "psoitive"]', "line 3: unknown label 'pos'"),
    ("data.evaluate=header.csv", "header.csv has no rows"),
    ("data.holdout=0", "run.save_best needs data.holdout"),
    ("partition.by=column", "partition.by = 'column' needs partition.column"),
    ("partition.clients=60", "would hold no rows"),
    ("model.name=/no/such/model", "there is no folder /no/such/model"),
    ("model.name=./models/x", "models/x"),
    ("model.name=builtin:mini", "did you mean 'builtin:minilm'?"),
    ("data.train=patients.xlsx", "the endings read are csv, tsv, jsonl, json, parquet"),
    ("data.train=.", "is a folder: name one file, or one for each client"),
    ("data.text=label", "would be the text and its label too"),
    ("run.device=gpu", "did you mean 'cuda'?"),
    ("model.targets=quary", "did you mean 'query'?"),
    ("model.rank=99", "take at most 32"),
    ("model.pad_token=<nope>", "is not in the vocabulary"),
    ("run.device=mps", "is not available here"),
    ("data.max_length=33", "data.max_length"),
    ("run.out=train.csv/run", "train.csv"),
]


@pytest.mark.parametrize(("change", "words"), MISTAKES, ids=[change for change, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_no_run(
    cli: Cli, change: str, words: str
) -> None:
    long = " ".join(["good"] * 60)
    write_csv(cli.place.train, [*toy_rows(48), (long, "pos")])
    write_csv(cli.place.folder / "header.csv", [])
    before = sorted(cli.place.folder.rglob("*"))
    said = cli.run("run.save_best=true", change)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("fedlora: ")
    assert len(said.err.splitlines()) == 1
    assert words in said.err
    assert sorted(cli.place.folder.rglob("*")) == before


def test_a_run_directory_is_never_written_over(cli: Cli) -> None:
    folder = cli.place.folder / "run"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    said = cli.run()
    assert said.code == 2
    assert "exists already and was not touched" in said.err
    assert [file.name for file in folder.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_a_run_directory_that_is_there_is_refused_before_anything_is_loaded(cli: Cli) -> None:
    """Not after the seconds that transformers and a base model take."""
    (cli.place.folder / "run").mkdir()
    lines = [
        "import sys",
        "from fedlora.cli import _loaded, _run",
        "from pathlib import Path",
        f"config = _loaded(Path({str(cli.file)!r}), [])",
        "try:\n    _run(config)\nexcept ValueError as error:\n    print(error)",
        "print('transformers' in sys.modules)",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "exists already and was not touched" in done.stdout
    assert done.stdout.endswith("False\n")


def test_a_run_goes_into_the_users_home_when_told_so(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shells leave the ~ of `--set run.out=~/mine` as it is."""
    home = cli.place.folder / "home"
    monkeypatch.setenv("HOME", str(home))
    assert cli.run("run.out=~/mine", "run.rounds=1").code == 0
    assert (home / "mine/summary.json").is_file()


@pytest.mark.parametrize("name", ["a/b", "../up", "/tmp/x", "..", ""])
def test_a_runs_name_that_is_a_path_is_refused(cli: Cli, name: str) -> None:
    """It would write outside runs/."""
    text = cli.file.read_text().replace(f'out = "{cli.place.folder}/run"', 'out = ""')
    cli.file.write_text(text)
    said = cli.run(f"run.name={name}")
    assert said.code == 2
    assert f"run.name = {name!r}" in said.err
    assert "run.out" in said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nosuch.toml"], "cannot read the config nosuch.toml"),
        (["run", "broken.toml"], "broken.toml is not valid TOML"),
        (["run", "section.toml"], "unknown section 'modle'; did you mean 'model'?"),
        (["evaluate", "nosuch", "dev.csv"], "nosuch is not a run directory"),
        (["evaluate", "{run}", "nosuch.csv"], "nosuch.csv"),
        (["evaluate", "{run}", "other.csv"], "line 2: unknown label 'poss'; did you mean 'pos'?"),
        (["evaluate", "{run}", "dev.csv", "--client", "0"], "it has one for all"),
        (["evaluate", "{own}", "dev.csv"], "choose one of 0, 1, 2 with --client"),
        (["evaluate", "{own}", "dev.csv", "--client", "7"], "no adapter of client '7'"),
        (["predict", "nosuch", "dev.csv"], "nosuch is not a run directory"),
        (["predict", "{run}", "dev.csv", "-o", "dev.csv"], "exists already; nothing was written"),
        (["predict", "{run}", "dev.csv", "-o", "no/such/folder.csv"], "no/such"),
        (["predict", "{run}", "untitled.csv"], "which column is the text?"),
        (["report", "nosuch"], "'nosuch' is not a run directory"),
        (["report", "{run}", "{own}"], "2 runs and no folder to write to"),
        (["rules", "frra"], "unknown rule 'frra'; did you mean 'fra'?"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_mistakes_with_other_commands_are_one_line_too(
    cli: Cli, finished: Path, arguments: list[str], words: str
) -> None:
    folder = cli.place.folder
    (folder / "broken.toml").write_text("[run\n")
    (folder / "section.toml").write_text("[modle]\nrank = 3\n")
    write_csv(folder / "other.csv", [["good", "poss"]])
    write_csv(folder / "untitled.csv", [["good", "x"]], ["comment", "verdict"])
    runs = {"run": finished, "own": finished.parent / "own"}
    said = cli(*(argument.format(**runs) for argument in arguments))
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("fedlora: ")
    assert len(said.err.splitlines()) == 1
    assert words in said.err


# ---------------------------------------------------------------- after a run


def test_evaluate_prints_the_scores_of_the_log(cli: Cli, finished: Path) -> None:
    said = cli("evaluate", finished, finished.parent / "dev.csv")
    assert (said.code, said.err) == (0, "")
    final, confusion = (summary(finished)[key] for key in ("final", "confusion"))
    printed = [line.split() for line in said.out.splitlines()]
    assert printed[0] == ["accuracy", f"{final['accuracy']:.4f}"]
    assert printed[1] == ["macro_f1", f"{final['macro_f1']:.4f}"]
    assert printed[2] == ["loss", f"{final['loss']:.4f}"]
    assert printed[3] == ["examples", "20"]
    assert printed[-2:] == [
        [name, *map(str, row)] for name, row in zip(("bad", "nice"), confusion, strict=True)
    ]


def test_predictions_are_one_row_a_text_and_agree_with_the_scores(cli: Cli, finished: Path) -> None:
    rows = toy_rows(20, seed=9)
    file = write_csv(cli.place.folder / "new.csv", [[text] for text, _ in rows], ["text"])
    said = cli("predict", finished, file)
    assert (said.code, said.err) == (0, "")
    told = list(csv.DictReader(io.StringIO(said.out)))
    assert list(told[0]) == ["text", "label", "p(bad)", "p(nice)"]
    assert [row["text"] for row in told] == [text for text, _ in rows]
    for row in told:
        bad, nice = float(row["p(bad)"]), float(row["p(nice)"])
        assert bad + nice == pytest.approx(1, abs=2e-6)
        assert row["label"] == ("nice" if nice > bad else "bad")
    names = dict(zip(LABELS, ("bad", "nice"), strict=True))
    right = sum(row["label"] == names[label] for row, (_, label) in zip(told, rows, strict=True))
    assert right / 20 == summary(finished)["final"]["accuracy"]
    said = cli("predict", finished, file, "-o", "answers.csv")
    assert said.code == 0
    assert list(csv.DictReader(io.StringIO(Path("answers.csv").read_text()))) == told


def test_predictions_keep_the_files_other_columns(cli: Cli, finished: Path) -> None:
    """Else the rows' ids are lost; what is called as one of ours gets another name."""
    rows = [(f"id-{n}", text, label, n) for n, (text, label) in enumerate(toy_rows(5, seed=9))]
    file = write_csv(cli.place.folder / "new.csv", rows, ["id", "text", "label", "note, long"])
    told = list(csv.DictReader(io.StringIO(cli("predict", finished, file).out)))
    names = ["text", "label", "p(bad)", "p(nice)", "id", "input label", "note, long"]
    assert list(told[0]) == names
    for row, (id, text, label, note) in zip(told, rows, strict=True):
        kept = (row["id"], row["text"], row["input label"], row["note, long"])
        assert kept == (id, text, label, str(note))


def test_texts_are_read_from_the_column_that_the_run_was_trained_on(
    cli: Cli, finished: Path
) -> None:
    """Not from the first that looks like one: the run's texts were in `text`."""
    rows = [("never read", text, label) for text, label in toy_rows(20, seed=9)]
    new = write_csv(cli.place.folder / "new.csv", rows, ["sentence", "text", "label"])
    told = list(csv.DictReader(io.StringIO(cli("predict", finished, new).out)))
    assert [row["text"] for row in told] == [text for _, text, _ in rows]
    assert [row["sentence"] for row in told] == ["never read"] * 20
    accuracy = summary(finished)["final"]["accuracy"]
    assert cli("evaluate", finished, new).out.startswith(f"accuracy   {accuracy:.4f}")


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize(
    ("header", "message"),
    [
        (["premise", "hypothesis", "label"], "has pairs (premise, hypothesis) where the run was"),
        (["body", "title", "label"], "which column is the text? The run was trained on single"),
    ],
)
def test_texts_of_another_shape_than_the_runs_are_refused(
    cli: Cli, finished: Path, command: str, header: list[str], message: str
) -> None:
    rows = [(text, "more", label) for text, label in toy_rows(4)]
    said = cli(command, finished, write_csv(cli.place.folder / "new.csv", rows, header))
    assert said.code == 2
    assert message in said.err
    assert "rename" in said.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "{run}", "nosuch.csv"],
        ["evaluate", "{run}", "other.csv"],
        ["predict", "{run}", "nosuch.csv"],
        ["predict", "{run}", "other.csv", "-o", "other.csv"],
        ["predict", "{run}", "other.csv", "-o", "no/such/folder.csv"],
        ["predict", "{cut}", "other.csv"],
    ],
    ids=" ".join,
)
def test_mistakes_about_files_are_found_before_a_model_is_loaded(
    cli: Cli, finished: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_csv(cli.place.folder / "other.csv", [["good", "poss"]])
    cut = cli.place.folder / "cut"
    shutil.copytree(finished, cut)
    shutil.rmtree(cut / "adapter")
    (cut / "summary.json").unlink()

    def loads(*anything: object) -> None:
        raise RuntimeError("a model is loaded")

    monkeypatch.setattr("fedlora.predictor.configured_model", loads)
    said = cli(*(argument.format(run=finished, cut=cut) for argument in arguments))
    assert (said.code, said.out) == (2, "")
    if arguments[1] == "{cut}":
        assert f"{cut} has no adapter yet" in said.err
        assert f"go on with `fedlora run --resume {cut}`" in said.err


def test_each_clients_own_adapter_can_be_asked(cli: Cli, finished: Path) -> None:
    own, dev = finished.parent / "own", finished.parent / "dev.csv"
    last = records(own)[-1]["clients"]
    printed = {c: cli("evaluate", own, dev, "--client", c).out for c in last}
    assert all(out.startswith("accuracy") for out in printed.values())
    assert len(set(printed.values())) == 3


def test_a_partition_is_shown_before_anything_is_trained(cli: Cli) -> None:
    said = cli("partition", cli.file, "--set", "partition.clients=2")
    assert (said.code, said.err) == (0, "")
    lines = [line.split() for line in said.out.splitlines()]
    assert lines[0] == ["client", "neg", "pos", "rows"]
    assert ["0", "12", "12", "24"] in lines
    assert ["1", "12", "12", "24"] in lines
    assert "48 of 48 rows" in said.out
    assert "few rows" not in said.out
    assert not (cli.place.folder / "run").exists()
    said = cli("partition", cli.file, "--set", "partition.clients=6", "--set", "data.evaluate=")
    assert "few rows: 0 trains on 6, " in said.out
    assert "on the clients' own held-out rows, 12 in all" in said.out


def test_a_run_says_what_is_odd_about_its_data(cli: Cli) -> None:
    """In lines of its own at the start, and in the card and the figure what the scores are of."""
    said = cli.run("partition.clients=4", "data.evaluate=", "run.rounds=1")
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[1] == "few rows: " + ", ".join(f"{client} trains on 8" for client in range(4))
    assert "on the clients' own held-out rows, 16 in all" in lines[2]
    card = (cli.place.folder / "run" / "adapter" / "README.md").read_text()
    assert "Evaluation on 16 held-out rows of the clients themselves (no set apart)" in card


def test_the_version_is_told(cli: Cli) -> None:
    said = cli("--version")
    assert (said.code, said.out) == (0, f"fedlora {__version__}\n")


def test_a_report_of_several_runs_is_written_where_asked(cli: Cli, finished: Path) -> None:
    said = cli("report", finished, finished.parent / "own", "-o", "both")
    assert (said.code, said.err) == (0, "")
    assert said.out.split() == ["both/report.png", "both/report.svg", "both/report.md"]
    assert all(Path(path).stat().st_size > 100 for path in said.out.split())


def test_names_of_labels_and_columns_are_no_markup(cli: Cli) -> None:
    labels = "data.label_names=['[/urgent]', '[routine]']".replace("'", '"')
    said = cli("partition", cli.file, "--set", 'data.labels=["neg", "pos"]', "--set", labels)
    assert said.code == 0
    assert said.out.split()[:4] == ["client", "[/urgent]", "[routine]", "rows"]


def test_a_table_in_a_pipe_keeps_its_figures(cli: Cli) -> None:
    names = [f"a label that is long {number}" for number in range(15)]
    rows = [(f"text {row}", names[row % 15]) for row in range(600)]
    file = write_csv(cli.place.folder / "many.csv", rows)
    cli.monkeypatch.delenv("COLUMNS")
    said = cli("partition", cli.file, "--set", f"data.train={file}", "--set", "data.evaluate=")
    assert "…" not in said.out
    assert all(name in said.out for name in names)


def test_nodes_that_bring_their_own_data_are_no_run_on_this_machine(cli: Cli) -> None:
    """Without files the built-in reviews would have been taken."""
    sets = ("--set", 'flower.clients=["north", "south"]', "--set", "data.train=")
    for command in (
        ("partition", cli.file),
        ("run", cli.file),
        ("run", cli.file, "--engine", "flower"),
    ):
        said = cli(*command, *sets)
        assert said.code == 2
        assert "bring their own data: write a project with `fedlora flower init" in said.err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "too little memory: take a smaller client"),
        (MemoryError(), "too little memory"),
        (ImportError("figures need matplotlib"), "figures need matplotlib"),
    ],
)
def test_what_the_machine_lacks_is_one_line_too(cli: Cli, error: Exception, says: str) -> None:
    def raising() -> None:
        raise error

    cli.monkeypatch.setattr("fedlora.cli.app", raising)
    said = cli("status")
    assert said.code == 2
    assert says in said.err


def test_a_fault_of_ours_keeps_its_traceback(cli: Cli) -> None:
    def raising() -> None:
        raise RuntimeError("shapes differ")

    cli.monkeypatch.setattr("fedlora.cli.app", raising)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main()


def test_predictions_are_read_back_whatever_ends_the_lines_of_a_text(
    cli: Cli, finished: Path
) -> None:
    texts = ["one", "two\rtwo", "three\r\nthree", 'a "quote", a comma']
    lines = [json.dumps({"text": text, "note": f"{text[:3]}\r"}) for text in texts]
    new, out = cli.place.folder / "new.jsonl", cli.place.folder / "out.csv"
    new.write_text("\n".join(lines), encoding="utf-8")
    assert cli("predict", finished, new, "-o", out).code == 0
    with out.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    assert [row[0] for row in rows[1:]] == texts
    assert [row[-1] for row in rows[1:]] == [f"{text[:3]}\r" for text in texts]
