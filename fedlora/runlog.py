"""The run directory: config, versions, one line of figures a round, summary, model card.

Everything a report or a later command needs to know about a run is in these files.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from fedlora import __version__
from fedlora.config import Config, load_config
from fedlora.files import new_folder, write_bytes, write_text
from fedlora.own_rules import rule_file
from fedlora.sources import evaluation_of
from fedlora.tables import UNKNOWN, Columns

CHECKPOINTS = "checkpoints"
PROCESS, FLOWER = "process", "flower"  # what drives a run
COLUMNS = "data.columns"  # in versions.json
RUN_ID = "run-id"  # the file of a run directory
PACKAGES = ("torch", "transformers", "peft", "numpy", "safetensors")
RULE_COPY = "rule.py"  # in a run's folder: the user's own rule that made the run


def run_folder(config: Config) -> Path:
    """Where a run goes: `run.out`, else runs/<name>; ValueError for a name that is a path."""
    name = config.run.name
    if config.run.out:
        return Path(config.run.out).expanduser()
    if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
        raise ValueError(
            f"run.name = {name!r} is no name of a folder in runs: take one without a slash, or say "
            "where the run goes with run.out = 'DIR'"
        )
    return Path("runs") / name


def create_run(folder: Path, config: Config, facts: Mapping[str, Any]) -> None:
    """Makes the run directory with config, versions, an id and, where it has one, the user's rule.

    ValueError if it is there already.
    """
    with new_folder(folder) as temporary:
        write_text(temporary / "config.toml", config.toml())
        write_json(temporary / "versions.json", {**versions(), **facts})
        write_text(temporary / RUN_ID, secrets.token_hex(16) + "\n")
        if source := rule_file(config.merge.rule):
            write_bytes(temporary / RULE_COPY, source.read_bytes())


def has_ended(folder: Path) -> bool:
    """Whether the run came to its end; ValueError where its summary is damaged."""
    summary = folder / "summary.json"
    return summary.is_file() and not read_json(summary)["interrupted"]


def read_config(folder: Path) -> Config:
    """The config of a finished run; ValueError where the folder holds none."""
    if not (folder / "config.toml").is_file():
        raise ValueError(f"{folder} is not a run directory: it has no config.toml")
    return load_config(folder / "config.toml", merges=False)


def read_id(folder: Path) -> str:
    """The run's id: random, made with its directory, so that a run resumed has it and one of the
    same name that began anew has another. Nothing that is trained depends on it.

    ValueError where there is none.
    """
    path = folder / RUN_ID
    if not path.is_file():
        raise ValueError(f"{path} is missing: nodes know a run by it; start the run anew")
    return path.read_text(encoding="utf-8").strip()


def read_engine(folder: Path) -> str:
    """What drives the run, `process` or `flower`: who keeps the ledgers of its clients."""
    written = folder / "versions.json"
    return engine_of(read_json(written)) if written.is_file() else PROCESS


def engine_of(versions: Mapping[str, Any]) -> str:
    """As `read_engine`, of a run's versions as they were read."""
    return str(versions.get("engine", PROCESS))


def read_columns(folder: Path) -> Columns:
    """The columns that the run's texts were read from; unknown in runs of earlier versions."""
    written = folder / "versions.json"
    text, pair = (read_json(written) if written.is_file() else {}).get(COLUMNS, UNKNOWN)
    return text, pair


def append_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Adds one line to metrics.jsonl, on disk when this returns."""
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a run; ValueError if it is missing or broken."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: the run did not end, or this is no run") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    return value


def versions() -> dict[str, str]:
    """What decides the bits besides config and seed: packages, Python, platform, commit."""
    found = {"fedlora": __version__, "python": platform.python_version()}
    found["platform"] = platform.platform()
    for package in PACKAGES:
        found[package] = metadata.version(package)
    commit = _git_commit(Path(__file__).resolve().parent)
    return found | ({"commit": commit} if commit else {})


def model_card(config: Config, summary: Mapping[str, Any], base: str) -> str:
    """The adapter's README: method, scores, cost, data sizes, with the metadata that hubs read.

    It goes out with the adapter: under privacy it has no figures of single clients.
    """
    facts = "\n".join(f"* {fact}" for fact in _facts(config, summary))
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: text-classification
tags: [lora, federated, fedlora]
---
# {config.run.name}

A LoRA adapter for `{base}`, trained with [fedlora](https://pypi.org/project/fedlora/) in mode
**{config.run.mode}**{_method(config)}, rank {config.model.rank}, alpha {config.model.alpha:g}, \
seed {config.run.seed}, {summary["rounds"]} rounds.

{facts}

{_sizes(config, summary)}

Load it with `PeftModel.from_pretrained(base, folder)` on the base named above, made for \
{len(summary["labels"])} labels. The whole configuration is in the run directory's `config.toml`.
"""


def _facts(config: Config, summary: Mapping[str, Any]) -> list[str]:
    """Scores and costs; what is measured on private rows or by who answered is left out."""
    unit, final = config.privacy.unit, summary.get("final") or {}
    scores = ", ".join(
        f"{name} {final[key]:.4f}"
        for key, name in (("accuracy", "accuracy"), ("macro_f1", "macro-F1"), ("loss", "loss"))
        if key in final
    )
    trained, frozen = summary["trainable_parameters"], summary["base_parameters"]
    facts = [
        f"Evaluation on {final.get('examples', 0):,} {_evaluated(config)}: {scores or 'none'}.",
        f"Labels in the order of their ids: {', '.join(summary['labels'])}.",
        f"Trainable parameters: {trained:,} beside {frozen:,} frozen ones "
        f"({trained / frozen:.2%}).",
    ]
    if unit == "client" and summary["own_evaluation"]:
        facts[0] = "Evaluation: on clients' own rows, without noise, so that it is not told here."
    if unit != "client":
        facts.append(
            f"Communication: {megabytes(summary['bytes_up_total'])} up, "
            f"{megabytes(summary['bytes_down_total'])} down, all clients and rounds; full "
            f"fine-tuning would have moved {megabytes(summary['full_finetuning_bytes_total'])}."
        )
    if unit == "none":
        facts.append(f"Peak memory of the process: {megabytes(summary['peak_memory_bytes'])}.")
    return facts


def _sizes(config: Config, summary: Mapping[str, Any]) -> str:
    """How many rows each client has, unless the run is private."""
    if config.privacy.unit != "none":
        return f"Each {config.privacy.unit} is private; sizes of single clients are not told here."
    rows = [
        f"| {client} | {rows['train']:,} | {rows['heldout']:,} |"
        for client, rows in summary["clients"].items()
    ]
    return "\n".join(["| client | training rows | held out |", "|---|---|---|", *rows])


def megabytes(count: int) -> str:
    """A byte count for people: MB are 10^6 bytes."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def _evaluated(config: Config) -> str:
    """What the scores are of, in words."""
    data = config.data
    shared = evaluation_of(data.train, data.evaluate, data.clients)
    return "examples" if shared else "held-out rows of the clients themselves (no set apart)"


def _method(config: Config) -> str:
    if config.run.mode != "federated":
        return ""
    options = "".join(f", {key} {value}" for key, value in config.merge.options.items())
    rule = config.merge.rule.rpartition(".py:")[2]  # of a rule in a file the name, not the place
    return f", merge rule **{rule}**{options}, head {config.merge.head}"


def _git_commit(folder: Path) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
