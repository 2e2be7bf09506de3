"""Where a run stands, read from its directory: for the person who looks after it."""

from __future__ import annotations

import time
from pathlib import Path

from fedlora.display import failure_text, round_line
from fedlora.files import owner
from fedlora.resume import records
from fedlora.runlog import CHECKPOINTS, has_ended, read_config, read_json
from fedlora.stopped import stopped_line


def status_lines(folder: Path) -> list[str]:
    """Lines of text: what runs, how far it is, the last rounds, and what can be done.

    ValueError where the folder holds no run.
    """
    config, log = read_config(folder), records(folder)
    rule = config.merge.rule.rpartition(".py:")[2]
    kind = f"rule {rule}" if config.run.mode == "federated" else config.run.mode
    done = log[-1]["round"] if log else 0
    lines = [f"{folder}: {kind}, seed {config.run.seed}, {_stand(folder)}"]
    lines += [f"round {done} of {config.run.rounds}"]
    lines += [f"  round {record['round']}: {round_line(record)}" for record in log[-3:]]
    failed = [record for record in log if record["failures"]]
    if failed:
        lines += [f"replies not used in {len(failed)} of {done} rounds; the last time:"]
        lines += [f"  round {failed[-1]['round']}: {failure_text(failed[-1])}"]
        lines += [f"    {failure['reason']}" for failure in failed[-1]["failures"]]
    summary = folder / "summary.json"
    stopped = read_json(summary).get("stopped_by") if summary.is_file() else None
    if stopped:
        lines += [f"stopped by: {stopped}"]
    return lines


def _stand(folder: Path) -> str:
    """Ended, running or stopped, with what can be done."""
    if has_ended(folder):
        return "ended"
    log = folder / "metrics.jsonl"
    since = time.time() - log.stat().st_mtime if log.is_file() else 0.0
    kept = sorted(path.stem for path in (folder / CHECKPOINTS).glob("round-*.ckpt"))
    newest = f"checkpoint {kept[-1]}" if kept else "no checkpoint yet"
    last, keeper = f"last sign {since:.0f} s ago, {newest}", owner(folder)
    if keeper:
        return f"not ended, running now ({keeper}), {last}"
    then = stopped_line(folder)
    if keeper is None:  # no locks here: nobody can tell
        return f"not ended, {last}; if nothing runs it any more: {then}"
    return f"not ended, {last}; {then}"
