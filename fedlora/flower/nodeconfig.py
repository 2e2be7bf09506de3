"""What a node's own config says: whose data it has, which model, what it allows.

What the server may ask for is bounded by it, and looked at before a row or a model is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.config import Config
from fedlora.errors import PublicError
from fedlora.settings import DataSettings, ModelSettings

LIMITS = (
    "max-rounds", "min-examples", "rules", "shares", "base", "epsilon", "delta", "share-metrics",
)  # fmt: skip
OWN = (  # of a node with a file of its own
    "name", "data", "evaluate", "text", "pair", "label", "quoting", "model",
)  # fmt: skip
CODE = "trust-remote-code"  # a limit of a node with data of its own, none unless it says so
SWITCHES = (CODE, "share-metrics")
KEYS = ("partition-id", "num-partitions", "state", "labels", CODE, *OWN, *LIMITS)
FILES = tuple(key for key in OWN if key != "name")  # say nothing without `data`
LEDGER = ("name", "data", "state")  # a server that chooses them begins a new ledger when it likes
BOUND = (*LEDGER, "model", "labels", "text", "label")  # nor these, under a limit on epsilon


def check_keys(node_config: Mapping[str, Any]) -> None:
    """ValueError for a key that is not known or says nothing, or no yes or no where one is meant.

    What is empty, of a variable that is not set, would leave to the server what the node meant to
    have as its own.
    """
    if odd := sorted(set(node_config) - set(KEYS)):
        raise ValueError(f"node config {odd[0]!r} is not known; known are {', '.join(KEYS)}")
    if empty := sorted(key for key, value in node_config.items() if not str(value).strip()):
        raise ValueError(f"node config {empty[0]} is empty: give it a value, or leave it out")
    if "data" not in node_config and (idle := sorted(set(FILES) & set(node_config))):
        raise ValueError(
            f"node config {idle[0]} says nothing without data: the run's own data and model are "
            'taken, unless there is name="NAME" data="FILE"'
        )
    for key in SWITCHES:
        if not isinstance(value := node_config.get(key, False), bool):
            raise ValueError(f"node config {key} = {value!r} must be true or false, without quotes")


def check_asked(config: Config, node_config: Mapping[str, Any]) -> None:
    """Refuses a run that this node has no part in, before a row or a model is read.

    What a run without privacy would hear first, how many rows are left, tells about the rows; so
    does a refusal where a row has a label that the server left out.
    """
    missing = [key for key in BOUND if key not in node_config]
    if "epsilon" in node_config and missing:
        raise ValueError(
            f"a limit on epsilon needs {missing[0]} in the node config as well: a server that "
            "chooses it "
            + (
                "begins a new ledger when it likes"
                if missing[0] in LEDGER
                else "can choose it so that the start fails at one row alone, which tells that it "
                "is there"
            )
        )
    if "labels" in node_config and own_labels(node_config) != list(config.data.labels):
        raise PublicError(
            f"the run's labels, {', '.join(config.data.labels)}, are not those of this node's "
            "config, or in another order"
        )
    own = set(OWN) & set(node_config)
    if own and config.model.trust_remote_code and not node_config.get(CODE):
        raise PublicError(
            "model.trust_remote_code runs code that comes with the model: not allowed here"
        )
    private = config.privacy.unit == "example"
    if "epsilon" in node_config and not private:
        raise PublicError(
            "the run protects no examples, epsilon is to stay within "
            f"{float(node_config['epsilon']):g} here"
        )
    if private and "data" in node_config and "state" not in node_config:
        raise ValueError(
            'a node with a privacy budget needs state="FOLDER" in its node config: its ledger must '
            "not lie where the server says"
        )


def own_labels(node_config: Mapping[str, Any]) -> list[str]:
    """The labels that a node names, in order: `one, two`, or where they have commas a JSON list."""
    text = str(node_config["labels"]).strip()
    if not text.startswith("["):
        return listed(text)
    try:
        return [str(label) for label in json.loads(text)]
    except json.JSONDecodeError as error:
        raise ValueError(f"node config labels = {text!r} is no JSON list: {error}") from error


def listed(value: Any) -> list[str]:
    """What `one, two` names."""
    return [name.strip() for name in str(value).split(",")]


def client_name(names: list[str], node_config: Mapping[str, Any]) -> str:
    """The client's name: its own, or the one at its place in the partition."""
    if "name" in node_config:
        name = str(node_config["name"])
        if name not in names:
            raise PublicError(f"the run knows no client {name!r}; it has {', '.join(names)}")
        return name
    place = node_config.get("partition-id")
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(names):
        raise PublicError(f"node config needs a name, or a partition-id in 0..{len(names) - 1}")
    return names[place]


def own_settings(config: Config, own: Mapping[str, str]) -> Config:
    """The run's config with the files of a node, and its columns and model where it names any.

    ValueError where the node has no name.
    """
    if "name" not in own:
        raise ValueError('a node with data of its own needs a name: name="NAME" data="FILE"')
    data, model = _own_data(config.data, own), _own_model(config.model, own)
    return replace(config, data=data, model=model)


def _own_data(settings: DataSettings, own: Mapping[str, str]) -> DataSettings:
    """The run's settings with the node's own files, and its own columns where it names any.

    How they are quoted the run does not say: a file that is read wrongly fails by its rows.
    """
    files, label = {own["name"]: own["data"]}, own.get("label", settings.label)
    text, pair = settings.text, settings.pair
    if "text" in own or "pair" in own:
        text, pair = own.get("text", ""), own.get("pair", "")
    return replace(
        settings, train="", clients=files, evaluate=own.get("evaluate", ""),
        text=text, pair=pair, label=label, quoting=own.get("quoting", DataSettings().quoting),
    )  # fmt: skip


def _own_model(settings: ModelSettings, own: Mapping[str, str]) -> ModelSettings:
    """The run's settings with the node's own base model, where it names one: FOLDER, NAME or
    NAME@REVISION.

    With a model a server chooses a tokenizer, and by what fails there asks for single texts.
    """
    if "model" not in own:
        return settings
    name, _, revision = own["model"].partition("@")
    if Path(own["model"]).is_dir():
        name, revision = own["model"], ""
    return replace(settings, name=name, revision=revision)
