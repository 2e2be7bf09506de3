"""Breaks runs and clients in all the ways that docs/reliability.md lists, and prints its tables.

    python tests/fault_table.py [--random 20] [--only WORD]

All of it is really done, to a tiny random model that is made on the fly: no network, a minute,
Linux. A hash is the beginning of a SHA-256 of the final adapter's file: "before" of a run that
nothing happened to (to the clients: of the plain loop without the faulty one), "after" of the one
that was disturbed and, where it stopped, resumed. Where something is refused, both are of the whole
run directory. Ends with 1 where two hashes differ or what should have happened did not.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from fault_rows import CLIENTS, RUNS, Ground, Outcome, Row

TABLES = (("what was done", RUNS), ("what the client did", CLIENTS))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--random", type=int, default=20, metavar="N", help="random moments")
    parser.add_argument("--only", default="", metavar="WORD", help="rows that contain it")
    options = parser.parse_args(arguments)
    wrong = done = 0
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder), options.random)
        for head, rows in TABLES:
            print(f"\n| {head} | what happened | hash before | hash after |\n|---|---|---|---|")
            for row in rows:
                if options.only in row.done:
                    outcome = tried(row, ground)
                    done, wrong = done + 1, wrong + (outcome.before != outcome.after)
                    cells = (row.done, outcome.happened, outcome.before, outcome.after)
                    print(f"| {' | '.join(cells)} |", flush=True)
    print(f"{done - wrong} of {done} rows are as they should be", file=sys.stderr)
    return int(wrong > 0 or done == 0)


def tried(row: Row, ground: Ground) -> Outcome:
    """What came of a row; whatever else it ended in must not hide the other rows."""
    try:
        return row.do(ground)
    except Exception as error:
        return Outcome(f"NOT AS IT SHOULD BE: {type(error).__name__}: {error}", "one", "another")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    sys.exit(main())
