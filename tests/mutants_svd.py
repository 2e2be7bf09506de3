"""Deliberate bugs of the SVD of a stack: routes, block Krylov, selector, gauge.

    python tests/mutants_svd.py [--list] [--only NAME]

Same form and same hunt as in mutants.py.
"""

from __future__ import annotations

import sys

import mutants

# fmt: off
MUTANTS = [mutants.Mutant(*entry[:5], tuple(entry[5].split())) for entry in [
    ("basis-not-orthogonal", "krylov.py",
     "        rows = rows - (rows @ block.mT) @ block\n    return rows",
     "        rows = rows - 0 * (rows @ block.mT) @ block\n    return rows",
     "directions that were found are found again", "routes"),
    ("noise-repeats-the-basis", "krylov.py", "rest[row_lengths(rest) > 0.5].mT", "rest.mT",
     "rounding noise becomes a direction", "routes"),
    ("stops-too-early", "krylov.py", "SETTLED = 1e-6", "SETTLED = 1e-2",
     "the search ends on the way", "routes"),
    ("no-certificate", "krylov.py", "if outside > TRUST * operator.size:", "if len(rows):",
     "float32 vouches for what it cannot see", "routes"),
    ("ties-in-float32", "krylov.py", "rows[: rank + SPARE]", "rows[:rank]",
     "near ties are left as float32 mixed them", "lowrank"),
    ("start-keeps-its-scale", "krylov.py", "rows[usable] / length[usable, None]", "rows[usable]",
     "the length of the last A steers the search", "routes"),
    ("bad-start-never-left", "krylov.py", "[: max(width - 4, 0)]", "[:width]",
     "a start at right angles to what is wanted finds nothing", "routes"),
    ("precision-not-restored", "krylov.py", "            backend.fp32_precision = precision",
     "            pass", "the rest of the process computes otherwise", "routes"),
    ("medium-precision", "krylov.py", '            backend.fp32_precision = "ieee"',
     "            pass", "float32 products with bfloat16's digits", "routes"),
    ("gram-for-all", "routes.py",
     'return "gram" if pairs <= BLOCKS * block_size(rank) else "krylov"', 'return "gram"',
     "minutes and gigabytes for a thousand clients", "routes"),
    ("dense-keeps-noise", "routes.py", "max(noise, total_length(A, B))", "total_length(A, B)",
     "a direction of rounding noise takes a row that could train", "routes"),
    ("dead-pairs-reach-gram", "lowrank.py",
     "return (A, B) if bool(kept.all()) else (A[kept], B[:, kept])", "return A, B",
     "zero rows are divided by their length", "lowrank"),
    ("aligned-to-another-scale", "lowrank.py", "near = rescaled(reference, factors.scaling)",
     "near = reference", "a reference of another alpha turns too far", "gauge"),
]]
# fmt: on

if __name__ == "__main__":
    mutants.MUTANTS = MUTANTS
    sys.exit(mutants.main())
