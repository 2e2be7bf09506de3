"""Rows in, checked texts and labels out: which columns are meant, and what each label's number is.

Knows `rows` and the data settings; no partition and no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedlora.hints import near
from fedlora.rows import Row, Rows, place, read_rows
from fedlora.settings import DataSettings
from fedlora.sources import evaluation_of

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
Columns = tuple[str, str]  # of the text and of what makes it a pair, "" for single texts
UNKNOWN: Columns = ("", "")


@dataclass(frozen=True)
class Table:
    """Checked rows: one text or a pair each, a label as text, and where they come from.

    `members` are the tables that this one was joined of, in the order of its rows; `columns` those
    that its texts were read from, unknown where members differ.
    """

    source: str
    texts: list[str]
    pairs: list[str] | None
    labels: list[str]
    column: list[str] = field(default_factory=list)  # the natural client of each row, if asked for
    lines: list[int] = field(default_factory=list)  # of the file, where it has lines
    members: Sequence[Table] = ()
    columns: Columns = UNKNOWN

    def __len__(self) -> int:
        return len(self.texts)

    def place(self, row: int) -> str:
        """Where row number `row` (from 0) stands, for messages: its file and line."""
        for member in self.members:
            if row < len(member):
                return member.place(row)
            row -= len(member)
        return place(self.source, self.lines, row)


def read_table(
    source: str, settings: DataSettings, column: str = "", known: Columns = UNKNOWN
) -> Table:
    """Reads a file, a hub dataset or the built-in task and picks the columns that are asked for.

    Where no text column is configured, the `known` columns of a run come before the usual names.
    ValueError names the file, the line and what was found, for anything that does not fit.
    """
    found = _read(source, settings)
    text, pair = _text_columns(source, found.rows[0], settings, known)
    label = _label_column(source, found.rows[0], settings)
    if label in (text, pair):
        raise ValueError(
            f"{source}: column {label!r} would be the text and its label too: set data.text and "
            f"data.label to two of {', '.join(found.rows[0])}"
        )
    if column:
        _present(source, found.rows[0], column, "partition.column")
    return Table(
        source,
        _strings(found, text),
        _strings(found, pair) if pair else None,
        _labels(found, label),
        _strings(found, column) if column else [],
        found.lines,
        columns=(text, pair),
    )


def read_unlabelled(
    source: str, settings: DataSettings, known: Columns = UNKNOWN
) -> tuple[Table, Mapping[str, list[str]]]:
    """The texts (and pairs) of a file for prediction, labels empty; and its other columns as text.

    In those a missing value is empty. `known` as in `read_table`.
    """
    found = _read(source, settings)
    text, pair = _text_columns(source, found.rows[0], settings, known)
    others = dict.fromkeys(name for row in found.rows for name in row if name not in (text, pair))
    table = Table(
        source,
        _strings(found, text),
        _strings(found, pair) if pair else None,
        [""] * len(found.rows),
        lines=found.lines,
    )
    return table, {name: [_as_text(row.get(name, "")) for row in found.rows] for name in others}


def evaluation_source(settings: DataSettings) -> str:
    """Where the shared evaluation set is: as configured, else the training set's own."""
    return evaluation_of(settings.train, settings.evaluate, settings.clients)


def label_ids(table: Table, labels: Sequence[str]) -> list[int]:
    """The id of each row's label in the central order.

    ValueError for an unknown one, with its place.
    """
    ids = {label: index for index, label in enumerate(labels)}
    for row, label in enumerate(table.labels):
        if label not in ids:
            hint = near(label, labels)
            raise ValueError(
                f"{table.place(row)}: unknown label {label!r}{hint}; "
                f"data.labels are {', '.join(map(repr, labels))}"
            )
    return [ids[label] for label in table.labels]


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """Distinct labels in a fixed order: by number if all are whole numbers, else as text."""
    distinct = set(labels)
    numbers = all(re.fullmatch(r"-?[0-9]+", label) for label in distinct)
    return sorted(distinct, key=lambda label: (int(label) if numbers else 0, label))


# ---------------------------------------------------------------- which columns are meant


def _present(source: str, row: Row, column: str, setting: str) -> None:
    if column not in row:
        hint = near(column, row)
        raise ValueError(
            f"{setting} = {column!r}: {source} has no such column{hint}; it has {', '.join(row)}"
        )


def _text_columns(source: str, row: Row, settings: DataSettings, known: Columns) -> Columns:
    for column, setting in ((settings.text, "data.text"), (settings.pair, "data.pair")):
        if column:
            _present(source, row, column, setting)
    if settings.text:
        if settings.text == settings.pair:
            raise ValueError(
                f"data.text and data.pair are both {settings.text!r}: name two columns"
            )
        return settings.text, settings.pair
    usual = TEXT_COLUMNS if known == UNKNOWN else (known, *TEXT_COLUMNS)
    for text, pair in usual:
        if text in row and (not pair or pair in row):
            chosen = text, settings.pair or pair
            if known != UNKNOWN and bool(chosen[1]) != bool(known[1]):
                raise ValueError(
                    f"{source} has {_named(chosen)} where the run was trained on {_named(known)}: "
                    "rename the columns to the run's"
                )
            return chosen
    if known != UNKNOWN:
        raise ValueError(
            f"{source}: which column is the text? The run was trained on {_named(known)}, the file "
            f"has {', '.join(row)}: rename its column"
        )
    raise ValueError(
        f"{source}: which column is the text? Set data.text to one of {', '.join(row)}"
    )


def _named(columns: Columns) -> str:
    text, pair = columns
    return f"pairs ({text}, {pair})" if pair else f"single texts ({text})"


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


def _read(source: str, settings: DataSettings) -> Rows:
    found = read_rows(source, settings.quoting)
    if not found.rows:
        raise ValueError(f"{source} has no rows")
    return found


def _strings(found: Rows, column: str) -> list[str]:
    for row, values in enumerate(found.rows):
        if values.get(column) is None:
            raise ValueError(f"{found.place(row)}: no value in column {column!r}")
    return [_as_text(values[column]) for values in found.rows]


def _labels(found: Rows, column: str) -> list[str]:
    """As `_strings`; ValueError for an empty label too, by which a csv says that it has none."""
    labels = _strings(found, column)
    for row, label in enumerate(labels):
        if label.strip() in ("", "NaN"):
            raise ValueError(
                f"{found.place(row)}: no label in column {column!r}: label the row or leave it out"
            )
    return labels


def _as_text(value: object) -> str:
    """A text as it is, no value as nothing, all else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str)
