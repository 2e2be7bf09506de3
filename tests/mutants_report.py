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
    ("survivors-are-chosen", "sweep.py", "if trial.grid not in out}.values()", "}.values()",
     "a rate that failed on a tuning seed is judged by the others", "sweep"),
    ("ties-by-the-last-bit", "sweep.py", "return round(accuracy, 9),", "return accuracy,",
     "rounding chooses the rate", "sweep"),
    ("a-full-disk-is-a-result", "sweep.py", "if isinstance(error, OSError):",
     "if False:", "a rate is lost to a full disk", "sweep"),
    ("want-of-memory-is-a-result", "sweep.py", "if is_memory(error):",
     "if isinstance(error, MemoryError):", "torch's own errors of memory are others", "sweep"),
    ("a-spent-run-is-a-result", "sweep.py", "            check_goes_on(Path(out))\n", "",
     "a value is lost to a crash of a private run", "sweep"),
    ("ties-over-other-seeds", "sweep_report/findings.py",
     "if all(row[1] in seeds for seeds in own)", "if own", "methods stand for their seeds",
     "sweep_report"),
    ("bad-data-run-by-run", "sweep.py", "    check_data(sweep)\n    folder", "    folder",
     "every run fails with the same line", "sweep"),
    ("a-name-makes-another-run", "resume.py", 'FREE = ("run.out", "run.name")',
     'FREE = ("run.out",)', "a renamed sweep cannot go on", "sweep"),
    ("tuning-reads-the-evaluation-set", "sweep_plan.py", '"data.evaluate": NO_EVALUATION,',
     '"data.evaluate": "",', "that of built-in and hub data", "sweep_plan"),
    ("failure-sets-the-axis", "sweep_report/privacy.py",
     "if not usual[0] <= found.mean <= usual[1]:", "if False:",
     "one method at 20 % presses the others at 70 % together", "sweep_report"),
    ("last-error-for-all", "sweep_report/findings.py", "max(float(known.mean()), EXACT)",
     "max(float(known[-1]), EXACT)", "a hybrid passes for exact", "sweep_report"),
    ("curves-on-two-sets", "rundir.py", 'for key in ("subset", "global", "personal")',
     'for key in ("global", "global", "personal")', "a change of rows passes for one of the model",
     "sweep_report"),
    ("any-rise-is-overfitting", "sweep_report/words.py", "rises[most].half <= RISE",
     "rises[most].half <= -1", "noise of the seeds is called overfitting", "sweep_report"),
    ("pace-of-30-seconds", "display.py", "speed_estimate_period=math.inf",
     "speed_estimate_period=30.0", "no time left where a run takes a minute", "display"),
    ("bar-from-zero", "display.py", 'completed=facts["done"] * self.fits', "completed=0",
     "a resumed run seems to begin anew", "display"),
    ("who-sits-out-is-waited-for", "modes.py",
     "return round_size(clients, config.merge.participation)\n\n\ndef steps",
     "return clients\n\n\ndef steps", "the time left is that of all clients", "display"),
    ("finished-runs-set-the-pace", "cli_sweep.py", "self.progress.tasks[0].completed += 1",
     "self.progress.advance(self.task)", "a sweep that goes on is done in no time", "display"),
]]
# fmt: on

if __name__ == "__main__":
    mutants.MUTANTS = MUTANTS
    sys.exit(mutants.main())
