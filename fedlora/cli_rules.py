"""The command line of the merge rules: merge adapters from disk, list rules, run a user's own."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import wrap
from typing import Annotated

import typer

from fedlora.terminal import plain_console

MARKED = ("exact", "linear", "mixed_ranks")  # the laws that the list of rules names
INDENT, WIDEST = 13, 100  # columns
LEGEND = (
    "exact: with its residual the weighted mean of the increments; linear: every factor is a "
    "weighted sum of the clients'; mixed ranks: clients may have different ranks. up, down: "
    "numbers sent per layer (m x n), client and round; f is the rank of what was folded. `fedlora "
    "rules NAME` tells the whole story of one, `fedlora rules ./FILE.py` which rules a file has."
)


def merge(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Adapter folders in PEFT's form.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The new folder to write.")
    ] = None,
    rule: Annotated[
        str, typer.Option(help="Merge rule; `fedlora rules` lists them; ./FILE.py:NAME is yours.")
    ] = "fra",
    rank: Annotated[
        str, typer.Option(help="Rank of all layers, or auto:SHARE of the energy; else as put in.")
    ] = "",
    weights: Annotated[str, typer.Option(help="One a folder, as 3,1,1; else all alike.")] = "",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the rule. Repeatable."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Allow bases of other names, same layers.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, merge and print; write nothing.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Also draw the singular values, PNG and SVG.")
    ] = False,
) -> None:
    """Merge finished adapters from disk into one, without their base model."""
    from fedlora.merge_card import summary
    from fedlora.merge_command import merged

    console = plain_console()
    import_own_rule(rule)
    try:
        outcome = merged(
            adapters,
            out,
            dry_run=dry_run,
            rule=rule,
            options=option or [],
            rank=rank,
            weights=weights,
            dtype=dtype,
            other_base=other_base,
            report=report,
            console=console,
        )
    except KeyboardInterrupt:
        sys.stderr.write("fedlora: interrupted; nothing was written\n")
        raise SystemExit(130) from None
    for line in summary(outcome):
        console.print(line, soft_wrap=True)
    where = f"written to {outcome.folder}" if outcome.folder else "nothing was written (--dry-run)"
    console.print(where, soft_wrap=True)


def rules(
    name: Annotated[
        str, typer.Argument(help="Show this rule's whole story; ./FILE.py:NAME shows your own.")
    ] = "",
) -> None:
    """List the merge rules and what each promises."""
    from fedlora.rules import LAWS, defaults, described, get_rule, option_types, traffic, trained

    console = plain_console()
    if name:
        import_own_rule(name)
        found = get_rule(name)
        console.print(found.doc, soft_wrap=True)
        for law, meaning in LAWS.items():
            claim = found.laws[law]
            kept = "yes" if claim is True else f"no: {claim}"
            console.print(f"{law.replace('_', ' ')} ({meaning}): {kept}", soft_wrap=True)
        up, down = traffic(found)
        console.print(f"clients train {trained(found)}; up {up}, down {down}")
        if found.residual:
            first, *rest = found.residual
            fates = ", ".join([f"{first} (default)", *rest])
            console.print(f"residual: {fates}")
        for option, value in defaults(found).items():
            kind = described(option_types(found)[option])
            text = f"option {option}: {kind}; now {value!r}"
            console.print(text, soft_wrap=True)
        return
    for line in rule_lines(min(console.width, WIDEST)):
        console.print(line, soft_wrap=True)


def rule_lines(width: int) -> list[str]:
    """Every rule in two or three lines of at most `width` columns, and what the words mean."""
    from fedlora.rules import get_rule, rule_names, traffic, trained

    lines: list[str] = []
    for name in rule_names():
        found = get_rule(name)
        up, down = traffic(found)
        kept = [law.replace("_", " ") for law in MARKED if found.laws[law] is True]
        facts = [f"trains {trained(found)}", *kept, f"up {up}", f"down {down}"]
        lines += wrap(f"{name:{INDENT}}{found.summary}", width, subsequent_indent=" " * INDENT)
        indent = " " * INDENT
        lines += wrap("; ".join(facts), width, initial_indent=indent, subsequent_indent=indent)
    lines += ["", *wrap(LEGEND, width)]
    return lines


def import_own_rule(name: str) -> None:
    """Runs the user's file where a rule is named as one: this is the user's own command line."""
    from fedlora.own_rules import import_rule
    from fedlora.rules import is_file

    if is_file(name):
        import_rule(name)
