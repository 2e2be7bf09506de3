"""Write a sweep's table of runs as the .csv that is kept in experiments/results.

    python experiments/collect.py sweeps/sst2 experiments/results/sst2.csv

Only runs that have ended; six digits.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import pyarrow.parquet

from fedlora.sweepdir import read_sweep, write_results

DROPPED = ("finished", "path")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a sweep's table of runs as .csv.")
    parser.add_argument("sweep", type=Path, help="folder of the sweep")
    parser.add_argument("table", type=Path, help=".csv to write")
    given = parser.parse_args(arguments)
    results = write_results(given.sweep, read_sweep(given.sweep).entries)  # as it stands now
    rows = pyarrow.parquet.read_table(results).to_pylist()
    columns = [column for column in rows[0] if column not in DROPPED]
    ended = [row for row in rows if row["finished"]]
    with given.table.open("w", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(columns)
        table.writerows([_written(row[column]) for column in columns] for row in ended)
    print(f"{len(ended)} of {len(rows)} runs: {given.table}")


def _written(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


if __name__ == "__main__":
    main()
