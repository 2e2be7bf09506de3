"""Whether a model reads each row by itself, which the bound of a private step takes for granted.

Clipping bounds what a row adds to a sum. Where the row also changes what others add, because
padding is not masked or rows are mixed, the sum moves by more: such a model is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fedlora.data import Examples, encode
from fedlora.errors import is_memory
from fedlora.model import Model, longest_input
from fedlora.seeding import generator, numpy_generator
from fedlora.tables import Table

SLACK = 1e-4  # of the largest score: a hundred times what float32 leaves, and less than any mixing
NARROW = (torch.bfloat16, torch.float16)


def check_rows_apart(model: Model, max_length: int) -> Examples:
    """ValueError, with the reason, for a model in which a row's scores depend on its batch.

    Made-up rows of up to `max_length` tokens are scored alone and in one batch, with a made-up
    head, in evaluation mode and float32; no client's row is read, and the model stays as it was.
    Returns these rows, the longest last.
    """
    kind = model.network.base_model.model.config.model_type
    for name, module in model.network.named_modules():
        if _mixes_rows(module):
            raise ValueError(
                f"model.name = {model.settings.name!r} ({kind}): layer {name} "
                f"({type(module).__name__}) mixes the rows of a batch: a row would change the "
                "gradients of others, and no epsilon would hold; take a model without such layers, "
                "or train without privacy"
            )
    longest = min(max_length, longest_input(model))
    try:
        rows = made_up(model.tokenizer, longest)
        moved = rows_move(model, rows)
    except Exception as error:
        if is_memory(error):
            raise
        raise ValueError(
            f"model.name = {model.settings.name!r} ({kind}) fails on made-up rows, some of which "
            f"hold special tokens ({error}): a client's row that does would show itself by the "
            "failure; take another architecture (BERT, RoBERTa, GPT-2, Llama), or train without "
            "privacy"
        ) from error
    if not moved <= SLACK:  # NaN is refused too
        raise ValueError(
            f"model.name = {model.settings.name!r} ({kind}): a row's scores move by {moved:.2g} of "
            f"their size when it is batched with a longer row ({SLACK:g} is allowed for rounding): "
            "this architecture does not mask padding, so that a long row would change the "
            "gradients of others, and no epsilon would hold; take one that does (BERT, RoBERTa, "
            "GPT-2, Llama), or train without privacy"
        )
    return rows


def made_up(tokenizer: Any, max_length: int) -> Examples:
    """Rows that hold each special token as text, then rows of random tokens, of a single one and
    more, up to `max_length`.

    The latter are no tokenizer's work: one that makes rows of like length of whatever it is given
    would hide that padding is not masked.
    """
    texts = [f"a {token} a" for token in tokenizer.all_special_tokens]
    table = Table("made-up rows", texts, None, ["" for _ in texts])
    made = encode(table, [0] * len(texts), tokenizer, max_length, empty=True)
    rng = numpy_generator(0, "made-up rows")
    plain = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    counts = sorted({1, 2, max(1, max_length // 4), max(1, max_length // 2), max_length})
    drawn = [rng.choice(plain, count).astype(np.int64) for count in counts]
    inputs = {
        name: [*rows, *(row if name == "input_ids" else np.zeros_like(row) for row in drawn)]
        for name, rows in made.inputs.items()
    }
    lengths = np.concatenate([made.lengths, np.array(counts, dtype=np.int64)])
    return Examples(inputs, np.zeros(len(lengths), dtype=np.int64), lengths, made.padding)


def rows_move(model: Model, rows: Examples) -> float:
    """How far scores of rows move when all of them make one batch, over the largest score."""
    network, training = model.network, model.network.training
    numbers = np.arange(len(rows))
    try:
        with torch.no_grad(), _random_head(model), _Float32():
            network.eval()
            alone = torch.cat([_scores(model, rows, numbers[at : at + 1]) for at in numbers])
            moved = (_scores(model, rows, numbers) - alone).abs().max() / alone.abs().max()
    finally:
        network.train(training)
    return float(moved)


def _scores(model: Model, rows: Examples, numbers: Any) -> Tensor:
    inputs, _ = rows.batch(numbers, model.device)
    scores: Tensor = model.network(**inputs).logits
    return scores.double().cpu()


def _mixes_rows(module: nn.Module) -> bool:
    """Whether what it makes of a row depends on the batch, in training at least."""
    running = isinstance(module, _InstanceNorm) and module.track_running_stats
    return isinstance(module, _BatchNorm) or running


@contextmanager
def _random_head(model: Model) -> Iterator[None]:
    """A made-up head: one of zeros would give the same scores whatever it is shown."""
    head = {n: p for n, p in model.parameters.items() if not n.endswith(("lora_A", "lora_B"))}
    before = {name: parameter.data for name, parameter in head.items()}
    for name, parameter in head.items():
        drawn = torch.randn(parameter.shape, generator=generator(0, "made-up head", name))
        parameter.data = (drawn / parameter.shape[-1] ** 0.5).to(parameter.device)
    try:
        yield
    finally:
        for name, parameter in head.items():
            parameter.data = before[name]


class _Float32(TorchFunctionMode):
    """Every operation reads and makes float32 in place of narrower floats, one weight at a time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`func` of the widened arguments."""
        return func(*tree_map(_widened, args), **tree_map(_widened, kwargs or {}))


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in NARROW:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in NARROW else value
