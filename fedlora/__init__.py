"""Fine-tune language models with LoRA on data that stays where it is; merge the adapters exactly.

The names here are the core; `fedlora.model`, `fedlora.report` and other borders are imported by
path.
"""

from fedlora import partition
from fedlora.adapter import Adapter, ClientResult, Factors, Merged, mean_factors, mix
from fedlora.config import Config, load_config
from fedlora.lowrank import truncate
from fedlora.rules import get_rule, rule, rule_names
from fedlora.server import ServerState, aggregate
from fedlora.simulate import simulate

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
__version__ = "0.1.0"
