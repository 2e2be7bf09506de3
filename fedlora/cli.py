"""The command line: reads arguments, calls the library, turns errors into a line and exit code 2.

Heavy imports stay inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from fedlora import __version__
from fedlora.cli_privacy import privacy
from fedlora.cli_report import report
from fedlora.cli_rules import import_own_rule, merge, rules
from fedlora.cli_sweep import sweep
from fedlora.errors import is_memory
from fedlora.terminal import plain_console

if TYPE_CHECKING:
    from fedlora.config import Config
    from fedlora.resume import Resumed

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune language models with LoRA on data that stays where it is; merge the adapters.",
)

flower = typer.Typer(no_args_is_help=True, help="Federations across machines, on Flower.")
app.add_typer(flower, name="flower")

Engine = Literal["process", "flower"]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting. Repeatable."),
]
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The run's settings.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Client = Annotated[str, typer.Option("--client", help="Use this client's own adapter.")]


def run(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="The run's settings.")
    ] = None,
    set: Sets = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Go on with a run that stopped, to its end."),
    ] = None,
    engine: Annotated[
        Engine, typer.Option("--engine", help="In one process, or in Flower's simulation.")
    ] = "process",
) -> None:
    """Run a federation (or a reference) and leave adapter, log, model card and figure."""
    if resume is None and config is None:
        raise ValueError("name a config to run, or a run directory with --resume")
    given = _loaded(config, set) if config is not None else None
    if resume is None and given is not None:
        (_run if engine == "process" else _run_on_flower)(given)
        return
    if engine != "process":
        raise ValueError("--resume goes on in one process, to the same bytes: leave --engine out")
    if set and config is None:
        raise ValueError("--set changes a config: a run is resumed with its own")
    _resume(resume or Path(), given)


def _print_version(wanted: bool) -> bool:
    if wanted:
        sys.stdout.write(f"fedlora {__version__}\n")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and end."),
    ] = False,
) -> None:
    """What stands before a command; the app's own help is shown."""


def status(run: RunPath) -> None:
    """Show where a run stands: its round, scores, failures, and whether it can be resumed."""
    from fedlora.status import status_lines

    for line in status_lines(run):
        plain_console().print(line, soft_wrap=True)


@flower.command("init")
def flower_init(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The new project's folder.")],
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="The run's settings.")
    ] = None,
    set: Sets = None,
) -> None:
    """Write a project for `flwr run`: app, settings, and notes on deployment."""
    from fedlora.flower.project import write_project

    if config is None:
        with resources.as_file(resources.files("fedlora") / "demo.toml") as path:
            loaded = _loaded(path, set)
    else:
        loaded = _loaded(config, set)
    write_project(out, loaded)
    plain_console().print(f"{out}: read its README.md, then `flwr run {out}`")


def demo(set: Sets = None) -> None:
    """Run the built-in federation: three clients, generated reviews, MiniLM, merge rule FRA."""
    with resources.as_file(resources.files("fedlora") / "demo.toml") as path:
        _run(_loaded(path, set))


def partition(
    config: ConfigPath,
    set: Sets = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also draw it: a PNG or SVG.")
    ] = None,
) -> None:
    """Show who would hold which labels, before anyone trains."""
    from fedlora.checks import check_has_data
    from fedlora.data import read_silos
    from fedlora.remarks import remarks

    loaded = _loaded(config, set)
    check_has_data(loaded)
    silos = read_silos(loaded)
    names = loaded.data.label_names or silos.labels
    table = Table("client", *names, "rows", box=None, pad_edge=False)
    for client, counts in silos.counts.items():
        table.add_row(client, *(f"{count:,}" for count in counts), f"{sum(counts):,}")
    used = sum(sum(counts) for counts in silos.counts.values())
    console = plain_console()
    console.print(table)
    console.print(f"{used:,} of {len(silos.table):,} rows of {silos.table.source}")
    for line in remarks(loaded, silos):
        console.print(line, soft_wrap=True)
    if out is not None:
        from fedlora.canvas import draw_partition, save_figure

        save_figure(draw_partition(silos.counts, names), out)
        console.print(f"drawn in {out}")


def evaluate(run: RunPath, data: str, client: Client = "") -> None:
    """Score a run's adapter on a labelled file."""
    import numpy as np

    from fedlora.runlog import read_columns, read_config
    from fedlora.tables import label_ids, read_table

    wanted, known = read_config(run).data, read_columns(run)
    table = read_table(data, wanted, known=known)  # before the seconds that a model takes
    ids = label_ids(table, wanted.labels)
    from fedlora.data import encode
    from fedlora.evaluate import evaluate as scored
    from fedlora.predictor import load_predictor

    config, model = load_predictor(run, client)
    examples = encode(table, ids, model.tokenizer, config.data.max_length)
    scores = scored(model, examples, np.arange(len(examples)), config.evaluate.batch)
    console = plain_console()
    for name, value in scores.record().items():
        console.print(
            f"{name:10} {value:.4f}" if isinstance(value, float) else f"{name:10} {value}"
        )
    grid = Table("true \\ predicted", *model.labels, box=None, pad_edge=False)
    for name, row in zip(model.labels, scores.confusion, strict=True):
        grid.add_row(name, *(str(count) for count in row))
    console.print(grid)


def predict(
    run: RunPath,
    data: str,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A csv file; else stdout.")
    ] = None,
    client: Client = "",
) -> None:
    """Label a file of texts with a run's adapter: a csv row each, with probabilities and the
    file's other columns.
    """
    from fedlora.runlog import read_columns, read_config
    from fedlora.tables import read_unlabelled

    if out is not None and not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent} to write {out.name} to")
    if out is not None and out.exists():
        raise ValueError(f"{out} exists already; nothing was written: name another file")
    wanted, known = read_config(run).data, read_columns(run)
    table, others = read_unlabelled(data, wanted, known)  # before a model is loaded
    from fedlora.predictor import load_predictor, predictions

    text = predictions(*load_predictor(run, client), table, others)
    if out is None:
        sys.stdout.write(text)
    else:
        from fedlora.files import write_text

        write_text(out, text)


def config() -> None:
    """List every setting with its default and meaning."""
    from fedlora.config import settings_table

    table = Table("setting", "default", "meaning", box=None, pad_edge=False)
    for key, default, help in settings_table():
        table.add_row(key, default, help)
    plain_console().print(table)


for command in (
    *(run, status, demo, partition, evaluate, predict),
    *(report, sweep, privacy, merge, rules, config),
):
    app.command()(command)  # --help lists them in this order


def main() -> None:
    """Entry point: every mistake a user can make ends in one line on stderr and exit code 2."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        _fail([str(error), *getattr(error, "__notes__", [])], error)
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        smaller = "take a smaller client.batch, evaluate.batch or data.max_length"
        _fail([f"too little memory: {smaller} ({error})"], error)


def _fail(words: Sequence[str], error: Exception) -> NoReturn:
    sys.stderr.write(f"fedlora: {' '.join('; '.join(words).split())}\n")
    raise SystemExit(2) from error


def _loaded(path: Path, overrides: list[str] | None) -> Config:
    """The config; a rule of the user's own file is run, since this is the user's command line."""
    from fedlora.config import load_config

    return load_config(path, overrides or [], own_rule=import_own_rule)


def _run_on_flower(config: Config) -> None:
    from fedlora.flower.engine import run_on_flower
    from fedlora.runlog import run_folder
    from fedlora.stopped import check_new

    check_new(run_folder(config))
    console = plain_console()
    console.print("Flower's simulation is starting: this takes a minute")
    try:
        folder = run_on_flower(config)
    except RuntimeError as error:  # with the end of Flower's log
        raise ValueError(str(error)) from error
    _show_results(console, folder)


def _resume(folder: Path, given: Config | None) -> None:
    from dataclasses import replace

    from fedlora.resume import find

    config, resumed = find(folder, given)
    import_own_rule(config.merge.rule)
    _run(replace(config, run=replace(config.run, out=str(folder))), resumed)


def _run(config: Config, resumed: Resumed | None = None) -> None:
    from fedlora.runlog import run_folder
    from fedlora.stopped import check_new, stopped_line

    console, folder = plain_console(), run_folder(config)
    if resumed is None:
        check_new(folder)  # before the seconds that the next imports take
    try:
        from fedlora.display import shown
        from fedlora.run import execute, prepare

        with shown(console) as watch:
            execute(prepare(config, resumed), watch)
    except KeyboardInterrupt:
        left = stopped_line(folder) if folder.is_dir() else "nothing was written"
        sys.stderr.write(f"fedlora: interrupted; {left}\n")
        raise SystemExit(130) from None
    _show_results(console, folder)


def _show_results(console: Console, folder: Path) -> None:
    """Where the results are, the figure drawn."""
    lines = [f"adapter  {folder / 'adapter'}", f"log      {folder / 'metrics.jsonl'}"]
    try:
        from fedlora.report import write_report

        write_report([folder])
        lines.insert(1, f"figure   {folder / 'report.png'}")
    except ImportError as error:
        lines.append(f"no figure: {error}")
    for line in lines:
        console.print(line, soft_wrap=True)
