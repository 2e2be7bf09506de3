"""Border to adapters on disk in PEFT's form: a folder opened and checked without reading it, read
layer by layer, and written layer by layer. No model and no PEFT is needed; never a pickle.

adapter_model.safetensors holds `base_model.model.LAYER.lora_A.weight` (r x n) and `lora_B` (m x r),
also for Conv1D; an embedding of v tokens in d numbers has `lora_embedding_A` (r x v) and
`lora_embedding_B` (d x r), the factors of its transposed increment. The rest is dense: heads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import Adapter, Factors, stacked
from fedlora.files import new_folder, write_text
from fedlora.peft_settings import (
    CONFIG_FILE,
    layer_rank,
    layer_scaling,
    read_settings,
    settings_for,
    targeted,
)
from fedlora.tensorfile import Entry, finite, read_header, read_tensors, write_tensors

TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_ENDS = {
    ".lora_A.weight": ("A", False), ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True), ".lora_embedding_B": ("B", True),
}  # fmt: skip
_FOREIGN = {
    "lora_magnitude_vector": "DoRA's magnitudes",
    "lora_B.bias": "a bias on B (lora_bias)",
    "trainable_tokens": "trained token rows (trainable_token_indices)",
    "lora_diag": "KaSA's diagonal",
    "lora_velora_embed": "VeLoRA's projection",
    "lora_E": "AdaLoRA's singular values",
}


@dataclass(frozen=True, eq=False)
class LayerEntry:
    """One layer of an adapter file: where its factors lie, their scaling, and the kind of layer."""

    A: Entry
    B: Entry
    scaling: float
    embedding: bool

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the increment B @ A."""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True, eq=False)
class AdapterFolder:
    """An adapter on disk, opened: its settings and where each layer and dense tensor lies.

    No file stays open; a thousand of these cost their headers.
    """

    folder: Path
    settings: Mapping[str, Any]
    layers: Mapping[str, LayerEntry]
    dense: Mapping[str, Entry]

    def factors(self, layer: str) -> Factors:
        """Reads one layer, as stored (float32 at least); ValueError for NaN or Inf."""
        entry = self.layers[layer]
        A, B = read_tensors(self.folder / TENSOR_FILE, [entry.A, entry.B])
        wide = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
        for tensor, part in ((A, "A"), (B, "B")):
            self._check_finite(tensor, f"layer {layer!r}, lora_{part}")
        return Factors(A.to(wide), B.to(wide), entry.scaling)

    def tensor(self, name: str) -> Tensor:
        """Reads one dense tensor, as stored; ValueError for NaN or Inf."""
        found = read_tensors(self.folder / TENSOR_FILE, [self.dense[name]])[0]
        self._check_finite(found, f"tensor {name!r}")
        return found

    def numbers(self, name: str, start: int, stop: int) -> Tensor:
        """Reads a piece of one dense tensor, as stored, its numbers counted one after another;
        ValueError for NaN or Inf.
        """
        whole = self.dense[name]
        size = whole.dtype.itemsize
        stop = min(stop, math.prod(whole.shape))
        piece = Entry(
            whole.dtype, (stop - start,), whole.start + start * size, whole.start + stop * size
        )
        found = read_tensors(self.folder / TENSOR_FILE, [piece])[0]
        self._check_finite(found, f"tensor {name!r}")
        return found

    def _check_finite(self, tensor: Tensor, place: str) -> None:
        if not finite(tensor):
            raise ValueError(f"{self.folder}: {place} holds NaN or Inf: its training diverged")


def open_folder(folder: Path | str) -> AdapterFolder:
    """Opens an adapter folder: settings and header are read and checked, numbers are not.

    ValueError names folder, setting or tensor, and reason: no adapter, a pickle, a file that is
    cut or lies, a setting that cannot be merged, ranks that are not those of the settings.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no adapter folder {folder}")
    _check_not_a_run(folder)
    settings = read_settings(folder)
    path = folder / TENSOR_FILE
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ValueError(
                f"{folder} holds a pickle, adapter_model.bin, which can run code when it is read: "
                "load it with PEFT where you trust it and save_pretrained(safe_serialization=True)"
            )
        raise ValueError(f"{folder} holds no adapter: there is no {TENSOR_FILE}")
    halves: dict[str, dict[str, Entry]] = {}
    embeddings: set[str] = set()
    dense: dict[str, Entry] = {}
    for name, entry in read_header(path).items():
        layer, part, embedding = _place(path, name)
        if not part:
            dense[layer] = entry
            continue
        if part in halves.setdefault(layer, {}):
            raise ValueError(f"{path}: layer {layer!r} has two lora_{part}")
        halves[layer][part] = entry
        if embedding:
            embeddings.add(layer)
    if not halves:
        raise ValueError(f"{path} holds no LoRA layer")
    layers = {
        layer: _layer(folder, layer, halves[layer], settings, layer in embeddings)
        for layer in sorted(halves)
    }
    return AdapterFolder(folder, settings, layers, dict(sorted(dense.items())))


def _check_not_a_run(folder: Path) -> None:
    """ValueError for a run directory, with the adapters that are in it."""
    if (folder / CONFIG_FILE).is_file():
        return
    inside = [folder / "adapter", *sorted((folder / "adapter").glob("*/"))]
    if found := [str(place) for place in inside if (place / TENSOR_FILE).is_file()]:
        raise ValueError(
            f"{folder} is a run directory and no adapter: did you mean {' or '.join(found[:3])}?"
        )


def write_folder(
    folder: Path,
    adapter: Adapter,
    config: Mapping[str, Any],
    *,
    embeddings: Collection[str] = (),
) -> None:
    """Writes an adapter in PEFT's form, whole or not at all; `folder` must be new.

    `config` is what `LoraConfig.to_dict()` gives or adapter_config.json holds; rank, alpha and
    their patterns are set so that PEFT applies each layer's own rank and scaling. What earlier
    merges folded (`adapter.frozen`) is stacked onto its layer. `embeddings` names the layers that
    are embeddings. Same adapter, same bytes. ValueError for a folder that exists, NaN or Inf, or a
    layer that `target_modules` does not name.
    """

    def parts() -> Iterator[tuple[str, Factors | Tensor]]:
        for name, factors in adapter.layers.items():
            extra = adapter.frozen.get(name)
            yield name, factors if extra is None else stacked(factors, extra)
        yield from adapter.dense.items()

    with new_folder(folder) as temporary:
        write_parts(temporary, parts(), config, embeddings=embeddings)


def write_parts(
    folder: Path,
    parts: Iterable[tuple[str, Factors | Tensor]],
    config: Mapping[str, Any],
    *,
    embeddings: Collection[str] = (),
) -> None:
    """Writes both files of an adapter into a folder that is there, part by part as they come.

    A part is a layer's name with its factors, or a dense tensor's name with the tensor. For
    callers that write further files; the others take `write_folder`.
    """
    ranks: dict[str, int] = {}
    scalings: dict[str, float] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, part in parts:
            if isinstance(part, Factors):
                if not targeted(config, name):
                    raise ValueError(f"layer {name!r} is none that target_modules names")
                ranks[name], scalings[name] = part.rank, part.scaling
                end = "lora_embedding_{}" if name in embeddings else "lora_{}.weight"
                halves = (("A", part.A), ("B", part.B))
                named = [(f"{name}.{end.format(half)}", tensor) for half, tensor in halves]
            else:
                named = [(name, part)]
            for full, tensor in named:
                if not finite(tensor):
                    raise ValueError(f"{full!r} holds NaN or Inf: it is not written")
                yield f"{PREFIX}{full}", tensor

    write_tensors(folder / TENSOR_FILE, tensors())
    settings = settings_for(config, ranks, scalings)
    text = json.dumps(settings, indent=2, sort_keys=True, allow_nan=False)
    write_text(folder / CONFIG_FILE, f"{text}\n")


def _place(path: Path, name: str) -> tuple[str, str, bool]:
    """(layer, "A" or "B", whether an embedding), or (name, "", False) for a dense tensor."""
    if not name.startswith(PREFIX):
        raise ValueError(f"{path}: tensor {name!r} does not begin with {PREFIX!r}: not PEFT's form")
    plain = name.removeprefix(PREFIX)
    for mark, what in _FOREIGN.items():
        if mark in plain:
            raise ValueError(f"{path}: {name!r} is {what}, which is not merged")
    for end, (part, embedding) in _ENDS.items():
        if plain.endswith(end):
            return plain.removesuffix(end), part, embedding
    if ".lora_" in plain:
        raise ValueError(f"{path}: {name!r} is a part of LoRA that is not known here")
    return plain, "", False


def _layer(
    folder: Path, layer: str, found: Mapping[str, Entry], settings: Mapping[str, Any], embed: bool
) -> LayerEntry:
    place = f"{folder}: layer {layer!r}"
    if missing := {"A", "B"} - found.keys():
        raise ValueError(f"{place} has no lora_{min(missing)}")
    A, B = found["A"], found["B"]
    for part, entry in (("A", A), ("B", B)):
        if len(entry.shape) != 2:
            raise ValueError(
                f"{place}: lora_{part} has shape {entry.shape}: only layers with two axes are "
                "merged, no convolutions"
            )
        if not entry.dtype.is_floating_point:
            raise ValueError(f"{place}: lora_{part} is of {entry.dtype}, not of floating point")
    rank = layer_rank(settings, layer)
    if A.shape[0] != rank or B.shape[1] != rank or 0 in (*A.shape, *B.shape):
        raise ValueError(
            f"{place}: A of shape {A.shape} and B of shape {B.shape} are not of the rank {rank} "
            f"that {CONFIG_FILE} gives it"
        )
    if not targeted(settings, layer):
        raise ValueError(f"{place} is none that target_modules in {CONFIG_FILE} names")
    scaling = layer_scaling(settings, layer)
    if not 0 < scaling < float("inf"):
        raise ValueError(f"{place}: its alpha gives the scaling {scaling}, not a number above 0")
    return LayerEntry(A, B, scaling, embed)
