"""Border to files and the hub's data sets: rows of columns out, each with its line in the file.

csv, tsv and jsonl are read with the standard library; parquet and hub names with `datasets`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from fedlora import builtin
from fedlora.sources import BUILTIN, REVIEWS, check_folder, file_ending, is_local

REVIEWS_TRAIN, REVIEWS_EVALUATE = 1500, 600  # rows of the built-in task
LONGEST = 2**31 - 1  # characters of a field; csv's own limit is 131,072
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows as columns by name, and the line of the file that each begins in, where it has lines."""

    source: str
    rows: list[Row]
    lines: list[int] = field(default_factory=list)

    def place(self, row: int) -> str:
        """Where row number `row` (from 0) stands, for messages."""
        return place(self.source, self.lines, row)


def place(source: str, lines: Sequence[int], row: int) -> str:
    """`source, line N`, or `source, row N` of what has no lines; rows are counted from 0 here."""
    return f"{source}, line {lines[row]}" if lines else f"{source}, row {row + 1}"


def read_rows(source: str, quoting: str) -> Rows:
    """All rows of a file, a data set of the hub, or the built-in task.

    ValueError names the file, the line and what was found, for anything that cannot be read. What
    is on this disk, or looks as if it should be, is never looked up on the hub.
    """
    if source.startswith(BUILTIN):
        return Rows(source, _builtin_rows(source))
    folder = Path(source.partition(":")[0])
    if folder.is_dir():
        check_folder(folder)
        return Rows(source, _hub_rows(source))
    if not is_local(source):
        return Rows(source, _hub_rows(source))
    readers: dict[str, Callable[[str, str], Rows]] = {
        ".csv": _separated_rows,
        ".tsv": _separated_rows,
        ".jsonl": _json_rows,
        ".json": _json_rows,
        ".parquet": _parquet_rows,
    }
    reader = readers[file_ending(source)]
    try:
        return reader(source, quoting)
    except UnicodeDecodeError:
        raise _not_utf8(source) from None


def _builtin_rows(source: str) -> list[Row]:
    if source == REVIEWS:
        return [dict(row) for row in builtin.reviews("train", REVIEWS_TRAIN)]
    if source == f"{REVIEWS}:evaluate":
        return [dict(row) for row in builtin.reviews("evaluate", REVIEWS_EVALUATE)]
    raise ValueError(f"unknown built-in data {source!r}; there is {REVIEWS!r}")


def _separated_rows(source: str, quoting: str) -> Rows:
    """csv with quotes, tsv without (GLUE's tsv holds bare quotes), unless configured."""
    with open(source, encoding="utf-8-sig", newline="") as file:
        delimiter = _delimiter(source, file)
        tabs = delimiter == "\t" and source.lower().endswith(".tsv")
        bare = quoting == "none" or (quoting == "auto" and tabs)
        reader = csv.reader(
            file,
            delimiter=delimiter,
            quoting=csv.QUOTE_NONE if bare else csv.QUOTE_MINIMAL,
            strict=not bare,
        )
        csv.field_size_limit(LONGEST)
        found = Rows(source, [])
        try:
            header = next(reader, None)
            if header is None:
                raise ValueError(f"{source} is empty")
            if twice := [name for name in header if header.count(name) > 1]:
                raise ValueError(f"{source} has two columns called {twice[0]!r}: rename one")
            begun = reader.line_num + 1
            for values in reader:
                if values:  # an empty line is no row
                    _check_width(found, begun, values, header, SEPARATORS[delimiter])
                    found.rows.append(dict(zip(header, values, strict=True)))
                    found.lines.append(begun)
                begun = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{source}, line {reader.line_num}: {error}; try data.quoting = 'none'"
            ) from error
    return found


def _delimiter(source: str, file: TextIO) -> str:
    """The ending's own, unless the header has none of it and one other: Excel in much of Europe
    writes semicolons. The file is back at its beginning then.
    """
    header = file.readline()
    file.seek(0)
    if "\0" in header:
        raise ValueError(f"{source} is UTF-16 text: save it as UTF-8")
    usual = "\t" if source.lower().endswith(".tsv") else ","
    others = [mark for mark in SEPARATORS if mark in header]
    return others[0] if len(others) == 1 else usual


def _check_width(
    found: Rows, line: int, values: list[str], header: list[str], separator: str
) -> None:
    if len(values) != len(header):
        raise ValueError(
            f"{found.source}, line {line}: {len(values)} columns where the header has "
            f"{len(header)}, separated by {separator}; if quotes matter, set data.quoting to none "
            "or quoted"
        )


def _json_rows(source: str, quoting: str) -> Rows:
    found = Rows(source, [])
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
            if "\\ud" in line.lower():
                _check_whole(f"{source}, line {number}", row)
            found.rows.append(row)
            found.lines.append(number)
    return found


def _check_whole(place: str, row: Row) -> None:
    """JSON writes some characters as two escapes; one alone cannot be tokenised or written."""
    for column, value in row.items():
        try:
            f"{column}{value}".encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(
                f"{place}: column {column!r} has {half!r}, half of a character, as where a text "
                "was cut within one: take it out"
            ) from None


def _not_utf8(source: str) -> ValueError:
    """What to say of a text file in another encoding: the first line that shows it."""
    data = Path(source).read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:100]:
        return ValueError(f"{source} is UTF-16 text: save it as UTF-8")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        return ValueError(
            f"{source}, line {line}: byte 0x{byte:02x} is not UTF-8 text: save the file as UTF-8"
        )
    return ValueError(f"{source} is not UTF-8 text: save it as UTF-8")


def _parquet_rows(source: str, quoting: str) -> Rows:
    return Rows(source, _from_datasets(source, "parquet", data_files=source, split="train"))


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
