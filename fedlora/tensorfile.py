"""Border to safetensors files: a header read once and checked for lies, tensors read one by one,
and a file written tensor by tensor, so that no more than one tensor need be in memory.

The format: 8 bytes with the header's length N, N bytes of JSON (name -> dtype, shape, offsets),
then the numbers. Nothing is ever unpickled. Knows no adapter and no model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LONGEST_HEADER = 100_000_000  # bytes; the same limit as in the safetensors library
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file: bytes `start` to `stop`, counted from the file's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name; no number is read.

    ValueError for a file that is cut, whose header is no JSON of the right form, or in which a
    name occurs twice, or a tensor lies outside the file, over another one, or in fewer or more
    bytes than its shape and dtype need. OSError where there is no such file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path} is no whole safetensors file: {size} bytes, cut in its header"
            )
        if length > LONGEST_HEADER:
            raise ValueError(f"{path} claims a header of {length} bytes: above any adapter's")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no safetensors file: its header is no JSON: {error}"
        ) from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file: its header is no table of names")
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {name: _entry(path, name, value, start) for name, value in header.items()}
    place = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != place:
            word = "overlaps another" if entry.start < place else "leaves a gap before it"
            raise ValueError(f"{path}: tensor {name!r} {word}: the header lies")
        place = entry.stop
    if place != size:
        raise ValueError(
            f"{path} has {size} bytes, its header speaks of {place}: it was cut or added to"
        )
    return entries


def read_tensors(path: Path, entries: Sequence[Entry]) -> list[Tensor]:
    """These tensors as stored; the file is open only meanwhile. ValueError if it was cut since."""
    tensors = []
    with path.open("rb") as file:
        for entry in entries:
            data = bytearray(entry.stop - entry.start)
            file.seek(entry.start)
            if file.readinto(data) != len(data):
                raise ValueError(f"{path} became shorter while it was read")
            flat = torch.frombuffer(data, dtype=entry.dtype) if data else torch.empty(0)
            tensors.append(flat.to(entry.dtype).reshape(entry.shape))
    return tensors


def finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no Inf; by its extremes, so that no copy of it is made."""
    return tensor.numel() == 0 or all(math.isfinite(end) for end in torch.aminmax(tensor))


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes a safetensors file from named tensors that may be made one by one as they are asked.

    The same tensors in the same order give the same bytes. ValueError for a name given twice.
    """
    beside, header = path.with_name(f".{path.name}.data"), {"__metadata__": {"format": "pt"}}
    place = 0
    entries: dict[str, Mapping[str, Any]] = {}
    try:
        with beside.open("wb") as file:
            for name, tensor in tensors:
                if name in entries:
                    raise ValueError(f"tensor {name!r} is given twice to {path.name}")
                data = _memory(tensor)
                file.write(data)
                entries[name] = _described(tensor, place)
                place += data.nbytes
        with path.open("wb") as file, beside.open("rb") as numbers:
            file.write(_opening(header | entries))
            shutil.copyfileobj(numbers, file, 1 << 20)
    finally:
        beside.unlink(missing_ok=True)


def file_image(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[memoryview]]:
    """A safetensors file in memory: its opening, and each tensor's numbers where they lie.

    Nothing is copied but tensors that are not on the CPU or not in one piece; the order is that of
    the safetensors library, wide numbers first, then by name.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries: dict[str, Mapping[str, Any]] = {}
    place = 0
    for name in names:
        entries[name] = _described(tensors[name], place)
        place = entries[name]["data_offsets"][1]
    return _opening(entries), [_memory(tensors[name]) for name in names]


def _memory(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _described(tensor: Tensor, place: int) -> dict[str, Any]:
    return {
        "dtype": _NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "data_offsets": [place, place + tensor.numel() * tensor.dtype.itemsize],
    }


def _opening(header: Mapping[str, Any]) -> bytes:
    """The header's length and the header, filled up to whole words of 8 bytes."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name, times = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"name {name!r} occurs {times} times")
    return found


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    place = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{place} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{place} has dtype {dtype!r}; read are {', '.join(_DTYPES)}")
    if not _counts(shape):
        raise ValueError(f"{place} has shape {shape!r}: not a list of whole numbers >= 0")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{place} has offsets {offsets!r}: not two rising whole numbers")
    need = math.prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != need:
        raise ValueError(
            f"{place} of shape {shape} in {dtype} needs {need} bytes, its offsets hold "
            f"{offsets[1] - offsets[0]}"
        )
    return Entry(_DTYPES[dtype], tuple(shape), start + offsets[0], start + offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(part) is int and part >= 0 for part in value)
