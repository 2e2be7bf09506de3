"""Where many clients' replies wait for each other: in files, mapped into memory, not in memory.

Knows named tensors and a folder; not what they are for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedlora.simulation import Shelve


def shelf(folder: Path, expected: int, limit: int) -> Shelve:
    """Keeps tensors as they are while all that is expected fits the limit (bytes), else on disk."""
    if expected <= limit:
        return lambda tensors: tensors
    return lambda tensors: on_disk(tensors, folder)


def on_disk(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The same float32 tensors, read from a file of the folder whenever somebody looks at them.

    The file has no name any more when this returns: the system removes it with the last tensor,
    also when the process is killed. OSError where the disk is full.
    """
    parts = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in parts.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name!r} is {tensor.dtype}: what clients send is float32")
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".reply-") as file:
        for tensor in parts.values():
            file.write(tensor.numpy().data)
        file.flush()
        count = sum(tensor.numel() for tensor in parts.values())
        if count == 0:
            return parts
        flat = torch.from_file(file.name, shared=False, size=count, dtype=torch.float32)
    rows = torch.split(flat, [tensor.numel() for tensor in parts.values()])
    return {
        name: row.view(tensor.shape)
        for (name, tensor), row in zip(parts.items(), rows, strict=True)
    }
