"""Files in, checked rows out: nothing is lost, moved or guessed in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import write_csv, write_lines

from fedlora.settings import DataSettings
from fedlora.tables import (
    evaluation_source,
    label_ids,
    read_table,
    read_unlabelled,
    sorted_labels,
)


def written(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def refusal(source: Path | str, **settings: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers look at the message
        read_table(str(source), DataSettings(**settings))
    assert str(source).partition(":")[0] in str(caught.value), "the message does not name the file"
    return str(caught.value)


# ---------------------------------------------------------------- csv and tsv


def test_csv_keeps_quotes_commas_and_newlines_inside_a_field(tmp_path: Path) -> None:
    text = 'text,label\n"a, b",x\n"she said ""no""",y\n"two\nlines",x\nbare "quotes" inside,y\n'
    table = read_table(written(tmp_path, "a.csv", text), DataSettings())
    assert table.texts == ["a, b", 'she said "no"', "two\nlines", 'bare "quotes" inside']
    assert table.labels == ["x", "y", "x", "y"]
    assert table.pairs is None
    assert len(table) == 4


def test_tsv_takes_quotes_as_they_are(tmp_path: Path) -> None:
    """GLUE's files: a field may start with a quote that is never closed."""
    rows = ['"one of the best', "plain", '"closed" and more', 'in the "middle', '"']
    text = "sentence\tlabel\n" + "".join(f"{row}\t{i % 2}\n" for i, row in enumerate(rows))
    table = read_table(written(tmp_path, "a.tsv", text), DataSettings())
    assert table.texts == rows
    assert table.labels == ["0", "1", "0", "1", "0"]


def test_quoting_can_be_set_against_the_ending(tmp_path: Path) -> None:
    tsv = written(tmp_path, "a.tsv", 'text\tlabel\n"a\tb"\tx\n')
    assert read_table(tsv, DataSettings(quoting="quoted")).texts == ["a\tb"]
    bare = written(tmp_path, "a.csv", 'text,label\n"never closed,x\n')
    assert read_table(bare, DataSettings(quoting="none")).texts == ['"never closed']
    assert "line 2" in refusal(bare)
    assert "data.quoting = 'none'" in refusal(bare)


def test_a_row_of_another_width_is_named_with_its_line(tmp_path: Path) -> None:
    short = written(tmp_path, "a.csv", 'text,label\n"two\nlines",x\nonly text\n')
    assert "line 4: 1 columns where the header has 2" in refusal(short)
    long = written(tmp_path, "b.csv", "text,label\na, b,x\n")
    assert "line 2: 3 columns where the header has 2" in refusal(long)
    tabs = written(tmp_path, "c.tsv", "text\tlabel\na\tx\nb\ty\t\n")
    assert "line 3: 3 columns" in refusal(tabs)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_an_empty_line_is_no_row(tmp_path: Path, end: str) -> None:
    text = end.join(["text,label", "a,x", "", "b,y", "", ""])
    table = read_table(written(tmp_path, "a.csv", text), DataSettings())
    assert table.texts == ["a", "b"]


def test_windows_line_ends_are_no_part_of_a_value(tmp_path: Path) -> None:
    for name, text in (("a.csv", "text,label\r\na,x\r\n"), ("a.tsv", "text\tlabel\r\na\tx\r\n")):
        assert read_table(written(tmp_path, name, text), DataSettings()).labels == ["x"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "text,label\na,x\n"),
        ("a.tsv", "text\tlabel\na\tx\n"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n'),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, name: str, text: str) -> None:
    table = read_table(written(tmp_path, name, b"\xef\xbb\xbf" + text.encode()), DataSettings())
    assert (table.texts, table.labels) == (["a"], ["x"])


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path, name: str) -> None:
    latin = 'text,label\n{"text": "caf\u00e9"}\n'.encode("latin-1")
    latin = latin.partition(b"\n")[2] if name.endswith("l") else latin
    message = refusal(written(tmp_path, name, latin))
    line = 1 if name.endswith("l") else 2
    assert f"line {line}: byte 0xe9 is not UTF-8 text: save the file as UTF-8" in message


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf16_is_called_by_its_name(tmp_path: Path, name: str, encoding: str) -> None:
    """What Excel writes as `Unicode text`; `utf-16-be` has no mark at its beginning."""
    text = 'text,label\n{"text": "caf\u00e9"}\n'.encode(encoding)
    if encoding == "utf-16" or not name.endswith("l"):
        assert "is UTF-16 text: save it as UTF-8" in refusal(written(tmp_path, name, text))


@pytest.mark.parametrize(
    ("name", "mark"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", ";"), ("a.tsv", ",")]
)
def test_another_separator_is_seen_in_the_header(tmp_path: Path, name: str, mark: str) -> None:
    """Excel writes semicolons into csv where the comma is the decimal mark."""
    text = f'id{mark}text{mark}label\n1{mark}"a{mark} b, and c"{mark}x\n2{mark}d{mark}y\n'
    table = read_table(written(tmp_path, name, text), DataSettings())
    assert table.texts == [f"a{mark} b, and c", "d"]
    assert table.labels == ["x", "y"]
    short = written(tmp_path, name, text + f"3{mark}e\n")
    said = {";": "semicolons", ",": "commas", "\t": "tabs"}[mark]
    assert f"line 4: 2 columns where the header has 3, separated by {said}" in refusal(short)


def test_a_header_that_has_the_usual_separator_or_several_others_is_taken_as_it_is(
    tmp_path: Path,
) -> None:
    usual = written(tmp_path, "a.csv", "text;note,label\na;b,x\n")
    assert read_table(usual, DataSettings(text="text;note")).texts == ["a;b"]
    both = written(tmp_path, "b.csv", "text;\tlabel\na;\tx\n")
    assert "Set data.text to one of text;\tlabel" in refusal(both)
    one = written(tmp_path, "c.csv", "text\na; b\n")
    assert read_unlabelled(one, DataSettings())[0].texts == ["a; b"]


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    """Counted with the header, empty lines and line breaks within a field; the first of a row."""
    text = 'text,label\n\n"two\nlines",x\n"three\nmore\nlines",y\n\nd,z\n'
    table = read_table(written(tmp_path, "a.csv", text), DataSettings())
    assert [table.place(row).rpartition(" ")[2] for row in range(3)] == ["3", "5", "9"]
    lines = written(tmp_path, "a.jsonl", '\n{"text": "a", "label": "x"}\n')
    assert read_table(lines, DataSettings()).place(0) == f"{lines}, line 2"
    assert read_table("builtin:reviews", DataSettings()).place(6) == "builtin:reviews, row 7"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    message = refusal(written(tmp_path, name, ""))
    assert "is empty" in message or "has no rows" in message


def test_a_header_alone_is_refused(tmp_path: Path) -> None:
    assert "has no rows" in refusal(written(tmp_path, "a.csv", "text,label\n"))


def test_a_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """Either could be meant."""
    assert "text" in refusal(written(tmp_path, "a.csv", "text,text,label\na,b,x\n"))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "nosuch.csv")


# ---------------------------------------------------------------- jsonl and parquet


def test_jsonl_rows_are_read_and_blank_lines_skipped(tmp_path: Path) -> None:
    text = '{"text": "a, \\"b\\"\\nc", "label": 1}\n\n{"text": "caf\u00e9", "label": 0}\n'
    table = read_table(written(tmp_path, "a.jsonl", text), DataSettings())
    assert table.texts == ['a, "b"\nc', "caf\u00e9"]
    assert table.labels == ["1", "0"]


@pytest.mark.parametrize(
    ("line", "words"),
    [('{"text": ', "line 2: not JSON"), ('["a", "x"]', "line 2: expected one JSON object")],
)
def test_a_line_that_is_no_json_object_is_named(tmp_path: Path, line: str, words: str) -> None:
    file = written(tmp_path, "a.jsonl", '{"text": "a", "label": "x"}\n' + line + "\n")
    assert words in refusal(file)


@pytest.mark.parametrize("half", ["\\uD83D", "\\ude00"])
def test_half_a_character_is_named_with_its_line(tmp_path: Path, half: str) -> None:
    whole = '{"text": "a \\ud83d\\ude00", "label": "x"}\n'
    said = refusal(written(tmp_path, "a.jsonl", whole + '{"text": "b ' + half + '", "label": "y"}'))
    assert f"a.jsonl, line 2: column 'text' has '{half.lower()}', half of a character" in said


def test_both_halves_are_a_character(tmp_path: Path) -> None:
    line = '{"text": "a \\ud83d\\ude00", "label": "x"}\n'
    table = read_table(written(tmp_path, "a.jsonl", line), DataSettings())
    assert table.texts == ["a \U0001f600"]


@pytest.mark.parametrize("missing", [{"text": None, "label": "x"}, {"label": "x"}])
@pytest.mark.parametrize("column", ["text", "label"])
def test_a_missing_value_is_named_with_its_line(
    tmp_path: Path, missing: dict[str, object], column: str
) -> None:
    gap = {{"text": "label", "label": "text"}[column] if k == "label" else column: v
           for k, v in missing.items()}  # fmt: skip
    file = write_lines(tmp_path / "a.jsonl", [{"text": "a", "label": "x"}, gap])
    assert f"line 2: no value in column {column!r}" in refusal(file)


def test_parquet_files_and_dataset_folders_are_read(tmp_path: Path) -> None:
    """A folder of splits stands in for a hub name; class numbers come back as their names."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    parts = {
        "train": {"sentence": ["a", "b", "c"], "label": [1, 0, 1]},
        "validation": {"sentence": ["d"], "label": [0]},
    }
    (tmp_path / "hub").mkdir()
    for split, rows in parts.items():
        made = datasets.Dataset.from_dict(rows, features=features)
        made.to_parquet(tmp_path / "hub" / f"{split}.parquet")
    for source in (tmp_path / "hub" / "train.parquet", tmp_path / "hub", f"{tmp_path}/hub:train"):
        table = read_table(str(source), DataSettings())
        assert (table.texts, table.labels) == (["a", "b", "c"], ["yes", "no", "yes"])
    settings = DataSettings(train=str(tmp_path / "hub"))
    assert read_table(evaluation_source(settings), settings).texts == ["d"]
    assert "cannot load" in refusal(f"{tmp_path}/hub:nosplit")


def test_a_missing_class_number_is_a_missing_label(tmp_path: Path) -> None:
    """Hub test sets say -1 where they keep the labels back."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    made.to_parquet(tmp_path / "a.parquet")
    assert "row 2: no value in column 'label'" in refusal(tmp_path / "a.parquet")


# ---------------------------------------------------------------- which column is meant


@pytest.mark.parametrize(
    ("header", "text", "pair"),
    [
        (["premise", "hypothesis", "label"], "premise", "hypothesis"),
        (["sentence2", "sentence1", "label"], "sentence1", "sentence2"),
        (["question1", "question2", "label"], "question1", "question2"),
        (["question", "sentence", "label"], "question", "sentence"),
        (["idx", "sentence", "label"], "sentence", ""),
        (["text", "title", "class"], "text", ""),
        (["review", "sentiment"], "review", ""),
    ],
)
def test_usual_column_names_are_found(
    tmp_path: Path, header: list[str], text: str, pair: str
) -> None:
    file = write_csv(tmp_path / "a.csv", [[f"in {name}" for name in header]], header)
    table = read_table(str(file), DataSettings())
    assert table.texts == [f"in {text}"]
    assert table.pairs == ([f"in {pair}"] if pair else None)
    assert table.labels == [f"in {header[-1]}"]


def test_columns_that_are_set_win_over_the_usual_ones(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [["a", "b", "c", "d"]], ["text", "label", "note", "mark"])
    table = read_table(str(file), DataSettings(text="note", pair="text", label="mark"))
    assert (table.texts, table.pairs, table.labels) == (["c"], ["a"], ["d"])
    table = read_table(str(file), DataSettings(text="note"))
    assert (table.texts, table.pairs, table.labels) == (["c"], None, ["b"])


@pytest.mark.parametrize("setting", ["text", "label", "pair"])
def test_a_column_that_is_not_there_is_refused_with_the_near_one(
    tmp_path: Path, setting: str
) -> None:
    file = write_csv(tmp_path / "a.csv", [["a", "x"]], ["comment", "verdict"])
    wanted = {"text": "comment", "label": "verdict"} | {setting: "coment"}
    message = refusal(file, **wanted)
    assert f"data.{setting} = 'coment'" in message
    assert "did you mean 'comment'?" in message
    assert "it has comment, verdict" in message


def test_a_pair_column_without_a_text_column_is_not_ignored(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [["a", "b", "x"]], ["text", "other", "label"])
    settings = DataSettings(pair="other")
    assert read_table(str(file), settings).pairs == ["b"]


def test_a_column_without_a_name_is_not_the_text(tmp_path: Path) -> None:
    """That of the row numbers, as pandas writes them."""
    file = written(tmp_path, "a.csv", ",text,label\n0,good,yes\n1,bad,no\n")
    assert read_table(file, DataSettings()).texts == ["good", "bad"]


def test_columns_of_unusual_names_have_to_be_set(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [["a", "x"]], ["comment", "verdict"])
    assert "Set data.text to one of comment, verdict" in refusal(file)
    assert "Set data.label to one of comment, verdict" in refusal(file, text="comment")


def test_texts_without_labels_are_read_for_prediction(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [["a", "b"]], ["premise", "hypothesis"])
    table, others = read_unlabelled(str(file), DataSettings())
    assert (table.texts, table.pairs, table.labels, others) == (["a"], ["b"], [""], {})
    assert "label" in refusal(file)


def test_what_stands_beside_the_texts_is_kept_for_prediction(tmp_path: Path) -> None:
    rows = [{"id": 7, "text": "a"}, {"text": "b", "tags": ["x", "y"], "id": None}]
    table, others = read_unlabelled(str(write_lines(tmp_path / "a.jsonl", rows)), DataSettings())
    assert table.texts == ["a", "b"]
    assert others == {"id": ["7", ""], "tags": ["", '["x", "y"]']}


def test_a_text_that_is_its_own_label_is_refused(tmp_path: Path) -> None:
    """It would be learnt perfectly, whether both were named or one of them was found."""
    file = write_csv(tmp_path / "a.csv", [["a", "b", "x"]], ["text", "other", "label"])
    for settings in ({"text": "label", "label": "label"}, {"text": "label"}, {"label": "text"},
                     {"text": "text", "pair": "other", "label": "other"}):  # fmt: skip
        message = refusal(file, **settings)
        assert "would be the text and its label too" in message
        assert "text, other, label" in message
    with pytest.raises(ValueError, match=r"data\.text and data\.pair are both 'text'"):
        read_table(str(file), DataSettings(text="text", pair="text"))


# ---------------------------------------------------------------- labels


def test_labels_are_texts_whatever_the_file_calls_them(tmp_path: Path) -> None:
    values: list[object] = [1, "1", True, 1.5, "yes"]
    rows = [{"text": "a", "label": value} for value in values]
    table = read_table(str(write_lines(tmp_path / "a.jsonl", rows)), DataSettings())
    assert table.labels == ["1", "1", "true", "1.5", "yes"]


@pytest.mark.parametrize(
    ("given", "order"),
    [
        (["10", "9", "2", "10"], ["2", "9", "10"]),
        (["1", "-1", "0"], ["-1", "0", "1"]),
        (["pos", "neg"], ["neg", "pos"]),
        (["10", "9", "many"], ["10", "9", "many"]),
        (["--5", "3"], ["--5", "3"]),
        (["\u00b2", "1"], ["1", "\u00b2"]),
    ],
)
def test_labels_sort_as_numbers_only_if_all_are(given: list[str], order: list[str]) -> None:
    assert sorted_labels(given) == order
    assert sorted_labels(reversed(given)) == order


def test_an_unknown_label_is_named_with_file_row_and_the_near_one(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [["a", "positive"], ["b", "negativ"]])
    table = read_table(str(file), DataSettings())
    with pytest.raises(ValueError, match="unknown label") as caught:
        label_ids(table, ["negative", "positive"])
    message = str(caught.value)
    assert f"{file}, line 3: unknown label 'negativ'; did you mean 'negative'?" in message
    assert "data.labels are 'negative', 'positive'" in message


def test_label_ids_follow_the_central_order(tmp_path: Path) -> None:
    table = read_table(
        str(write_csv(tmp_path / "a.csv", zip("abc", "xyx", strict=True))), DataSettings()
    )
    assert label_ids(table, ["y", "x"]) == [1, 0, 1]
    assert label_ids(table, ["x", "unseen", "y"]) == [0, 2, 0]


# ---------------------------------------------------------------- real text, as it was published


def test_sst2_loads_row_for_row(data_folder: Path) -> None:
    train, dev = (
        read_table(str(data_folder / "sst2" / f"{name}.tsv"), DataSettings())
        for name in ("train", "dev")
    )
    assert len(train) == 67_349
    assert train.labels.count("1") == 37_569
    assert set(train.labels) == {"0", "1"}
    assert (len(dev), dev.labels.count("1")) == (872, 444)
    lines = (data_folder / "sst2" / "train.tsv").read_text().splitlines()[1:]
    assert train.texts == [line.partition("\t")[0] for line in lines]


def test_mnli_loads_as_pairs(data_folder: Path) -> None:
    sizes = {"train_10k": 9_888, "dev_matched": 9_815}
    for name, rows in sizes.items():
        file = data_folder / "mnli" / f"{name}.jsonl"
        table = read_table(str(file), DataSettings())
        assert len(table) == rows
        assert table.pairs is not None
        assert sorted_labels(table.labels) == ["contradiction", "entailment", "neutral"]
        last = json.loads(file.read_text().splitlines()[-1])
        assert (table.texts[-1], table.pairs[-1]) == (last["premise"], last["hypothesis"])


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_label_is_no_class_of_its_own(tmp_path: Path, empty: str) -> None:
    file = write_csv(tmp_path / "rows.csv", [("one", "a"), ("two", empty), ("three", "b")])
    assert "line 3: no label in column 'label': label the row or leave it out" in refusal(file)


def test_a_label_that_is_no_number_is_none(tmp_path: Path) -> None:
    """What a data frame's missing value becomes in json and parquet."""
    lines = '{"text": "one", "label": 1.0}\n{"text": "two", "label": NaN}\n'
    assert "line 2: no label" in refusal(written(tmp_path, "rows.jsonl", lines))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_texts_may_be_longer_than_csvs_own_limit(tmp_path: Path, name: str) -> None:
    mark, text = ("," if name.endswith("csv") else "\t"), "word " * 40_000
    file = written(tmp_path, name, f"text{mark}label\n{text}{mark}a\nshort{mark}b\n")
    assert read_table(file, DataSettings()).texts == [text, "short"]
