"""Checkpoints of a run: written whole or not at all, hashed, the one before kept.

One file a round: a JSON head with everything small and a hash of everything, then the tensors as
safetensors. Knows progress and files; no model and no data.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fedlora.adapter import Adapter, ClientState, Factors
from fedlora.files import write_pieces
from fedlora.server import ServerState
from fedlora.simulation import Progress
from fedlora.tensorfile import file_image

MAGIC = b"fedlora checkpoint 1\n"
KEPT = 2  # the newest, and one to fall back on
LENGTH = struct.Struct("<QQ")  # of the head and of the tensors, in bytes
DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A run between two rounds: every loop's progress by name, and the best adapters so far.

    A federation is one loop, called ""; mode `local` has one for each client. `notes` is small and
    plain: figures of the best round.
    """

    round: int
    loops: Mapping[str, Progress]
    best: Mapping[str, Adapter]
    notes: Mapping[str, Any]


class NoCheckpointError(ValueError):
    """There is nothing whole to go on from."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes `round-N.ckpt` into the folder in one step and drops those before the last two.

    OSError (a full disk, a broken one) leaves the older checkpoints as they are.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"round-{checkpoint.round:06d}.ckpt"
    write_pieces(path, _pieces(checkpoint))
    for old in sorted(folder.glob("round-*.ckpt"))[:-KEPT]:
        old.unlink()
    return path


def latest_checkpoint(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest whole checkpoint, with a line for each newer one that is damaged.

    NoCheckpointError where there is none, or all are damaged.
    """
    problems: list[str] = []
    for path in sorted(folder.glob("round-*.ckpt"), reverse=True):
        try:
            with path.open("rb") as file:
                return _taken(file), problems
        except (OSError, ValueError) as error:
            problems.append(f"{path} is damaged ({error})")
    told = "; ".join(problems) or f"there is none in {folder}"
    raise NoCheckpointError(f"no whole checkpoint to resume from: {told}")


def remove_checkpoints(folder: Path) -> None:
    """Takes the checkpoints away, after the results are saved."""
    for path in folder.glob("round-*.ckpt"):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def encoded(checkpoint: Checkpoint) -> bytes:
    """Magic, two lengths, a SHA-256 of what follows, the JSON head, the tensors: the file whole."""
    return b"".join(_pieces(checkpoint))


def _pieces(checkpoint: Checkpoint) -> list[bytes | memoryview]:
    tensors: dict[str, Tensor] = {}
    head = {
        "round": checkpoint.round,
        "notes": dict(checkpoint.notes),
        "best": {name: _put(tensors, f"best/{name}", a) for name, a in checkpoint.best.items()},
        "loops": {
            name: _put_progress(tensors, f"loop/{name}", progress)
            for name, progress in checkpoint.loops.items()
        },
    }
    return _packed(head, tensors)


def encode_state(owner: str, state: ClientState) -> bytes:
    """What a client keeps for itself, hashed; `owner` names the run it belongs to."""
    tensors: dict[str, Tensor] = {}
    head = {"owner": owner, "state": _put_client(tensors, "own", state)}
    return b"".join(_packed(head, tensors))


def decode_state(data: bytes) -> tuple[str, ClientState]:
    """The inverse of `encode_state`: the run and the state; ValueError for damage."""
    head, tensors = _unpacked(io.BytesIO(data))
    return head["owner"], _take_client(tensors, "own", head["state"])


def decoded(data: bytes) -> Checkpoint:
    """The inverse of `encoded`.

    ValueError for anything that is not, to the bit, what was written.
    """
    return _taken(io.BytesIO(data))


def _taken(file: io.BufferedIOBase) -> Checkpoint:
    head, tensors = _unpacked(file)
    loops = {name: _take_progress(tensors, f"loop/{name}", p) for name, p in head["loops"].items()}
    best = {name: _take(tensors, f"best/{name}", a) for name, a in head["best"].items()}
    return Checkpoint(head["round"], loops, best, head["notes"])


def _packed(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """The file in pieces, tensors where they lie: one more copy of all clients' states is much."""
    text = json.dumps(head, sort_keys=True, allow_nan=False).encode()
    opening, numbers = file_image(tensors)
    lengths = LENGTH.pack(len(text), len(opening) + sum(piece.nbytes for piece in numbers))
    digest = hashlib.sha256(lengths + text + opening)
    for piece in numbers:
        digest.update(piece)
    return [MAGIC + lengths + digest.digest() + text + opening, *numbers]


def _unpacked(file: io.BufferedIOBase) -> tuple[Any, dict[str, Tensor]]:
    start = len(MAGIC) + LENGTH.size + DIGEST
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    begin = file.read(start)
    if begin[: len(MAGIC)] != MAGIC or len(begin) < start:
        raise ValueError("it does not begin like a checkpoint")
    lengths, digest = begin[len(MAGIC) : start - DIGEST], begin[start - DIGEST :]
    text_size, body_size = LENGTH.unpack(lengths)
    if size != start + text_size + body_size:
        raise ValueError(f"{size} bytes, its head speaks of {start + text_size + body_size}")
    text, body = file.read(text_size), file.read(body_size)
    found = hashlib.sha256(lengths)
    found.update(text)
    found.update(body)
    if found.digest() != digest:
        raise ValueError("its content does not match its hash")
    try:
        return json.loads(text), load(body)
    except SafetensorError as error:
        raise ValueError(f"its tensors cannot be read: {error}") from error


def _put_progress(tensors: dict[str, Tensor], place: str, progress: Progress) -> dict[str, Any]:
    state = progress.state
    carried = Adapter({}, {}, state.carried)
    return {
        "round": progress.round,
        "memory": dict(state.memory),
        "adapter": _put(tensors, f"{place}/server", state.adapter),
        "carried": _put(tensors, f"{place}/carried", carried),
        "clients": {
            client: _put_client(tensors, f"{place}/client/{client}", own)
            for client, own in progress.clients.items()
        },
    }


def _take_progress(tensors: Mapping[str, Tensor], place: str, head: Any) -> Progress:
    adapter = _take(tensors, f"{place}/server", head["adapter"])
    carried = _take(tensors, f"{place}/carried", head["carried"]).frozen
    clients = {
        client: _take_client(tensors, f"{place}/client/{client}", own)
        for client, own in head["clients"].items()
    }
    return Progress(head["round"], ServerState(adapter, head["memory"], carried), clients)


def _put_client(tensors: dict[str, Tensor], place: str, state: ClientState) -> dict[str, Any]:
    for name, tensor in state.optimiser.items():
        tensors[f"{place}/optimiser/{name}"] = tensor
    own = None if state.adapter is None else _put(tensors, f"{place}/adapter", state.adapter)
    return {"adapter": own, "optimiser": sorted(state.optimiser)}


def _take_client(tensors: Mapping[str, Tensor], place: str, head: Any) -> ClientState:
    own = None if head["adapter"] is None else _take(tensors, f"{place}/adapter", head["adapter"])
    return ClientState(own, {n: tensors[f"{place}/optimiser/{n}"] for n in head["optimiser"]})


def _put(tensors: dict[str, Tensor], place: str, adapter: Adapter) -> dict[str, Any]:
    """The adapter's tensors under their place; what is left (scalings, names) as plain values."""
    head: dict[str, Any] = {"dense": sorted(adapter.dense)}
    for kind, layers in (("layers", adapter.layers), ("frozen", adapter.frozen)):
        head[kind] = {name: factors.scaling for name, factors in layers.items()}
        for name, factors in layers.items():
            tensors[f"{place}/{kind}/{name}/A"] = factors.A
            tensors[f"{place}/{kind}/{name}/B"] = factors.B
    for name, tensor in adapter.dense.items():
        tensors[f"{place}/dense/{name}"] = tensor
    return head


def _take(tensors: Mapping[str, Tensor], place: str, head: Any) -> Adapter:
    def layers(kind: str) -> dict[str, Factors]:
        return {
            name: Factors(
                tensors[f"{place}/{kind}/{name}/A"], tensors[f"{place}/{kind}/{name}/B"], scaling
            )
            for name, scaling in head[kind].items()
        }

    dense = {name: tensors[f"{place}/dense/{name}"] for name in head["dense"]}
    return Adapter(layers("layers"), dense, layers("frozen"))
