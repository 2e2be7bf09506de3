"""What a name of data or of a model stands for: a built-in one, something on this disk, a hub's.

Looks at what is there and opens nothing. What lies here, or looks as if it should, is never asked
for elsewhere: the name of a private file is private too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.hints import near

BUILTIN = "builtin:"
REVIEWS = "builtin:reviews"
MINILM = "builtin:minilm"
NO_EVALUATION = "none"  # data.evaluate where no shared set is wanted
ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
SPLITS = ("train", "validation", "valid", "dev", "test")
HUB_EVALUATION = {"glue/mnli": "validation_matched"}  # otherwise `validation`


def is_local(name: str, folder: Path = Path()) -> bool:
    """Whether data of this name are a file here: it is there, its folder is, or it looks like one.

    A hub name (`imdb`, `glue/sst2`, `org/name:split`) has one slash at most and no file's ending.
    """
    if not name or name.startswith(BUILTIN):
        return False
    if _is_path(name) or re.search(r"\.[A-Za-z][A-Za-z0-9]{0,6}$", name):
        return True
    parent, slash, _ = name.partition("/")
    return (folder / name).exists() or (
        bool(slash) and parent != "glue" and (folder / parent).is_dir()
    )


def anchored_data(name: Any, folder: Path) -> Any:
    """A file's or folder's path made absolute, as meant from `folder`; all else as it is."""
    if not isinstance(name, str) or name == NO_EVALUATION:
        return name
    own, colon, split = name.partition(":")
    if own and (folder / own).is_dir():
        return f"{(folder / own).resolve()}{colon}{split}"
    return str((folder / Path(name).expanduser()).resolve()) if is_local(name, folder) else name


def anchored_model(name: Any, folder: Path) -> Any:
    """The same for a base model, which is a folder or on the hub."""
    if not isinstance(name, str) or not (_is_path(name) or (folder / name).is_dir()):
        return name
    return str((folder / Path(name).expanduser()).resolve())


def file_ending(source: str) -> str:
    """The ending of a data file that is there and can be read; ValueError for any other."""
    path = Path(source)
    ending = path.suffix.lower()
    if ending in ENDINGS and path.is_file():
        return ending
    missing = "" if path.is_file() else f"there is no file {source}"
    if ending not in ENDINGS:
        known = f"the endings read are {', '.join(known[1:] for known in ENDINGS)}"
        here = "; " if missing else f"{source}: "
        missing += f"{here}{known}: save it as one of them"
    raise ValueError(missing)


def check_folder(folder: Path) -> None:
    """ValueError unless the folder is a data set in the hub's form: a parquet file a split."""
    places = (folder, folder / "data")
    found = [path for place in places for path in place.glob("*") if path.suffix.lower() in ENDINGS]
    if not found or not all(
        path.suffix.lower() == ".parquet" and path.name.startswith(SPLITS) for path in found
    ):
        raise ValueError(
            f"{folder} is a folder: name one file, or one for each client in data.clients "
            "(of folders, only those of a hub's data set are read: train.parquet, ...)"
        )


def data_files(train: str, evaluate: str, clients: Mapping[str, str]) -> dict[str, Path]:
    """The data of a run that are files here, by setting (`data.clients.NAME`)."""
    named = _named(train, evaluate, clients).items()
    return {key: Path(name) for key, name in named if is_local(name) and not Path(name).is_dir()}


def check_apart(train: str, evaluate: str, clients: Mapping[str, str]) -> None:
    """ValueError where one file (or split of a hub's data set) stands in two places."""
    places: dict[str, str] = {}
    for key, name in _named(train, evaluate, clients).items():
        whole = name if ":" in name.removeprefix(BUILTIN) else f"{name}:train"
        own = str(Path(name).resolve()) if is_local(name) else whole
        other = places.setdefault(own, key)
        if other == key:
            continue
        if key == "data.evaluate":
            raise ValueError(
                f"data.evaluate = {name!r} is {other} too: it must hold rows that nobody trains "
                "on; without it the clients' held-out rows are scored"
            )
        raise ValueError(f"{other} and {key} are both {name!r}: each client needs its own rows")


def _named(train: str, evaluate: str, clients: Mapping[str, str]) -> dict[str, str]:
    """What is read, by setting, the evaluation set last."""
    found = {f"data.clients.{client}": name for client, name in sorted(clients.items())}
    found = found or {"data.train": train}
    return found | ({} if evaluate in ("", NO_EVALUATION) else {"data.evaluate": evaluate})


def check_model(name: str) -> None:
    """ValueError for a model's name that is neither here nor a hub's."""
    if name.startswith(BUILTIN):
        hint = near(name, [MINILM]) or f"; there is {MINILM!r}"
        raise ValueError(f"model.name = {name!r}: there is no such built-in model{hint}")
    if _is_path(name) and not Path(name).is_dir():
        raise ValueError(
            f"model.name = {name!r}: there is no folder {name}; a hub name is org/model"
        )


def evaluation_of(train: str, evaluate: str, clients: Mapping[str, str]) -> str:
    """Where the shared evaluation set is: as configured, else the training set's own; or nowhere.

    Where it is nowhere, the clients' own held-out rows are scored.
    """
    if evaluate or clients:
        return "" if evaluate == NO_EVALUATION else evaluate
    if train == REVIEWS:
        return f"{REVIEWS}:evaluate"
    if not train.lower().endswith(ENDINGS):
        name = train.partition(":")[0]
        return f"{name}:{HUB_EVALUATION.get(name, 'validation')}"
    return ""


def _is_path(name: str) -> bool:
    """Whether a name can be nothing but a path."""
    return name.startswith(("/", "./", "../", "~")) or "\\" in name or name.count("/") > 1
