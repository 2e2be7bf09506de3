"""PEFT's adapter_config.json: which settings a merge understands, and the rank and scaling of each
layer by PEFT's rules. Knows no tensor; PEFT itself is not needed.

An adapter is more than its file of numbers: a setting decides what they mean. Settings are known
to be harmless, or refused by name with the reason; a setting from the future is refused too.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedlora.hints import near

CONFIG_FILE = "adapter_config.json"
LARGEST_CONFIG = 16_000_000  # bytes

REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA's magnitudes make the increment depend on the base weights",
    "use_qalora": "QALoRA's A reads pooled inputs, so B A is not the layer's increment",
    "use_bdlora": "block-diagonal factors are not stored as A and B of the layer",
    "lora_bias": "a bias on B is a part of the increment that low-rank factors cannot hold",
    "trainable_token_indices": "rows of the embedding are replaced beside the low-rank increment",
    "target_parameters": "A and B are stacked over experts, they are not one layer's factors",
    "alora_invocation_tokens": "aLoRA acts on some tokens only, each adapter on its own",
    "arrow_config": "Arrow routes each token between adapters, so there is no single increment",
    "kasa_config": "KaSA changes the base and puts a diagonal between B and A",
    "monteclora_config": "Monte Carlo LoRA samples its increment",
    "velora_config": "VeLoRA stores a projection beside the factors",
    "megatron_config": "Megatron's parallel layers split the factors",
    "ensure_weight_tying": "tied adapters must stay one tensor, a merge makes two",
}
HARMLESS = frozenset(
    [
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
        "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
        "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
        "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type",
        "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
        "target_modules", "task_type", "use_rslora",
    ]
)  # fmt: skip
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # leave the base alone
STARTS = frozenset(["corda_config", "eva_config", "loftq_config", "lora_ga_config"])


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of an adapter folder, checked.

    ValueError names folder, setting and reason for what is missing, broken or cannot be merged.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no adapter in PEFT's form: there is no {CONFIG_FILE}")
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: no adapter's settings")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no table of settings")
    try:
        check_settings(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return settings


def check_settings(settings: Mapping[str, Any]) -> None:
    """ValueError unless every setting is understood and means plain LoRA."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(
            f"peft_type = {settings.get('peft_type')!r} is not merged: only 'LORA' has increments "
            "of the form scaling * B A"
        )
    for key, value in settings.items():
        if key in REFUSED and value:
            raise ValueError(f"{key} = {_short(value)} is not merged: {REFUSED[key]}")
        if key not in REFUSED and key not in HARMLESS and value:
            raise ValueError(
                f"{key} = {_short(value)} is a setting this version does not know"
                f"{near(key, REFUSED.keys() | HARMLESS)}; it may change what the numbers mean"
            )
    start = settings.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"init_lora_weights = {start!r} is not merged: it changes the base weights when it is "
            "loaded; convert the adapter first (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    if type(settings.get("use_rslora", False)) is not bool:
        raise ValueError(f"use_rslora = {settings['use_rslora']!r} is neither true nor false")
    _check_rank("r", settings.get("r"))
    _check_alpha("lora_alpha", settings.get("lora_alpha"))
    _check_patterns("rank_pattern", settings.get("rank_pattern") or {}, _check_rank)
    _check_patterns("alpha_pattern", settings.get("alpha_pattern") or {}, _check_alpha)
    targets = settings.get("target_modules")
    if isinstance(targets, str):
        _check_regex("target_modules", targets, re.compile)
    elif targets is not None and not _names(targets):
        raise ValueError(f"target_modules = {_short(targets)} is no list of names")


def layer_rank(settings: Mapping[str, Any], layer: str) -> int:
    """The rank that PEFT gives the layer: `r`, or the first fitting entry of `rank_pattern`."""
    rank: int = _matched(settings.get("rank_pattern"), layer, settings["r"])
    return rank


def layer_scaling(settings: Mapping[str, Any], layer: str) -> float:
    """The scaling that PEFT applies: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    rank = layer_rank(settings, layer)
    alpha = _matched(settings.get("alpha_pattern"), layer, settings["lora_alpha"])
    return float(alpha / _divisor(rank, bool(settings.get("use_rslora"))))


def settings_for(
    settings: Mapping[str, Any], ranks: Mapping[str, int], scalings: Mapping[str, float]
) -> dict[str, Any]:
    """`settings` with r, lora_alpha and patterns such that PEFT gives each layer its rank and
    scaling (to the last digit, or the one before where no alpha does).

    Sets come out as sorted lists; how the factors were first drawn is left out.
    """
    rslora = bool(settings.get("use_rslora"))
    alphas = {name: _alpha(scalings[name], ranks[name], rslora) for name in sorted(ranks)}
    common = {
        "r": _most_frequent(ranks[name] for name in alphas),
        "lora_alpha": _most_frequent(alphas.values()),
    }
    plain = {
        key: sorted(value) if isinstance(value, set | frozenset) else value
        for key, value in settings.items()
        if key not in STARTS
    }
    return plain | {
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": rslora,
        **common,
        "rank_pattern": {
            f"^{re.escape(name)}": ranks[name] for name in alphas if ranks[name] != common["r"]
        },
        "alpha_pattern": {
            f"^{re.escape(name)}": alpha
            for name, alpha in alphas.items()
            if alpha != common["lora_alpha"]
        },
    }


def targeted(settings: Mapping[str, Any], layer: str) -> bool:
    """Whether `target_modules` names the layer as PEFT reads it (a shorthand names any)."""
    targets = settings.get("target_modules")
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def _alpha(scaling: float, rank: int, rslora: bool) -> int | float:
    """The alpha that PEFT turns into this scaling; a whole number where one does."""
    divisor = _divisor(rank, rslora)
    product = scaling * divisor
    whole = round(product)
    return whole if whole / divisor == scaling else product


def _divisor(rank: int, rslora: bool) -> float:
    return math.sqrt(rank) if rslora else float(rank)


@lru_cache(maxsize=10_000)  # one entry a layer is common, more than `re` itself remembers
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")  # PEFT's: the whole name, or its end behind a dot


def _matched(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if _compiled(pattern).match(layer):
            return value
    return default


def _most_frequent(values: Any) -> Any:
    counts = Counter(values)
    return max(sorted(counts), key=counts.__getitem__) if counts else 1


def _check_rank(key: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} = {_short(value)} is no rank: a whole number above 0")


def _check_alpha(key: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{key} = {_short(value)} is no scale: a finite number above 0")


def _check_patterns(key: str, patterns: Any, check: Callable[[str, Any], None]) -> None:
    if not isinstance(patterns, dict):
        raise ValueError(f"{key} = {_short(patterns)} is no table of layers")
    for pattern, value in patterns.items():
        check(f"{key}[{pattern!r}]", value)
        _check_regex(key, pattern, _compiled)


def _check_regex(key: str, pattern: str, compiler: Callable[[str], object]) -> None:
    try:
        compiler(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{key}: {pattern!r} is no regular expression: {error}") from error


def _names(value: Any) -> bool:
    listed = isinstance(value, list | tuple | set | frozenset)
    return listed and all(isinstance(name, str) for name in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
