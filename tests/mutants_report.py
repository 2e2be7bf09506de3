"""Deliberate bugs of a sweep's report: statistics, what counts as reached, what is escaped.

    python tests/mutants_report.py [--list] [--only NAME]

Same form and same hunt as in mutants.py.
"""

from __future__ import annotations

import sys

import mutants

# fmt: off
MUTANTS = [mutants.Mutant(*entry[:5], tuple(entry[5].split())) for entry in [
    ("normal-for-t", "significance.py", "stdtrit(n - 1, (1 + LEVEL) / 2)",
     "ndtri((1 + LEVEL) / 2)", "1.96 for five seeds: intervals too narrow", "significance"),
    ("one-sided-p", "significance.py", 'float(2 * _scipy("special")', 'float(_scipy("special")',
     "half the p value", "significance"),
    ("holm-not-monotone", "significance.py", "worst = max(worst, min(1.0,", "worst = (min(1.0,",
     "a larger p gets a smaller corrected one", "significance"),
    ("rounding-is-a-spread", "significance.py", "or difference.sd < NOISE", "",
     "t of 10^15 where all pairs differ by the same", "significance"),
    ("pairs-by-place", "sweep_report/findings.py",
     "common = [seed for seed in mine if seed in its]",
     "common = [seed for seed in mine if seed in its or its.setdefault(seed, max(its.values()))]",
     "a missing seed of the baseline is made up", "sweep_report"),
    ("start-counts-as-reached", "sweep_report/curves.py",
     '(accuracy(run) >= target) & (run.series("round") > 0)', "accuracy(run) >= target",
     "an untrained model is the soonest", "sweep_report"),
    ("never-left-out", "sweep_report/findings.py", "median([one.round for one in found])",
     "median([one.round for one in found if math.isfinite(one.round)])",
     "the median of those that got there", "sweep_report"),
    ("earlier-score-as-final", "rundir.py", "last_known(self.evaluation(metric)[trained])",
     "last_known(self.evaluation(metric))", "the untrained start is a result", "report"),
    ("names-unescaped", "sweep_report/page.py", "<td{_kind(place, table)}>{escape(cell)}</td>",
     "<td{_kind(place, table)}>{cell}</td>", "a cell of a table becomes markup", "sweep_report"),
    ("ids-shared", "sweep_report/sheets.py", 'lambda found: f"{found[1]}{prefix}-"',
     "lambda found: found[1]", "one figure clips by the box of another", "sweep_report"),
    ("rules-as-ablation", "sweep_report/findings.py",
     "fixed = {arm.method: [setting(arm.all[0], key) for key in METHODS] for arm in arms}",
     "fixed = {arm.method: [] for arm in arms}",
     "another rule with the same settings passes for another setting", "sweep_report"),
]]
# fmt: on

if __name__ == "__main__":
    mutants.MUTANTS = MUTANTS
    sys.exit(mutants.main())
