"""Border to PEFT: put a LoRA adapter on a base model, move adapters in and out, save the result.

One copy of the base serves every client: adapters are written into it and read from it. Nothing
here knows rounds, rules or data.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedlora.adapter import (
    WHOLE,
    Adapter,
    Factors,
    Part,
    converted,
    cut,
    flatten,
    increment,
    padded,
    rescaled,
)
from fedlora.adapter_folder import open_folder, write_folder
from fedlora.base import (
    HEADS,
    choose_device,
    choose_precision,
    layer_shape,
    load_base,
    load_tokenizer,
    model_source,
    portable_name,
    targeted_layers,
)
from fedlora.config import Config
from fedlora.files import new_folder
from fedlora.seeding import derive
from fedlora.settings import ModelSettings

_PARTS: dict[str, Part] = {"lora_A": "A", "lora_B": "B"}


@dataclass(frozen=True, eq=False)
class Model:
    """A frozen base with one LoRA adapter in place, its tokenizer, and where it computes.

    `frozen` holds (A, B) of what was folded, for the layers that have any: added to their output.
    """

    network: PeftModel
    tokenizer: Any
    labels: Sequence[str]
    device: torch.device
    dtype: torch.dtype
    settings: ModelSettings
    frozen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def lora_layers(self) -> dict[str, LoraLayer]:
        """The adapted layers by name."""
        named = self.network.base_model.model.named_modules()
        return {path: module for path, module in named if isinstance(module, LoraLayer)}

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by the names of `adapter.flatten`, sorted."""
        return _own_parameters(self.network)

    @property
    def scalings(self) -> dict[str, float]:
        """Each adapted layer's scaling as PEFT applies it now."""
        return {path: layer.scaling["default"] for path, layer in self.lora_layers.items()}


def load_model(
    settings: ModelSettings,
    labels: Sequence[str],
    *,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
) -> Model:
    """Loads base and tokenizer and adds a seeded LoRA adapter (B = 0; head as loaded, else drawn).

    `precision` is that of the frozen weights alone: adapter, head and buffers are float32.
    ValueError for a model that is not to be had, has no pad token, no module of a wanted name, a
    layer smaller than the rank, or a head made for another number of labels.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    place = choose_device(device)
    dtype = choose_precision(precision, place)
    source = model_source(settings.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "init"))
        base, drawn = load_base(settings, source, labels)
        tokenizer = load_tokenizer(settings, source, base.get_input_embeddings().num_embeddings)
        base.config.pad_token_id = tokenizer.pad_token_id
        network = _add_lora(base, settings, drawn)
    _place(network, place, dtype)
    model = Model(network, tokenizer, tuple(labels), place, dtype, settings)
    for path, layer in model.lora_layers.items():
        layer.register_forward_hook(partial(_add_frozen, model.frozen, path))
    train_only(model, frozenset())
    return model


def configured_model(config: Config, labels: Sequence[str]) -> Model:
    """`load_model` as a run's config has it; `labels` are used where the config names none."""
    return load_model(
        config.model,
        config.data.label_names or labels,
        seed=config.run.seed,
        device=config.run.device,
        precision=config.run.precision,
    )


def read_adapter(model: Model, like: Adapter | None = None) -> Adapter:
    """The adapter now in the model, as float32 copies on the CPU.

    With `like`, what was written: its ranks (the zero pairs beyond them are left out) and its
    frozen increments.
    """
    tensors = {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in model.parameters.items()
    }
    layers: dict[str, Factors] = {}
    for name, scaling in sorted(model.scalings.items()):
        A, B = tensors.pop(f"{name}.lora_A"), tensors.pop(f"{name}.lora_B")
        rank = len(A) if like is None else like.layers[name].rank
        layers[name] = Factors(A[:rank].contiguous(), B[:, :rank].contiguous(), scaling)
    return Adapter(layers, tensors, {} if like is None else like.frozen)


def write_adapter(model: Model, adapter: Adapter) -> None:
    """Copies an adapter into the model, with its scaling and what is frozen in it.

    Smaller ranks than the model's are padded with zero pairs, which no gradient reaches.
    ValueError (and nothing written) unless it fits and is finite.
    """
    check_fits(model, adapter)
    layers = {
        name: padded(factors, model.lora_layers[name].r["default"])
        for name, factors in adapter.layers.items()
    }
    with torch.no_grad():
        for name, tensor in flatten(replace(adapter, layers=layers)).items():
            model.parameters[name].copy_(tensor)
    for name, factors in adapter.layers.items():
        model.lora_layers[name].scaling["default"] = factors.scaling
    model.frozen.clear()
    for name, factors in adapter.frozen.items():
        plain = converted(rescaled(factors, 1.0), torch.float32, model.device)
        model.frozen[name] = (plain.A, plain.B)


def check_fits(model: Model, adapter: Adapter) -> None:
    """ValueError unless names and shapes are the model's (smaller ranks fit) and all is finite."""
    parameters = model.parameters
    tensors = flatten(adapter)
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())[0]
        side = "the adapter lacks" if odd in parameters else "the model has no place for"
        raise ValueError(f"{side} {odd!r}: adapter and model must have the same layers and head")
    for name, tensor in tensors.items():
        want = list(parameters[name].shape)
        layer, _, part = name.rpartition(".")
        if layer in adapter.layers and part in _PARTS:
            axis = 0 if part == "lora_A" else 1
            want[axis] = min(want[axis], adapter.layers[layer].rank)
        if list(tensor.shape) != want:
            raise ValueError(
                f"{name!r} has shape {tuple(tensor.shape)}, the model holds "
                f"{tuple(parameters[name].shape)}"
            )
    for name, factors in adapter.frozen.items():
        if name not in adapter.layers or factors.shape != adapter.layers[name].shape:
            raise ValueError(f"a frozen increment of shape {factors.shape} fits no layer {name!r}")
    for name, tensor in flatten(adapter, WHOLE).items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name!r} holds NaN or Inf: it is not written to a model")


def train_only(model: Model, parts: Iterable[Part]) -> dict[str, nn.Parameter]:
    """Lets gradients reach exactly these parts of the adapter; returns their parameters by name."""
    wanted = frozenset(parts)
    chosen: dict[str, nn.Parameter] = {}
    for name, parameter in model.parameters.items():
        part: Part = _PARTS.get(name.rpartition(".")[2], "head")
        parameter.requires_grad_(part in wanted)
        if part in wanted:
            chosen[name] = parameter
    return chosen


def save_adapter(model: Model, adapter: Adapter, folder: Path) -> None:
    """Writes the adapter in PEFT's form (safetensors), complete or not at all; `folder` must be
    new.

    What earlier merges folded is stacked onto its layer: one adapter of the summed rank.
    """
    check_fits(model, adapter)
    config = model.network.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = portable_name(model.settings.name)
    config["inference_mode"] = True
    write_folder(folder, adapter, config)


def save_merged(model: Model, adapter: Adapter, folder: Path) -> None:
    """Writes base, merged adapter and tokenizer as one model; `folder` must be new."""
    with torch.random.fork_rng(devices=[]):  # what the base lacks is drawn, then overwritten below
        base, _ = load_base(model.settings, model_source(model.settings.name), model.labels)
    base.config.pad_token_id = model.tokenizer.pad_token_id
    tensors = base.state_dict()
    for name, factors in [*adapter.layers.items(), *adapter.frozen.items()]:
        W = tensors[f"{name}.weight"]
        delta = increment(factors)
        W += (delta.T if isinstance(base.get_submodule(name), Conv1D) else delta).to(W.dtype)
    for name, tensor in adapter.dense.items():
        tensors[name].copy_(tensor)
    with new_folder(folder) as temporary:
        base.save_pretrained(temporary)
        model.tokenizer.save_pretrained(temporary)


def longest_input(model: Model) -> int:
    """The most tokens that model and tokenizer take (no limit known: a very large number)."""
    base = model.network.base_model.model
    positions = getattr(base.config, "max_position_embeddings", None) or 10**9
    for path, module in base.named_modules():
        padding = getattr(module, "padding_idx", None)
        if path.endswith("position_embeddings") and padding is not None:
            positions -= padding + 1  # RoBERTa counts from behind its padding index
    return int(min(positions, model.tokenizer.model_max_length, 10**9))


def base_count(model: Model) -> int:
    """How many numbers the base model has, without adapter and head."""
    own = {id(parameter) for parameter in model.parameters.values()}
    return sum(p.numel() for p in model.network.parameters() if id(p) not in own)


def _own_parameters(network: PeftModel) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for path, module in network.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            found[f"{path}.lora_A"] = module.lora_A["default"].weight
            found[f"{path}.lora_B"] = module.lora_B["default"].weight
        elif isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save["default"].named_parameters()
            found |= {f"{path}.{name}": parameter for name, parameter in saved}
    return dict(sorted(found.items()))


def _place(network: PeftModel, place: torch.device, dtype: torch.dtype) -> None:
    """Casts the base's parameters and moves all; adapter, head and buffers stay float32.

    Buffers are tables, such as the frequencies of rotary positions: transformers does not cast them
    either. The cast comes first, so that the device never holds the base in float32.
    """
    own = {id(parameter) for parameter in _own_parameters(network).values()}
    for parameter in network.parameters():
        if id(parameter) not in own and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    network.to(place)


def _add_frozen(
    frozen: dict[str, tuple[Tensor, Tensor]], path: str, layer: nn.Module, inputs: Any, output: Any
) -> Any:
    """Forward hook: the layer's output plus x A^T B^T of what was folded.

    The base stays as it is.
    """
    if path not in frozen:
        return None
    A, B = frozen[path]
    return output + linear(linear(inputs[0].to(A.dtype), A), B).to(output.dtype)


def _add_lora(base: PreTrainedModel, settings: ModelSettings, drawn: Sequence[str]) -> PeftModel:
    targets = settings.targets or sorted(DEFAULT_TARGETS.get(base.config.model_type, []))
    modules = targeted_layers(base, targets)
    for path, (m, n) in ((path, layer_shape(module)) for path, module in modules.items()):
        if settings.rank > min(m, n):
            raise ValueError(
                f"model.rank = {settings.rank} is above the size of layer {path!r}, {m} x {n}: "
                f"take at most {min(m, n)}"
            )
    extra = [name for name in drawn if name.split(".")[0] not in HEADS]
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=targets,
        modules_to_save=extra or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules.values()),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        return get_peft_model(base, config)


def load_adapter(model: Model, folder: Path) -> Adapter:
    """Reads a PEFT adapter folder that was saved for this model; ValueError for anything else.

    Pairs beyond the model's rank become frozen increments.
    """
    found = open_folder(folder)
    start = read_adapter(model)
    for kind, want, got in (
        ("layer", start.layers, found.layers), ("tensor", start.dense, found.dense)
    ):  # fmt: skip
        if odd := sorted(want.keys() ^ got.keys()):
            verb = "lacks" if odd[0] in want else "has no place in this model for"
            raise ValueError(f"{folder} {verb} {kind} {odd[0]!r}: other model or head")
    layers: dict[str, Factors] = {}
    frozen: dict[str, Factors] = {}
    for name, held in start.layers.items():
        both = found.factors(name)
        layers[name] = cut(both, held.rank, both.scaling)
        if both.rank > held.rank:
            rest = Factors(both.A[held.rank :], both.B[:, held.rank :], both.scaling)
            frozen[name] = rescaled(rest, 1.0)
    adapter = Adapter(layers, {name: found.tensor(name) for name in start.dense}, frozen)
    try:
        check_fits(model, adapter)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return adapter
