"""An optimiser's moments between rounds: taken out, put back, and turned along with the factors.

Knows AdamW's names of its tensors and the names of an adapter's; no model, no data.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora.adapter import Adapter, rescaled
from fedlora.lowrank import rotation

KEYS = ("step", "exp_avg", "exp_avg_sq")


def moments(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """AdamW's tensors by parameter name, copied to the CPU."""
    return {
        f"{name}.{key}": value.detach().to("cpu", copy=True)
        for name, parameter in parameters.items()
        for key, value in optimiser.state[parameter].items()
    }


def restore(
    optimiser: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    kept: Mapping[str, Tensor],
) -> None:
    """Gives kept moments back to the parameters that had them."""
    for name, parameter in parameters.items():
        found = {key: kept[f"{name}.{key}"] for key in KEYS if f"{name}.{key}" in kept}
        for key, value in found.items():
            place = "cpu" if key == "step" and parameter.device.type == "cpu" else parameter.device
            optimiser.state[parameter][key] = value.to(place, copy=True)


def transported(kept: Mapping[str, Tensor], before: Adapter, after: Adapter) -> dict[str, Tensor]:
    """The moments in the coordinates of `after`, where the client left them in those of `before`.

    With the orthogonal Q that turns the old pairs nearest to the new ones (Procrustes), a gradient
    of B becomes G Q and one of A becomes Q^T G: first moments turn alike; second moments turn by
    Q's squared entries, as if entries were uncorrelated. Moments of other tensors stay, and so do
    those of a layer where one factor is as it was: its pairs were averaged, not turned.
    """
    turned = dict(kept)
    for name, new in after.layers.items():
        old = before.layers[name]
        if old.rank != new.rank:
            continue
        near = rescaled(old, new.scaling)
        if torch.equal(near.A, new.A) or torch.equal(near.B, new.B):
            continue
        overlap = near.B.double().mT @ new.B.double() + near.A.double() @ new.A.double().mT
        Q = rotation(overlap)
        for key, turn in (("exp_avg", Q), ("exp_avg_sq", Q.square())):
            for part in ("lora_A", "lora_B"):
                place = f"{name}.{part}.{key}"
                if place in kept:
                    turned[place] = _turned(kept[place], turn, rows=part == "lora_A")
    return turned


def _turned(moment: Tensor, turn: Tensor, *, rows: bool) -> Tensor:
    """Q^T M over the first r rows, or M Q over the first r columns; zero pairs beyond them stay."""
    r = len(turn)
    result = moment.clone()
    if rows:
        result[:r] = (turn.mT @ moment[:r].double()).to(moment.dtype)
    else:
        result[:, :r] = (moment[:, :r].double() @ turn).to(moment.dtype)
    return result
