"""The command line of the merge rules: merge adapters from disk, list rules, run a user's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


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

    console = Console()
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
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    where = f"written to {outcome.folder}" if outcome.folder else "nothing was written (--dry-run)"
    console.print(where, highlight=False, markup=False, soft_wrap=True)


def rules(
    name: Annotated[
        str, typer.Argument(help="Show this rule's whole story; ./FILE.py:NAME shows your own.")
    ] = "",
) -> None:
    """List the merge rules and what each promises."""
    from fedlora.rules import (
        LAWS,
        defaults,
        described,
        get_rule,
        option_types,
        rule_names,
        traffic,
        trained,
    )

    console = Console()
    if name:
        import_own_rule(name)
        found = get_rule(name)
        console.print(found.doc, highlight=False, markup=False, soft_wrap=True)
        for law, meaning in LAWS.items():
            claim = found.laws[law]
            kept = "yes" if claim is True else f"no: {claim}"
            console.print(f"{law.replace('_', ' ')} ({meaning}): {kept}", soft_wrap=True)
        up, down = traffic(found)
        console.print(f"clients train {trained(found)}; up {up}, down {down}", highlight=False)
        if found.residual:
            first, *rest = found.residual
            fates = ", ".join([f"{first} (default)", *rest])
            console.print(f"residual: {fates}", highlight=False)
        for option, value in defaults(found).items():
            kind = described(option_types(found)[option])
            text = f"option {option}: {kind}; now {value!r}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        return
    marked = ("exact", "linear", "mixed_ranks")
    heads = ["rule", "trains", *(law.replace("_", " ") for law in marked), "up", "down"]
    table = Table(*heads, "what it does", box=None, pad_edge=False)
    for name in rule_names():
        found = get_rule(name)
        marks = ["yes" if found.laws[law] is True else "-" for law in marked]
        table.add_row(name, trained(found), *marks, *traffic(found), found.summary)
    console.print(table)
    console.print(
        "up, down: numbers sent per layer (m x n), client and round; f is the rank of what was "
        "folded\n`fedlora rules NAME` tells the whole story of one"
    )


def import_own_rule(name: str) -> None:
    """Runs the user's file where a rule is named as one: this is the user's own command line."""
    from fedlora.own_rules import import_rule
    from fedlora.rules import is_file

    if is_file(name):
        import_rule(name)
