"""What a merge says about itself: a few lines for the terminal, and the merged adapter's card."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from fedlora import __version__
from fedlora.adapter_folder import AdapterFolder
from fedlora.merging import Outcome

SHARE = 0.99  # of the energy that a suggested rank holds
WORST = 5
SHOWN = 8  # adapters that get a line of their own on the terminal


def natural(name: str) -> list[int | str]:
    """A sort key that puts layer 10 behind layer 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def summary(outcome: Outcome) -> list[str]:
    """The merge in a few lines: inputs, output, energy kept, worst layers, suggested rank."""
    lines, wanted = _inputs(outcome), f"{100 * SHARE:g} %"
    ranks = [layer.rank for layer in outcome.layers]
    lines.append(
        f"merged by {outcome.rule.name}: {len(ranks)} layers of rank {counted(ranks)}, "
        f"{outcome.dtype}".replace("torch.", "")
    )
    lines.append(f"energy kept: {percent(outcome.kept)} of the averaged increment")
    for layer in outcome.worst(WORST):
        if percent(layer.kept) != percent(1.0):
            lines.append(
                f"  {percent(layer.kept)}  {layer.name}: rank {layer.rank}; {wanted} would take "
                f"rank {layer.rank_for(SHARE)}"
            )
    lines.append(f"rank that holds {wanted} over all layers: {outcome.rank_for(SHARE)}")
    return lines


def model_card(outcome: Outcome, *, figure: str = "") -> str:
    """README.md of a merged adapter: what was merged with which rule and weights, what was lost."""
    base = outcome.adapters[0].settings.get("base_model_name_or_path")
    head = [f"base_model: {json.dumps(base)}"] if base else []
    rows = [
        f"| {_cell(adapter.folder.resolve().name)} | {weight:.6g} | {_ranks(adapter)} | "
        f"{_scalings(adapter)} | {_dtypes(adapter)} |"
        for adapter, weight in zip(outcome.adapters, outcome.weights, strict=True)
    ]
    options = ", ".join(f"{key} = {value}" for key, value in outcome.rule.options.items())
    ranks = [layer.rank for layer in outcome.layers]
    worst = [
        f"| {_cell(layer.name)} | {layer.rank} | {percent(layer.kept)} | {layer.rank_for(SHARE)} |"
        for layer in outcome.worst(WORST)
    ]
    lines = [
        "---",
        *head,
        "library_name: peft",
        "tags: [lora, merge, fedlora]",
        "---",
        "# Merged adapter",
        "",
        f"{len(rows)} LoRA adapter(s) merged with fedlora {__version__}, rule "
        f"**{outcome.rule.name}**{f' ({options})' if options else ''}: {outcome.rule.summary}",
        "",
        "| adapter | weight | rank | scaling | stored as |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"{len(ranks)} layers of rank {counted(ranks)}. Energy kept of the weighted mean of the "
        f"increments: {percent(outcome.kept)}; {len(outcome.adapters[0].dense)} dense tensors "
        "(heads) are weighted means.",
        "",
        f"The layers that lost most, and the rank that would hold {SHARE:.0%} of each; over all "
        f"layers together it is {outcome.rank_for(SHARE)}.",
        "",
        "| layer | rank | energy kept | rank for more |",
        "|---|---|---|---|",
        *worst,
    ]
    if figure:
        lines += ["", f"![Singular values of each layer's averaged increment]({figure})"]
    return "\n".join(lines) + "\n"


def percent(share: float) -> str:
    """A share with as many nines as it has: 99.98 %; 100 % only where nothing measurable is lost.

    (float32 at rest loses up to 1e-13 of the energy.)
    """
    if share > 1 - 1e-12:
        return "100 %"
    for digits in range(2, 12):
        if round(100 * share, digits) < 100:
            return f"{100 * share:.{digits}f} %"
    return "100 %"


def counted(values: Iterable[int | float]) -> str:
    """The distinct values: `8`, or `4 to 16` for many."""
    found = sorted(set(values))
    if len(found) == 1:
        return f"{found[0]:g}"
    return f"{found[0]:g} to {found[-1]:g}"


def _inputs(outcome: Outcome) -> list[str]:
    pairs = list(zip(outcome.adapters, outcome.weights, strict=True))
    if len(pairs) <= SHOWN:
        return [
            f"{weight:7.4f}  {adapter.folder}: rank {_ranks(adapter)}, scaling "
            f"{_scalings(adapter)}, {_dtypes(adapter)}"
            for adapter, weight in pairs
        ]
    ranks = [entry.rank for adapter, _ in pairs for entry in adapter.layers.values()]
    scalings = [entry.scaling for adapter, _ in pairs for entry in adapter.layers.values()]
    dtypes = Counter(_dtypes(adapter) for adapter, _ in pairs)
    return [
        f"{len(pairs)} adapters, weights {counted(outcome.weights)}: rank {counted(ranks)}, "
        f"scaling {counted(scalings)}, {', '.join(dtypes)}"
    ]


def _ranks(adapter: AdapterFolder) -> str:
    return counted(entry.rank for entry in adapter.layers.values())


def _scalings(adapter: AdapterFolder) -> str:
    return counted(entry.scaling for entry in adapter.layers.values())


def _dtypes(adapter: AdapterFolder) -> str:
    entries = (part for layer in adapter.layers.values() for part in (layer.A, layer.B))
    return ", ".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in entries}))


def _cell(text: str) -> str:
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"


def shortened(names: Sequence[str]) -> list[str]:
    """The names without what all of them begin with, up to a dot."""
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(p) > common + 1 for p in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    return [".".join(p[common:]) for p in parts]
