"""What a person sees while a run goes on: a live table on a terminal, else a line a round.

Listens to the events of `fedlora.recording`; computes nothing that is not printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedlora.recording import Watch
from fedlora.records import train_loss

ROWS = 12  # rounds that stay visible
COLUMNS = 6  # clients that get a column of their own


@contextmanager
def shown(console: Console) -> Iterator[Watch]:
    """A `watch` for `execute` that draws on this console."""
    if not console.is_terminal:
        yield _PlainLines(console)
        return
    screen = LiveTable()
    with Live(screen.view(), console=console, refresh_per_second=4, transient=False) as live:
        screen.live = live
        yield screen


class _PlainLines:
    """One line a round, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console, self.rounds = console, 0

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        if event == "start":
            self.rounds = facts["rounds"]
            self.console.print(start_line(facts), highlight=False, soft_wrap=True)
        elif event == "round":
            line = f"round {facts['round']}/{self.rounds}  {round_line(facts)}"
            self.console.print(line, highlight=False, soft_wrap=True)


def progress_bar(console: Console | None = None) -> Progress:
    """A bar that says how long it will take, by the pace since its start.

    By itself rich looks at the last 30 seconds, in which a run or a large client ends nothing.
    """
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(compact=True), TextColumn("left"),
        console=console, speed_estimate_period=math.inf,
    )  # fmt: skip


def time_left(bar: Progress) -> str:
    """The same in words: "about 1 h 20 min left"; empty where nothing has ended yet."""
    seconds = bar.tasks[0].time_remaining
    if not seconds:
        return ""
    minutes = math.ceil(seconds / 60)
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f"about {hours}{minutes % 60} min left"


class LiveTable:
    """A table of the last rounds above a bar that says who trains and how long it will take."""

    def __init__(self) -> None:
        self.live: Live | None = None
        self.title = ""
        self.clients: list[str] = []
        self.records: list[Mapping[str, Any]] = []
        self.fits = 0  # in a round
        self.bar = progress_bar()
        self.task = self.bar.add_task("reading", total=None)

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        """Takes an event of the run up."""
        if event == "start":
            self.title, self.clients = start_line(facts), sorted(facts["clients"])
            self.fits = facts["fits"]
            self.bar.reset(
                self.task, total=facts["rounds"] * self.fits, completed=facts["done"] * self.fits
            )
            self.bar.advance(self.task, 0)  # the pace is measured from here
        elif event == "fit":
            text = f"round {facts['round']}, client {facts['client']}"
            self.bar.update(self.task, description=text)
        elif event == "evaluate":
            self.bar.update(self.task, description=f"round {facts['round']}, evaluation")
        elif event == "fitted":
            self.bar.advance(self.task)
        elif event == "round":
            self.records.append(facts)  # who failed has not ended its fit, nor one on Flower
            self.bar.update(self.task, completed=facts["round"] * self.fits)
        elif event == "done":
            self.bar.update(self.task, description="done")
        if self.live:
            self.live.update(self.view())

    def view(self) -> Group:
        """What is on the screen."""
        table = Table(title=self.title, title_justify="left", box=None, pad_edge=False)
        own = self.clients if len(self.clients) <= COLUMNS else []
        named = [f"client {client}" if len(client) < 3 else client for client in own]
        for heading in (
            "round",
            "global",
            *named,
            "loss",
            "train loss",
            "merge error",
            "MB",
            "s",
            "",
        ):
            table.add_column(heading, justify="right")
        for record in self.records[-ROWS:]:
            table.add_row(*cells(record, own))
        return Group(table, self.bar)


def cells(record: Mapping[str, Any], clients: list[str]) -> list[str]:
    """A round as a row: accuracies in percent, losses in nats, megabytes both ways, seconds."""
    shared, reported = record["global"] or {}, record["clients"]
    return [
        str(record["round"]),
        percent(shared.get("accuracy")),
        *(percent(accuracy(reported.get(client))) for client in clients),
        number(shared.get("loss"), ".3f"),
        number(train_loss(record), ".3f"),
        number(record["merge_error"], ".1e"),
        number((record["bytes_up"] + record["bytes_down"]) / 1e6, ".1f"),
        number(record["seconds"]["total"], ".0f"),
        failure_text(record),
    ]


def start_line(facts: Mapping[str, Any]) -> str:
    """Where the run goes, who takes part, and what the user should know."""
    rows = sum(sizes["train"] for sizes in facts["clients"].values())
    line = f"{facts['folder']}: {len(facts['clients'])} clients, {rows:,} training rows"
    return "\n".join([line, *facts["notes"]])


def round_line(record: Mapping[str, Any]) -> str:
    """A round in one line of text."""
    shared = record["global"] or {}
    reported = record["clients"].values()
    own = [value for value in map(accuracy, reported) if value is not None]
    parts = [
        f"accuracy {percent(shared.get('accuracy'))}" if shared else "",
        f"clients {percent(min(own))} to {percent(max(own))}" if own else "",
        f"loss {number(shared.get('loss'), '.3f')}" if shared else "",
        f"train loss {number(train_loss(record), '.3f')}" if reported else "",
        f"merge error {number(record['merge_error'], '.1e')}" if record["merge_error"] else "",
        f"not used: {failures}" if (failures := failure_text(record)) else "",
        f"{record['seconds']['total']:.0f} s",
    ]
    return "  ".join(part for part in parts if part)


def failure_text(record: Mapping[str, Any]) -> str:
    """The clients whose replies were not used, each with its code."""
    return ", ".join(f"{failure['client']} ({failure['code']})" for failure in record["failures"])


def accuracy(client: Mapping[str, Any] | None) -> float | None:
    """A client's own accuracy on the shared set, where it was measured."""
    if client is None or client["evaluation"] is None:
        return None
    return float(client["evaluation"]["accuracy"])


def percent(value: float | None) -> str:
    """A share as percent with one digit, or a dash."""
    return "-" if value is None else f"{value:.1%}"


def number(value: float | None, form: str) -> str:
    """A number in the given format, or a dash."""
    return "-" if value is None else format(value, form)
