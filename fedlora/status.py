"""Where a run stands, read from its directory: for the person who looks after it."""

from __future__ import annotations

import time
from pathlib import Path

from fedlora.config import Config
from fedlora.display import failure_text, round_line
from fedlora.privacy.reserve import configured_clients, shortage
from fedlora.resume import CHECKPOINTS, records
from fedlora.runlog import read_config, read_json


def status_lines(folder: Path) -> list[str]:
    """Lines of text: what runs, how far it is, the last rounds, and what can be done.

    ValueError where the folder holds no run.
    """
    config, log = read_config(folder), records(folder)
    rule = config.merge.rule.rpartition(".py:")[2]
    kind = f"rule {rule}" if config.run.mode == "federated" else config.run.mode
    done = log[-1]["round"] if log else 0
    lines = [f"{folder}: {kind}, seed {config.run.seed}, {_stand(folder, config)}"]
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


def _stand(folder: Path, config: Config) -> str:
    summary = folder / "summary.json"
    if summary.is_file() and not read_json(summary)["interrupted"]:
        return "ended"
    log = folder / "metrics.jsonl"
    since = time.time() - log.stat().st_mtime if log.is_file() else 0.0
    kept = sorted(path.stem for path in (folder / CHECKPOINTS).glob("round-*.ckpt"))
    last = f"checkpoint {kept[-1]}" if kept else "no checkpoint yet"
    stands = f"not ended, last sign {since:.0f} s ago, {last}; if nothing runs it any more"
    done = int(kept[-1].rpartition("-")[2]) if kept else 0
    clients = configured_clients(config, folder)
    reason = shortage(config, clients, folder, done + 1) if clients else ""
    if not reason:
        return f"{stands}: fedlora run --resume {folder}"
    if (folder / "adapter").is_dir():
        return f"{stands}, it cannot go on: {reason}; what there is is in {folder / 'adapter'}"
    how = f"; fedlora run --resume {folder} would only save the result of round {done}"
    return f"{stands}, it cannot go on: {reason}{how if done else ''}"
