"""Fine-tune language models with LoRA on data that stays where it is; merge the adapters exactly.

The names here are the core; `fedlora.model`, `fedlora.report` and other borders are imported by
path. Each name is loaded at its first use, so that `fedlora --help` does not wait for torch and the
command line can set how torch's threads wait before torch is there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora import partition
    from fedlora.adapter import Adapter, ClientResult, Factors, Merged, mean_factors, mix
    from fedlora.config import Config, load_config
    from fedlora.lowrank import truncate
    from fedlora.rules import get_rule, rule, rule_names
    from fedlora.server import ServerState, aggregate
    from fedlora.simulation import simulate

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "ClientResult",
    "Config",
    "Factors",
    "Merged",
    "ServerState",
    "aggregate",
    "get_rule",
    "load_config",
    "mean_factors",
    "mix",
    "partition",
    "rule",
    "rule_names",
    "simulate",
    "truncate",
]

_HOMES = {
    "adapter": ("Adapter", "ClientResult", "Factors", "Merged", "mean_factors", "mix"),
    "config": ("Config", "load_config"),
    "lowrank": ("truncate",),
    "rules": ("get_rule", "rule", "rule_names"),
    "server": ("ServerState", "aggregate"),
    "simulation": ("simulate",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"fedlora.{home}"), name)
            globals()[name] = value
            return value
    if name == "partition":
        return import_module("fedlora.partition")
    raise AttributeError(f"module 'fedlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
