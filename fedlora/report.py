"""`fedlora report`: run directories to report.png, report.svg and report.md.

Reading is in `rundir`, drawing in `figures`; here are the tables and the writing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlora.canvas import save_figure
from fedlora.figures import draw_comparison, draw_run
from fedlora.files import write_text
from fedlora.rundir import (
    EXACT,
    Run,
    group_runs,
    last_known,
    mean_final,
    number,
    percent,
    plain,
    read_run,
)


def markdown(runs: Sequence[Run]) -> str:
    """A table with a row a run; then a row a client for one run, a row a method for repeated ones.

    Accuracy and macro-F1 are on the shared evaluation set, or on the clients' held-out rows where
    there is none; "held-out" is accuracy on the client's own data; MB are 10^6 bytes of all
    clients; a dash stands for what was not measured.
    """
    tables = [_table([_run_cells(run) for run in runs])]
    groups = group_runs(runs)
    if len(groups) < len(runs):
        tables.append(_table([_method_cells(label, members) for label, members, _ in groups]))
    if len(runs) == 1 and runs[0].clients:
        tables.append(_table([_client_cells(runs[0], client) for client in runs[0].clients]))
    return "\n".join(tables)


def write_report(
    paths: Sequence[Path | str], out: Path | str | None = None, rolling: int = 1
) -> list[Path]:
    """Write report.png, report.svg and report.md into the folder `out`, each whole or not at all.

    Where there is one run, `out` is its directory unless given. Same logs, same bytes. Raises
    ValueError for no run and for several without `out`.
    """
    if not paths or (len(paths) > 1 and out is None):
        raise ValueError(f"{len(paths)} runs and no folder to write to: give runs, and `out`")
    runs = [read_run(path) for path in paths]
    figure = draw_run(runs[0], rolling) if len(runs) == 1 else draw_comparison(runs, rolling)
    text = f"![accuracy, loss, merge error and traffic a round](report.svg)\n\n{markdown(runs)}"
    folder = Path(paths[0] if out is None else out)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"report.{kind}" for kind in ("png", "svg", "md")]
    save_figure(figure, written[0])
    save_figure(figure, written[1])
    write_text(written[2], text)
    return written


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def _run_cells(run: Run) -> dict[str, str]:
    setting, error = run.config["run"], last_known(run.series("merge_error"))
    parameters = number(run.summary, ("trainable_parameters",))
    return {
        "run": run.name,
        "mode/rule": f"{run.mode}/{run.rule_text}" if run.mode == "federated" else run.mode,
        "seed": str(setting.get("seed", "-")),
        "rounds": str(run.rounds[-1]["round"]),
        "accuracy": percent(run.final("accuracy")),
        "macro-F1": percent(run.final("macro_f1")),
        "loss": plain(run.final("loss"), ".3f"),
        "eval - train loss": plain(run.gap, "+.3f"),
        "last merge error": "exact" if error < EXACT else plain(error, ".2g"),
        "MB up": plain(run.megabytes("up")[-1], ",.2f"),
        "MB down": plain(run.megabytes("down")[-1], ",.2f"),
        "trainable parameters": plain(parameters, ",.0f"),
    }


def _method_cells(label: str, runs: Sequence[Run]) -> dict[str, str]:
    finals = [run.final("accuracy") for run in runs]
    return {
        "method": label,
        "mean accuracy": percent(mean_final(runs)),
        "lowest": percent(min(finals)),
        "highest": percent(max(finals)),
    }


def _client_cells(run: Run, client: str) -> dict[str, str]:
    def last(*keys: str) -> float:
        return last_known(run.series("clients", client, *keys))

    return {
        "client": client,
        "examples": plain(last("examples"), ",.0f"),
        "steps": plain(last("steps"), ",.0f"),
        "train loss": plain(last("train_loss"), ".3f"),
        "accuracy": percent(last("evaluation", "accuracy")),
        "macro-F1": percent(last("evaluation", "macro_f1")),
        "own held-out": percent(last("heldout", "accuracy")),
        "global on own held-out": percent(
            last_known(run.series("heldout", "clients", client, "accuracy"))
        ),
    }
