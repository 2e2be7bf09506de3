"""Deliberate bugs, each put alone into a copy of the library: the tests must catch every one.

    python tests/mutants.py [--list] [--only NAME] [-k EXPRESSION]

Most are shipped bugs of public federated-LoRA codes. To add one, add an entry to MUTANTS. Tests
that fail without any mutant are named and left out, so that they cannot pass for a catch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).absolute().parents[1]


@dataclass(frozen=True)
class Mutant:
    """`old`, found exactly once in fedlora/`file`, becomes `new`; one of `tests` must then fail."""

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]


# fmt: off
MUTANTS = [Mutant(*entry[:5], tuple(entry[5].split())) for entry in [
    # ------------------------------------------------------------ the algebra
    ("root-on-one-factor", "lowrank.py", "Factors(root[:, None] * Vh, U * root, scaling)",
     "Factors(Vh, U * root, scaling)",
     "sqrt(S) on B alone: silent, about 5x the optimal error", "lowrank conformance"),
    ("mix-drops-scaling", "adapter.py", "client.B * (weight * (client.scaling / scaling))",
     "client.B * weight", "clients of other rank or alpha are weighed wrongly", "adapter"),
    ("mean-drops-scaling", "adapter.py", "(weight * (client.scaling / scaling)) * client.B",
     "weight * client.B", "s_k not folded into B_k before a mean", "adapter conformance"),
    ("norm-half-scaled", "adapter.py", "return left.scaling * right.scaling * sum(products)",
     "return left.scaling * sum(products)", "norms off by alpha / r", "adapter"),
    ("residual-transposed", "lowrank.py", "_gauged(U[:, rank:end], S[rank:end], Vh[rank:end],",
     "_gauged(Vh[rank:end].mT, S[rank:end], U[:, rank:end].mT,",
     "invisible on square layers", "conformance"),
    ("residual-subtracted", "lowrank.py",
     "return Merged(_finished(head, rank, gauge, previous), tail)",
     "both = torch.cat([factors.A, head.A]), torch.cat([factors.B, -head.B], dim=1)\n"
     "    return Merged(_finished(head, rank, gauge, previous), Factors(*both, factors.scaling))",
     "mix minus result: all noise where clients are close", "lowrank"),
    ("sign-not-fixed", "lowrank.py", "return U * signs, S, Vh * signs[:, None]", "return U, S, Vh",
     "factors jump between machines and rounds", "lowrank"),
    ("sign-on-one-side", "lowrank.py", "return U * signs, S, Vh * signs[:, None]",
     "return U * signs, S, Vh", "half of the directions point backwards", "lowrank"),
    ("no-fill-in", "lowrank.py", "rows = free[torch.cat([order, extra])]", "pass",
     "pairs with A = 0 and B = 0 never train again", "conformance"),
    ("fill-in-not-orthogonal", "lowrank.py",
     "return rows - (rows @ basis) @ basis.mT", "return rows",
     "rows that are there already fill up the rank", "lowrank"),
    ("noise-as-directions", "routes.py", "int(torch.count_nonzero(floor < S))", "S.numel()",
     "duplicates and B = 0 give directions of rounding noise", "lowrank"),
    ("cancellation-not-seen", "lowrank.py", 'if not cancelled or route == "gram":', "if True:",
     "the Gram route loses all digits where terms cancel", "lowrank"),
    # ------------------------------------------------------------ rules
    ("first-clients-a", "rules/fedavg.py", "return mean_factors(clients, weights, prev.scaling)",
     "return Factors(clients[0].A, mean_factors(clients, weights, prev.scaling).B, prev.scaling)",
     "the state dict of the first client, updated for B only", "conformance"),
    ("ffa-averages-a", "rules/ffa.py",
     "return Factors(prev.A, mean_factors(clients, weights, prev.scaling).B, prev.scaling)",
     "return mean_factors(clients, weights, prev.scaling)", "A moves by rounding", "conformance"),
    ("ffa-trains-a", "rules/ffa.py", 'trains=["B"],', 'trains=["A", "B"],',
     "plain FedAvg under FFA's name", "simulate conformance"),
    ("fra-other-scaling", "rules/fra.py", "mixed = mix(clients, weights, prev.scaling)",
     "mixed = mix(clients, weights, 1.0)", "a message has no scaling: the receiver's is used",
     "conformance"),
    ("false-claim", "rules/fedavg.py", 'exact="the product of means leaves out the covariance of '
     'the factors"', "exact=True", "a rule claims a law that it does not keep", "conformance"),
    ("false-modesty", "rules/fra.py", "equivariant=True",
     'equivariant="turning the increments would turn something else"',
     "a law is declined that holds", "conformance"),
    # ------------------------------------------------------------ the server
    ("weights-ignored", "policy.py", 'counts if weighting == "examples" else [1] * len(counts)',
     "[1] * len(counts)", "examples do not count", "server"),
    ("no-sort", "server.py", "sorted(results, key=lambda result: result.client)", "list(results)",
     "the order of replies changes bits", "server conformance"),
    ("float32-sums", "policy.py", "exact = precise(factors)",
     "exact = factors", "many clients lose digits", "server"),
    ("float32-head", "server.py", "term.adapter.dense[name].double().cpu()",
     "term.adapter.dense[name]",
     "the same for the head", "server"),
    ("head-forgotten", "server.py",
     "{name: _averaged(parts, name) for name in sorted(state.adapter.dense)}",
     "state.adapter.dense", "the head is never merged", "server"),
    ("uniform-merge-error", "server.py", "_size(factors, weights, lost)",
     "_size(factors, torch.full_like(weights, 1 / len(weights)), lost)",
     "the error is measured against another mean than the wanted one", "server"),
    ("local-head-shared", "server.py", 'return replace(plan, trains=plan.trains | {"head"})',
     'return replace(plan, trains=plan.trains | {"head"}, shares=plan.shares | {"head"})',
     "a head that should stay leaves its owner", "simulate"),
    ("frozen-head-trains", "server.py", "plan.trains - {\"head\"}, plan.shares",
     "plan.trains | {\"head\"}, plan.shares",
     "clients spend steps on a head that is thrown away", "server"),
    ("nan-let-in", "server.py", "torch.isfinite(tensor)", "torch.isinf(tensor).logical_not()",
     "one diverged client destroys the adapter", "server"),
    ("inf-let-in", "server.py", "torch.isfinite(tensor)", "torch.isnan(tensor).logical_not()",
     "the same for infinity", "server"),
    ("shape-let-in", "server.py", "if tensor.shape != want.shape:",
     "if tensor.numel() != want.numel():", "a transposed factor is taken", "server"),
    ("dtype-let-in", "server.py", "if tensor.dtype != want.dtype:", "if False:",
     "bfloat16 on the wire", "server"),
    ("missing-let-in", "server.py", "sorted(set(expected) - set(tensors))", "[]",
     "PEFT's own loader accepts this silently", "server"),
    ("extra-let-in", "server.py", "sorted(set(tensors) - set(expected))", "[]",
     "a client overwrites what it may not", "server"),
    ("everything-sent-down", "server.py", "plan.receives | {\"frozen\"})",
     "{\"A\", \"B\", \"head\", \"frozen\"})", "a plan's savings exist on paper only", "simulate"),
    ("unsorted-sampling", "server.py", "ids = sorted(clients)", "ids = list(clients)",
     "the draw depends on who connected first", "server"),
    ("one-sample-for-all-rounds", "server.py", '"sample", round)', '"sample")',
     "the same clients in every round", "server"),
    # ------------------------------------------------------------ the loop
    ("state-of-another", "simulation.py", "states.get(client, ClientState())",
     "next(reversed(states.values()), ClientState())", "a head leaks to the next client",
     "simulate"),
    ("bytes-of-everything", "simulation.py",
     "shared = flatten(copied(result.adapter), opened.plan.shares)",
     "shared = flatten(copied(result.adapter))", "FFA's uploads look like FedAvg's", "simulate"),
    # ------------------------------------------------------------ streams, rows, settings
    ("seeds-run-together", "seeding.py", '"\\x1f".join(', '"".join(',
     "client a in round 12 draws as client a1 in round 2", "seeding"),
    ("seed-forgotten", "seeding.py", "PCG64(derive(seed, *names))", "PCG64(derive(0, *names))",
     "every seed gives the same partition", "server"),
    ("row-given-twice", "partition.py", "order[start :: len(clients)]",
     "order[max(start - 1, 0) :: len(clients)]", "two clients share rows", "partition"),
    ("rows-drawn-with-return", "partition.py", "np.split(rng.permutation(rows), edges",
     "np.split(rng.choice(rows, rows.size), edges", "rows repeat, others vanish", "partition"),
    ("column-rows-shifted", "partition.py", "np.cumsum(np.bincount(place))",
     "np.cumsum(np.bincount(place)) - 1", "a client gets a row of its neighbour", "partition"),
    ("row-lost-to-rounding", "partition.py", "* size + 1e-9)", "* size)",
     "0.1 + 0.2 is not 0.3: a row short", "partition"),
    ("heldout-leaks", "partition.py", "return np.setdiff1d(rows, apart), apart",
     "return rows, apart", "clients train on what they are judged by", "partition"),
    ("overrides-ignored", "config.py",
     "settings |= anchored(parse_overrides(overrides), Path.cwd())",
     "settings = anchored(parse_overrides(overrides), Path.cwd()) | settings",
     "--set does nothing where the file has the key", "config"),
    ("no-upper-bound", "config.py", "(high is not None and value > high)", "False",
     "a participation of 150 %", "config"),
    ("bound-let-in", "config.py", "value <= above", "value < above", "lr = 0 trains nothing",
     "config"),
    ("paths-from-here", "sources.py",
     "return str((folder / Path(name).expanduser()).resolve()) if",
     "return str(Path(name).resolve()) if", "a config works from its own folder only", "config"),
]]
# fmt: on


def main() -> int:
    """Prints one line per mutant; 1 if one survived, was not found or broke the import."""
    parser = argparse.ArgumentParser(description="Deliberate bugs that the tests must catch.")
    parser.add_argument("--only", metavar="NAME", action="append", help="one mutant; repeatable")
    parser.add_argument("-k", metavar="EXPR", default="", help="with the tests that match alone")
    parser.add_argument("--list", action="store_true", help="name them and end")
    arguments = parser.parse_args()
    wanted = arguments.only or [mutant.name for mutant in MUTANTS]
    if odd := set(wanted) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no mutant {min(odd)!r}; --list names them")
    chosen = [mutant for mutant in MUTANTS if mutant.name in wanted]
    if arguments.list:
        for mutant in chosen:
            print(f"{mutant.name:26} {mutant.file:18} {mutant.why}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        return hunt(chosen, Path(folder), [f"-k={arguments.k}"] if arguments.k else [])


def hunt(chosen: list[Mutant], folder: Path, options: list[str]) -> int:
    """Runs the chosen mutants one after another in a copy of the library."""
    for part in ("fedlora", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    check_import(folder)
    files = sorted({name for mutant in chosen for name in mutant.tests})
    failing = failures(pytest(folder, files, *options))
    for test in failing:
        print(f"fails without a mutant, left out: {test}")
    skip = [*options, *(f"--deselect={test}" for test in failing)]
    bad = 0
    for mutant in chosen:
        began = perf_counter()
        outcome, catch = tried(mutant, folder, skip)
        bad += outcome != "caught"
        seconds = perf_counter() - began
        print(f"{mutant.name:26} {outcome:9} {seconds:5.1f} s  {catch or mutant.why}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} caught")
    return 1 if bad else 0


def tried(mutant: Mutant, folder: Path, skip: list[str]) -> tuple[str, str]:
    """The outcome of one mutant and the test that caught it; the file is put back."""
    path = folder / "fedlora" / mutant.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        return "NOT FOUND", f"the old text is there {source.count(mutant.old)} times"
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    done = pytest(folder, mutant.tests, "-x", *skip)
    path.write_text(source, encoding="utf-8")
    caught = failures(done)
    if done.returncode == 1 and caught:
        return "caught", caught[0]
    return (
        ("SURVIVED", "") if done.returncode == 0 else ("BROKEN", (done.stdout + done.stderr)[-300:])
    )


def pytest(folder: Path, tests: list[str] | tuple[str, ...], *options: str) -> Completed:
    """Runs tests/test_NAME.py of the copy for each name."""
    files = [f"tests/test_{name}.py" for name in tests]
    command = ["-m", "pytest", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
    return python(folder, *command, *options, *files)


def failures(done: Completed) -> list[str]:
    """The ids of failed tests, from pytest's short summary."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return [line.split(" ", 1)[1].split(" - ")[0] for line in lines]


def check_import(folder: Path) -> None:
    """Raises RuntimeError unless the copy is what the tests import."""
    where = python(folder, "-c", "import fedlora; print(fedlora.__file__)").stdout.strip()
    if not Path(where).is_relative_to(folder.resolve()):
        raise RuntimeError(f"the tests would import {where or 'nothing'}, not the copy in {folder}")


def python(folder: Path, *arguments: str) -> Completed:
    """No bytecode is kept: a mutant of the same size and second would run as the original."""
    kept = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | kept,
        capture_output=True,
        text=True,
        timeout=3600,  # all files of a list, unbroken, are the longest
        check=False,
    )


Completed = subprocess.CompletedProcess[str]

if __name__ == "__main__":
    sys.exit(main())
