"""The sentences of a report, each made from the numbers it speaks of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlora.rundir import number, plain
from fedlora.significance import estimate
from fedlora.sweep_report.cases import Arm, Case
from fedlora.sweep_report.content import seeds
from fedlora.sweep_report.findings import (
    DECIDES,
    Tie,
    Versus,
    compared,
    exactness,
    final,
    lowest_loss,
    speed,
    target_of,
)
from fedlora.sweep_report.results import sent
from fedlora.sweep_report.tables import p_text

FEW = 5  # methods below which their rank correlation says nothing
RISE = 0.02  # nats: where evaluation loss surely rises less after its lowest, nothing is said of it


def case_summary(case: Case, baseline: str, share: float) -> str:
    """Who is best, whether that is more than noise, who is soonest, who overfits, what it costs."""
    scored = [arm for arm in case.there if math.isfinite(final(arm).mean)]
    rivals = [arm for arm in scored if arm.mode == "federated"] or scored
    if not rivals:
        return case.opening("no run with a final score is there.")
    best = max(rivals, key=lambda arm: final(arm).mean)
    kind = "federated methods" if best.mode == "federated" else "methods"
    lead = case.opening(f"highest mean accuracy of {len(rivals)} {kind}: {_scored(best)}.")
    lines = [lead]
    versus = {one.arm.method: one for one in compared(case, baseline)}
    if best.method in versus:
        lines.append(_against(best.method, baseline, versus[best.method]))
    elif best.method == baseline:
        lines.append(_baseline_leads(baseline, [v for v in versus.values() if v.arm in rivals]))
    lines.append(_soonest(case, rivals, share))
    lines.append(_overfits(rivals))
    lines.append(_cost(best, case.arm(baseline)))
    if references := [_scored(arm) for arm in scored if arm not in rivals]:
        lines.append(f"For reference: {'; '.join(references)}.")
    return " ".join(line for line in lines if line)


def gaps(cases: Sequence[Case]) -> list[str]:
    """What is planned and not there, case by case; empty where nothing is missing.

    A method may be in other cases alone.
    """
    lines = []
    for case in cases:
        for arm in case.arms:
            where = f"{arm.method}, {case.name}" if case.name else arm.method
            if not arm.planned and arm.tried:
                lines.append(f"{where}: only tuning runs are there, none that counts is planned.")
            elif arm.missing:
                lost = ", ".join(str(seed) for seed in arm.missing)
                there = f"{len(arm.runs)} of {len(arm.planned)} runs are there"
                lines.append(f"{where}: {there}; missing: seed {lost}.")
            if failed := [one for one in arm.tried if math.isnan(one.accuracy)]:
                lines.append(
                    f"{where}: {len(failed)} of {len(arm.tried)} tuning runs have no score; what "
                    "was tried in them is not chosen."
                )
    return lines


def subset_words(case: Case) -> list[str]:
    """Who was not evaluated by round, and on how many rows, where those are not all."""
    blind = [arm.method for arm in case.there if arm not in case.followed]
    words = [f"Not evaluated by round: {', '.join(blind)}."] if blind else []
    lines = [line for arm in case.there for run in arm.all for line in run.rounds[:-1]]
    early = {number(line, ("global", "examples")) for line in lines if line.get("global")}
    whole = {number(run.summary, ("final", "examples")) for arm in case.there for run in arm.all}
    early, whole = ({rows for rows in found if math.isfinite(rows)} for found in (early, whole))
    if not early or not whole or max(early) >= max(whole):
        return words
    return [
        *words,
        f"By round accuracy and loss were measured on {max(early):,.0f} of the {max(whole):,.0f} "
        "evaluation rows, drawn once by each seed; final scores are on all of them.",
    ]


def exactness_words(cases: Sequence[Case]) -> list[str]:
    """One sentence a case on merge error against accuracy."""
    return [
        _tied(case, tie) for case in cases if (tie := exactness(case)).runs >= 3 and tie.methods > 1
    ]


def _scored(arm: Arm) -> str:
    found = final(arm)
    half = f" ± {100 * found.half:.2f}" if math.isfinite(found.half) else ""
    return f"{arm.method}, {100 * found.mean:.2f} %{half} ({seeds(found.n)})"


def _difference(one: Versus) -> str:
    found = one.paired.difference
    text = f"{100 * found.mean:+.2f} points"
    if math.isfinite(found.half):
        low, high = found.mean - found.half, found.mean + found.half
        text += f" (95 % interval {100 * low:+.2f} to {100 * high:+.2f}"
        known = not math.isnan(one.corrected)
        text += f", p = {p_text(one.corrected)} after Holm)".replace("= <", "<") if known else ")"
    return text


def _verdict(one: Versus) -> str:
    if one.paired.n < DECIDES:
        return f"with {seeds(one.paired.n)} in common this decides nothing"
    if math.isnan(one.corrected):
        return "the pairs do not vary, so no test can be made"
    if one.beyond_noise:
        return "beyond the noise of the seeds"
    return "not told from the noise of the seeds, all comparisons allowed for"


def _against(name: str, baseline: str, one: Versus) -> str:
    if not one.paired.n:
        return f"{name} and {baseline} have no seed in common."
    return f"Against {baseline}: {_difference(one)}; {_verdict(one)}."


def _baseline_leads(baseline: str, versus: Sequence[Versus]) -> str:
    known = [one for one in versus if one.paired.n]
    if not known:
        return f"That is the baseline, {baseline}; nothing else is there to compare."
    nearest = max(known, key=lambda one: one.paired.difference.mean)
    return (
        f"That is the baseline; next is {nearest.arm.method}, {_difference(nearest)}; "
        f"{_verdict(nearest)}."
    )


def _soonest(case: Case, rivals: Sequence[Arm], share: float) -> str:
    """Which methods reached the target first, by the median over seeds; nothing where all did."""
    target = target_of(case, share)
    found = {arm.method: speed(arm, target).rounds for arm in rivals}
    known = {method: rounds for method, rounds in found.items() if not math.isnan(rounds)}
    first = min(known.values(), default=math.nan)
    if math.isnan(first):
        return ""
    if math.isinf(first):
        return f"No method reached {target:.1%} in half of its seeds."
    if len(known) > 1 and set(known.values()) == {first}:
        return ""
    names = "; ".join(method for method, rounds in known.items() if rounds == first)
    return f"Soonest at {target:.1%} accuracy: {names}, in round {first:.3g} (median)."


def _overfits(arms: Sequence[Arm]) -> str:
    """Who lost most of what evaluation loss had reached, and who least; nothing where none did."""
    rises = {
        arm.method: found
        for arm in arms
        if math.isfinite((found := estimate([lowest_loss(run)[1] for run in arm.all])).half)
    }
    most = max(rises, key=lambda name: rises[name].mean, default="")
    if not most or rises[most].mean - rises[most].half <= RISE:
        return ""
    least = min(rises, key=lambda name: rises[name].mean)
    text = (
        f"Overfitting: once at its lowest, evaluation loss rose by {rises[most].mean:.3f} ± "
        f"{rises[most].half:.3f} nats with {most}"
    )
    others = f", least, by {rises[least].mean:.3f}, with {least}" if least != most else ""
    return f"{text}{others}."


def _cost(best: Arm, base: Arm | None) -> str:
    moved = sent(best, "up") + sent(best, "down")
    text = f"{best.method} sends {plain(moved, ',.1f')} MB in a run, both ways, all clients"
    if base is None or base is best:
        return f"{text}."
    its = sent(base, "up") + sent(base, "down")
    return f"{text}; {base.method} {plain(its, ',.1f')} MB."


def _tied(case: Case, tie: Tie) -> str:
    lead = f"{case.title}: " if case.name else ""
    if math.isnan(tie.rho):
        return f"{lead}merge error or accuracy does not vary: nothing to correlate."
    text = (
        f"{lead}over {tie.runs} runs of {tie.methods} methods Spearman's correlation of merge "
        "error (mean over rounds) with final accuracy, each seed's mean taken off, is "
        f"{tie.rho:+.2f}"
    )
    if tie.methods < FEW or math.isnan(tie.p_methods):
        return f"{text}; {tie.methods} methods are too few to say more."
    means = f"over the methods' means it is {tie.rho_methods:+.2f} (p = {p_text(tie.p_methods)})"
    means = means.replace("= <", "<")
    if tie.p_methods >= 0.05:
        return f"{text}; {means}: these runs do not show that exactness and accuracy go together."
    side = "less" if tie.rho_methods > 0 else "more"
    return f"{text}; {means}: here {side} exact methods did better, whatever the cause."
