"""Border to data on disk and on the hub: files and datasets in, checked rows of text and label out.

csv, tsv and jsonl are read with the standard library; parquet and hub names with `datasets`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora import builtin
from fedlora.config import LOCAL_ENDINGS
from fedlora.hints import near
from fedlora.settings import NO_EVALUATION, DataSettings

REVIEWS = "builtin:reviews"
REVIEWS_TRAIN, REVIEWS_EVALUATE = 1500, 600  # rows of the built-in task
TEXT_COLUMNS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence", ""),
    ("text", ""),
    ("review", ""),
)
LABEL_COLUMNS = ("label", "labels", "class", "sentiment")
HUB_EVALUATION = {"glue/mnli": "validation_matched"}  # otherwise `validation`

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Checked rows: one text or a pair each, a label as text, and where they come from."""

    source: str
    texts: list[str]
    pairs: list[str] | None
    labels: list[str]
    column: list[str] = field(default_factory=list)  # the natural client of each row, if asked for

    def __len__(self) -> int:
        return len(self.texts)


def read_table(source: str, settings: DataSettings, column: str = "") -> Table:
    """Reads a file, a hub dataset or the built-in task and picks the columns that are asked for.

    ValueError names the file, the row and what was found, for anything that does not fit.
    """
    rows = _rows(source, settings.quoting)
    if not rows:
        raise ValueError(f"{source} has no rows")
    text, pair = _text_columns(source, rows[0], settings)
    label = _label_column(source, rows[0], settings)
    if column:
        _present(source, rows[0], column, "partition.column")
    return Table(
        source,
        _strings(source, rows, text),
        _strings(source, rows, pair) if pair else None,
        _strings(source, rows, label),
        _strings(source, rows, column) if column else [],
    )


def read_unlabelled(source: str, settings: DataSettings) -> tuple[list[str], list[str] | None]:
    """The texts (and pairs) of a file whose labels are unknown, for prediction."""
    rows = _rows(source, settings.quoting)
    if not rows:
        raise ValueError(f"{source} has no rows")
    text, pair = _text_columns(source, rows[0], settings)
    return _strings(source, rows, text), _strings(source, rows, pair) if pair else None


def evaluation_source(settings: DataSettings) -> str:
    """Where the shared evaluation set is: as configured, else the training set's own."""
    if settings.evaluate == NO_EVALUATION:
        return ""
    if settings.evaluate or settings.clients:
        return settings.evaluate
    if settings.train == REVIEWS:
        return f"{REVIEWS}:evaluate"
    if not settings.train.lower().endswith(LOCAL_ENDINGS):
        name = settings.train.partition(":")[0]
        return f"{name}:{HUB_EVALUATION.get(name, 'validation')}"
    return ""


def label_ids(table: Table, labels: Sequence[str]) -> list[int]:
    """The id of each row's label in the central order.

    ValueError for an unknown one, with its row.
    """
    ids = {label: index for index, label in enumerate(labels)}
    for number, label in enumerate(table.labels, start=1):
        if label not in ids:
            hint = near(label, labels)
            raise ValueError(
                f"{table.source}, row {number}: unknown label {label!r}{hint}; "
                f"data.labels are {', '.join(map(repr, labels))}"
            )
    return [ids[label] for label in table.labels]


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """Distinct labels in a fixed order: by number if all are whole numbers, else as text."""
    distinct = set(labels)
    numbers = all(re.fullmatch(r"-?[0-9]+", label) for label in distinct)
    return sorted(distinct, key=lambda label: (int(label) if numbers else 0, label))


# ---------------------------------------------------------------- where rows come from


def _rows(source: str, quoting: str) -> list[Row]:
    if source.partition(":")[0] == "builtin":
        return _builtin_rows(source)
    ending = Path(source).suffix.lower()
    if ending not in LOCAL_ENDINGS:
        return _hub_rows(source)
    if not Path(source).is_file():
        raise ValueError(f"there is no file {source}")
    readers: dict[str, Callable[[str, str], list[Row]]] = {
        ".csv": _separated_rows,
        ".tsv": _separated_rows,
        ".jsonl": _json_rows,
        ".json": _json_rows,
        ".parquet": _parquet_rows,
    }
    try:
        return readers[ending](source, quoting)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error}") from error


def _builtin_rows(source: str) -> list[Row]:
    if source == REVIEWS:
        return [dict(row) for row in builtin.reviews("train", REVIEWS_TRAIN)]
    if source == f"{REVIEWS}:evaluate":
        return [dict(row) for row in builtin.reviews("evaluate", REVIEWS_EVALUATE)]
    raise ValueError(f"unknown built-in data {source!r}; there is {REVIEWS!r}")


def _separated_rows(source: str, quoting: str) -> list[Row]:
    """csv with quotes, tsv without (GLUE's tsv holds bare quotes), unless configured."""
    tabs = source.lower().endswith(".tsv")
    bare = quoting == "none" or (quoting == "auto" and tabs)
    with open(source, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(
            file,
            delimiter="\t" if tabs else ",",
            quoting=csv.QUOTE_NONE if bare else csv.QUOTE_MINIMAL,
            strict=not bare,
        )
        try:
            header = next(reader, None)
            if header is None:
                raise ValueError(f"{source} is empty")
            if twice := [name for name in header if header.count(name) > 1]:
                raise ValueError(f"{source} has two columns called {twice[0]!r}: rename one")
            rows = []
            for values in filter(None, reader):  # without empty lines
                if len(values) != len(header):
                    raise ValueError(
                        f"{source}, line {reader.line_num}: {len(values)} columns where the header "
                        f"has {len(header)}; if quotes matter, set data.quoting to none or quoted"
                    )
                rows.append(dict(zip(header, values, strict=True)))
        except csv.Error as error:
            raise ValueError(
                f"{source}, line {reader.line_num}: {error}; try data.quoting = 'none'"
            ) from error
    return rows


def _json_rows(source: str, quoting: str) -> list[Row]:
    rows: list[Row] = []
    with open(source, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{source}, line {number}: not JSON: {error.msg}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{source}, line {number}: expected one JSON object a line")
            rows.append(row)
    return rows


def _parquet_rows(source: str, quoting: str) -> list[Row]:
    return _from_datasets(source, "parquet", data_files=source, split="train")


def _hub_rows(source: str) -> list[Row]:
    """`name`, `name:split` or `glue/task:split`; a local dataset folder works like a hub name."""
    name, _, split = source.partition(":")
    parts = ["nyu-mll/glue", name.removeprefix("glue/")] if name.startswith("glue/") else [name]
    return _from_datasets(source, *parts, split=split or "train")


def _from_datasets(source: str, *parts: str, **options: Any) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source} is read with a package that is not installed: pip install 'fedlora[data]'"
        ) from error
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(*parts, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot load {source}: {reason}") from error
    names = {
        column: feature.names
        for column, feature in loaded.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    rows: list[Row] = loaded.to_list()
    for row in rows:
        for column, known in names.items():
            row[column] = known[row[column]] if row[column] >= 0 else None
    return rows


# ---------------------------------------------------------------- which columns are meant


def _present(source: str, row: Row, column: str, setting: str) -> None:
    if column not in row:
        hint = near(column, row)
        raise ValueError(
            f"{setting} = {column!r}: {source} has no such column{hint}; it has {', '.join(row)}"
        )


def _text_columns(source: str, row: Row, settings: DataSettings) -> tuple[str, str]:
    for column, setting in ((settings.text, "data.text"), (settings.pair, "data.pair")):
        if column:
            _present(source, row, column, setting)
    if settings.text:
        return settings.text, settings.pair
    for text, pair in TEXT_COLUMNS:
        if text in row and (not pair or pair in row):
            return text, settings.pair or pair
    raise ValueError(
        f"{source}: which column is the text? Set data.text to one of {', '.join(row)}"
    )


def _label_column(source: str, row: Row, settings: DataSettings) -> str:
    if settings.label:
        _present(source, row, settings.label, "data.label")
        return settings.label
    for label in LABEL_COLUMNS:
        if label in row:
            return label
    raise ValueError(
        f"{source}: which column is the label? Set data.label to one of {', '.join(row)}"
    )


def _strings(source: str, rows: Sequence[Row], column: str) -> list[str]:
    values = []
    for number, row in enumerate(rows, start=1):
        value = row.get(column)
        if value is None:
            raise ValueError(f"{source}, row {number}: no value in column {column!r}")
        values.append(value if isinstance(value, str) else json.dumps(value, default=str))
    return values
