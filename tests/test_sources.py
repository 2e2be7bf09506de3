"""What a name stands for; what may be a private file is never looked up on a hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.rows import read_rows
from fedlora.sources import check_model, evaluation_of, is_local

HUB = ["imdb", "glue/sst2", "org/name", "org/name-v1.0", "org/name:test", "org/my.data:train"]
HERE = ["x.xlsx", "data/x.csv", "./notes", "../notes", "~/notes", "/abs/notes", "a/b/notes",
        "notes.txt", "sub\\notes", "x.csv.gz"]  # fmt: skip


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(source: str) -> None:
        raise AssertionError(f"the hub was asked for {source}")

    monkeypatch.setattr("fedlora.rows._hub_rows", asked)


@pytest.mark.parametrize("name", HUB)
def test_a_hub_name_is_a_hub_name(name: str) -> None:
    assert not is_local(name)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.usefixtures("no_hub")
def test_what_looks_like_a_path_or_a_file_stays_here(name: str) -> None:
    assert is_local(name)
    with pytest.raises(ValueError, match="there is no file"):
        read_rows(name, "auto")


@pytest.mark.usefixtures("no_hub")
def test_what_is_here_stays_here(empty: Path) -> None:
    (empty / "patients").write_text("text,label\n")
    (empty / "org").mkdir()
    assert is_local("patients")
    assert is_local("org/patients")
    with pytest.raises(ValueError, match="patients: the endings read are csv, tsv, jsonl, json,"):
        read_rows("patients", "auto")
    with pytest.raises(ValueError, match="there is no file org/patients"):
        read_rows("org/patients", "auto")


@pytest.mark.usefixtures("no_hub")
def test_a_folder_of_files_is_refused(empty: Path) -> None:
    """Two hospitals' tables would be one, with nobody told."""
    folder = empty / "tables"
    folder.mkdir()
    with pytest.raises(ValueError, match="tables is a folder: name one file, or one for each"):
        read_rows("tables", "auto")
    for names in (["train.csv"], ["train.parquet", "north.csv"], ["north.parquet"]):
        for name in names:
            (folder / name).touch()
        with pytest.raises(ValueError, match="tables is a folder"):
            read_rows("tables:train", "auto")
        for name in names:
            (folder / name).unlink()


def test_a_model_that_is_nowhere_is_called_so() -> None:
    with pytest.raises(ValueError, match=r"there is no folder \./models/x"):
        check_model("./models/x")
    with pytest.raises(ValueError, match="no such built-in model; did you mean 'builtin:minilm'"):
        check_model("builtin:mini")
    for name in ("bert-base", "org/model", "Qwen/Qwen2.5-0.5B", "org/model.v2"):
        check_model(name)


def test_the_evaluation_set_is_the_configured_one_or_the_training_sets_own() -> None:
    assert evaluation_of("train.csv", "dev.csv", {}) == "dev.csv"
    assert evaluation_of("train.csv", "", {}) == ""
    assert evaluation_of("builtin:reviews", "none", {}) == ""
    assert evaluation_of("builtin:reviews", "", {"a": "a.csv"}) == ""
    assert evaluation_of("builtin:reviews", "", {}) == "builtin:reviews:evaluate"
    assert evaluation_of("glue/mnli", "", {}) == "glue/mnli:validation_matched"
