"""Adapters as PEFT makes them, on tiny random models; and what PEFT says their increments are.

The oracle of a merge: each adapter loaded by PEFT alone in float64, its increments multiplied out
by PEFT, weighted, and written into the weights of a plain base.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def classifier(base: Path) -> transformers.PreTrainedModel:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")
        network = transformers.AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=2, dtype=torch.float32
        )
    network.config.pad_token_id = 0
    return network


def make_adapter(
    base: Path, folder: Path, seed: int = 0, *, dtype: torch.dtype | None = None, **lora: Any
) -> Path:
    """An adapter of drawn numbers, saved by PEFT; `dtype` rewrites its file in another one."""
    network = classifier(base)
    lora = {"r": 3, "lora_alpha": 6, "task_type": "SEQ_CLS"} | lora
    lora["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in network.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(network, LoraConfig(**lora))
        stream = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=stream)
        model.save_pretrained(folder)
    if dtype is not None:
        change(folder, {name: t.to(dtype) for name, t in load_file(folder / FILE).items()})
    return folder


def change(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Rewrites an adapter's numbers."""
    save_file(dict(tensors), folder / FILE, metadata={"format": "pt"})


def reconfigure(folder: Path, **settings: Any) -> Path:
    """Changes settings in an adapter's adapter_config.json."""
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(found | settings))
    return folder


def loaded(base: Path, folder: Path) -> PeftModel:
    """The adapter on its base, in float64, loaded by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(classifier(base), folder).double().eval()


def written_into_base(
    base: Path, folders: Sequence[Path], weights: Iterable[float]
) -> transformers.PreTrainedModel:
    """The plain base with sum_k w_k dW_k added and each head, bias or other tensor averaged."""
    network = classifier(base).double().eval()
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in start.items()}
    for folder, weight in zip(folders, weights, strict=True):
        model = loaded(base, folder)
        for name, tensor in effective(model).items():
            state[name] += weight * (tensor - start[name])
    network.load_state_dict(state)
    return network


def effective(model: PeftModel) -> dict[str, Tensor]:
    """The base's weights as the adapter makes them, by PEFT's own increments."""
    found: dict[str, Tensor] = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            delta = module.get_delta_weight("default")
            found[f"{name}.weight"] = module.get_base_layer().weight.detach() + delta.detach()
            bias = getattr(module.get_base_layer(), "bias", None)
            if bias is not None:
                found[f"{name}.bias"] = bias.detach()
        elif isinstance(module, ModulesToSaveWrapper):
            for key, tensor in module.modules_to_save["default"].state_dict().items():
                found[f"{name}.{key}"] = tensor
        elif getattr(module, "bias", None) is not None and not _inside_peft(name):
            found[f"{name}.bias"] = module.bias.detach()  # trained with bias="all"
    return found


def _inside_peft(name: str) -> bool:
    return any(part in name for part in ("base_layer", "lora_", "modules_to_save", "original_mod"))


def inputs() -> dict[str, Tensor]:
    tokens = torch.randint(4, 15, (4, 7), generator=torch.Generator().manual_seed(9))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@torch.no_grad()
def scores(network: nn.Module) -> Tensor:
    return network(**inputs()).logits
