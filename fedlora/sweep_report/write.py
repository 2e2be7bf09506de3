"""Writes the report of a sweep: sections from its runs, then page, Markdown and figures.

A function of the sweep's folder: the same folder gives the same files.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from fedlora.canvas import save_figure
from fedlora.files import write_text
from fedlora.hints import near
from fedlora.sweep_report.budget_figures import budget_pictures
from fedlora.sweep_report.cases import Case, method_names, read_cases
from fedlora.sweep_report.clients import clients_tables
from fedlora.sweep_report.content import Block, Choices, Picture, Report, Section, Words
from fedlora.sweep_report.findings import compared, one_setting_apart, target_of
from fedlora.sweep_report.markdown import markdown_page
from fedlora.sweep_report.page import html_page
from fedlora.sweep_report.privacy import privacy_section
from fedlora.sweep_report.provenance import origin_table, tuning_words
from fedlora.sweep_report.results import (
    cost_picture,
    exactness_picture,
    final_picture,
    tuning_picture,
)
from fedlora.sweep_report.rounds import accuracy_picture, early_picture, loss_picture
from fedlora.sweep_report.sheets import draw_sheet
from fedlora.sweep_report.tables import (
    budget_table,
    change_table,
    chosen_table,
    cost_table,
    early_table,
    final_table,
    overfitting_table,
    paired_table,
)
from fedlora.sweep_report.words import case_summary, exactness_words, gaps, subset_words
from fedlora.sweepdir import SweepRuns, read_sweep


def write_sweep_report(
    folder: Path, out: Path | None = None, choices: Choices | None = None
) -> list[Path]:
    """Writes index.html, report.md and figures/ into `out` (the sweep's `report` folder).

    Errors as in `sweep_report`.
    """
    report, target = sweep_report(folder, out, choices), out or folder / "report"
    (target / "figures").mkdir(parents=True, exist_ok=True)
    pages = [target / "index.html", target / "report.md"]
    write_text(pages[0], html_page(report))
    write_text(pages[1], markdown_page(report))
    return pages + [file for one in _pictures(report.sections) for file in _draw(one, target)]


def sweep_report(folder: Path, out: Path | None = None, choices: Choices | None = None) -> Report:
    """What the sweep's runs say; nothing is drawn yet. `out` is named in the command alone.

    What is not there yet is left out and named. ValueError for a folder that holds no sweep or no
    finished run, for an unknown baseline and for a target that is no share.
    """
    chosen = choices or Choices()
    sweep = read_sweep(folder)
    cases = read_cases(sweep)
    if not any(case.there for case in cases):
        raise ValueError(_nothing_yet(sweep))
    baseline = _baseline(sweep, chosen)
    sections = [_case_section(sweep, case, baseline, chosen) for case in cases]
    private = privacy_section(cases, _varied(sweep))
    sections += [private, _exactness_section(cases), _origin_section(cases)]
    full = [section for section in sections if section.blocks or section.sections]
    summary, command = _summary(cases, baseline, chosen), _command(folder, out, chosen)
    return Report(f"Sweep {sweep.name}", summary, full, command)


def _nothing_yet(sweep: SweepRuns) -> str:
    if sweep.entries and all(entry.tuning for entry in sweep.entries):
        done = f"{len(sweep.runs)} of {len(sweep.entries)} tuning runs have ended"
        return f"the settings of the sweep {sweep.folder} are not chosen yet ({done}): run it first"
    return f"no run of the sweep {sweep.folder} that counts has ended yet: run it first"


def _baseline(sweep: SweepRuns, chosen: Choices) -> str:
    names = method_names(sweep)
    rules = {entry.method: entry.varied.get("merge.rule") for entry in sweep.entries}
    wanted = chosen.baseline or "fedavg"
    same = [name for name in names if name == wanted] or [n for n in names if rules[n] == wanted]
    if chosen.baseline and len(same) != 1:
        hint = near(chosen.baseline, names)
        quoted = ", ".join(map(repr, same or names))
        count = "several methods" if same else "no method"
        raise ValueError(f"the sweep has {count} {chosen.baseline!r}{hint}; it has {quoted}")
    if not 0 < chosen.target <= 1:
        raise ValueError(f"target must be a share above 0, at most 1, got {chosen.target:g}")
    return (same or names)[0]


def _summary(cases: Sequence[Case], baseline: str, chosen: Choices) -> list[str]:
    lines = [case_summary(case, baseline, chosen.target) for case in cases]
    planned = sum(len(arm.planned) for case in cases for arm in case.arms)
    there = sum(len(arm.runs) for case in cases for arm in case.arms)
    if there < planned:
        lines.insert(
            0, f"Not complete: {there} of {planned} planned runs are there (listed below)."
        )
    if any(len(case.there) > 2 for case in cases):
        lines.append(
            "The best of several was picked by the figures it is judged by, which flatters it a "
            "little; the tables have all methods."
        )
    return lines


def _case_section(sweep: SweepRuns, case: Case, baseline: str, chosen: Choices) -> Section:
    missing = gaps([case])
    if not case.there:
        return Section(case.heading, [Words(missing)])
    versus = compared(case, baseline)
    paired = [paired_table(baseline, versus)] if versus else [_no_pairs(case, baseline)]
    parts: list[tuple[str, list[Block | None]]] = [
        ("Final accuracy", [final_picture(case, baseline, versus), final_table(case), *paired]),
        ("Accuracy by round", _followed(case, chosen)),
        ("Each client", [*clients_tables(case)]),
        ("Early convergence", _early(case, chosen)),
        ("Overfitting", [loss_picture(case, chosen.rolling), overfitting_table(case)]),
        ("Communication and server time", [cost_picture(case), cost_table(case)]),
        (_tuned(case), [tuning_picture(case), chosen_table(case)]),
        ("One setting at a time", _ablations(sweep, case)),
        ("Error budget", [*budget_pictures(case), budget_table(case)]),
    ]  # fmt: skip
    inner = [
        Section(title, known)
        for title, blocks in parts
        if (known := [block for block in blocks if block is not None])
    ]
    return Section(case.heading, [Words(missing)] if missing else [], inner)


def _tuned(case: Case) -> str:
    tuned = {key for arm in case.arms for one in arm.tried for key in one.grid}
    return "Sensitivity to the learning rate" if tuned == {"client.lr"} else "Tuned settings"


def _followed(case: Case, chosen: Choices) -> list[Block | None]:
    words: list[Block | None] = [Words(lines)] if (lines := subset_words(case)) else []
    return [*words, accuracy_picture(case, chosen.rolling)] if case.followed else words


def _early(case: Case, chosen: Choices) -> list[Block | None]:
    target = target_of(case, chosen.target)
    if math.isnan(target) or not case.followed:
        return [Words(["No accuracy by round is there, or no final one."])]
    share = f"{chosen.target:.0%} of the best mean final accuracy of this case"
    return [
        Words([f"The target is {target:.1%}: {share}."]),
        early_picture(case, target, chosen.rolling),
        early_table(case, target),
    ]


def _no_pairs(case: Case, baseline: str) -> Words:
    if case.arm(baseline) is None:
        return Words([f"No run of the baseline {baseline} is there: no differences can be given."])
    return Words([f"Only {baseline} is there: nothing to compare it with."])


def _ablations(sweep: SweepRuns, case: Case) -> list[Block | None]:
    groups = one_setting_apart(case, _varied(sweep))
    return [change_table(base, changes) for base, changes in groups]


def _varied(sweep: SweepRuns) -> list[str]:
    """The settings in which the sweep's runs differ, but for those that are tuned."""
    tuned = {key for entry in sweep.entries for key in entry.grid}
    varied = dict.fromkeys(key for entry in sweep.entries for key in entry.varied)
    return [key for key in varied if key not in tuned]


def _exactness_section(cases: Sequence[Case]) -> Section:
    picture = exactness_picture(cases)
    if not picture.panels:
        return Section("Exactness and accuracy")
    words = exactness_words(cases)
    return Section("Exactness and accuracy", [*([Words(words)] if words else []), picture])


def _origin_section(cases: Sequence[Case]) -> Section:
    return Section("Where this comes from", [Words([tuning_words(cases)]), origin_table(cases)])


def _command(folder: Path, out: Path | None, chosen: Choices) -> str:
    """The call that makes this report again; of an absolute path only the last part is named."""
    words = ["fedlora", "report", folder.name if folder.is_absolute() else str(folder)]
    words += ["--out", out.name if out.is_absolute() else str(out)] if out else []
    words += ["--rolling", str(chosen.rolling)] if chosen.rolling > 1 else []
    words += ["--baseline", chosen.baseline] if chosen.baseline else []
    words += ["--target", f"{chosen.target:g}"] if chosen.target != Choices.target else []
    return shlex.join(words)


def _pictures(sections: Sequence[Section]) -> list[Picture]:
    own = [block for part in sections for block in part.blocks if isinstance(block, Picture)]
    return own + [picture for part in sections for picture in _pictures(part.sections)]


def _draw(picture: Picture, folder: Path) -> list[Path]:
    files = [folder / "figures" / f"{picture.slug}.{kind}" for kind in ("svg", "png")]
    figure = draw_sheet(picture)
    for file in files:
        save_figure(figure, file)
    return files
