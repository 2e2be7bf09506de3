"""An audit by a distinguishing game: does what comes out tell no more than was claimed?

The adversary plants a canary that moves the sum as far as the clip lets it, knows all else, and
says whether it is there. Against Gaussian noise the best test looks along the canary; how far
apart both worlds are, in standard deviations, is mu (Dong, Roth, Su 2022), which the mechanism
claims to keep at 1 / noise. Too little noise shows as a larger mu.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import normal, random_factors
from torch import Tensor, nn

from fedlora.adapter import Adapter, ClientResult, converted
from fedlora.policy import PLAIN
from fedlora.privacy import client_level, dpsgd
from fedlora.privacy.client_level import Noising, PrivateMerge
from fedlora.privacy.dpsgd import PrivateSteps
from fedlora.privacy.ledger import Terms
from fedlora.privacy.noise import gaussian
from fedlora.rules import get_rule
from fedlora.server import ServerState

pytest.importorskip("dp_accounting")
GAMES = 4000  # half of them with the canary


@dataclass(frozen=True)
class Audit:
    """What the adversary measured: mu, and how sure it is (one standard error)."""

    mu: float
    error: float

    def caught(self, claimed: float) -> bool:
        """Whether the mechanism leaks more than it claims, beyond four standard errors."""
        return self.mu - 4 * self.error > claimed


def audit(play: Callable[[bool], float], games: int = GAMES) -> Audit:
    there = np.array([play(True) for _ in range(games // 2)])
    gone = np.array([play(False) for _ in range(games // 2)])
    spread = math.sqrt((there.var(ddof=1) + gone.var(ddof=1)) / 2)
    mu = float(there.mean() - gone.mean()) / spread
    return Audit(mu, math.sqrt((2 + mu * mu / 4) / (games // 2)))


def sgd_game(noise: float, steps: int) -> Callable[[bool], float]:
    """Steps of DP-SGD on four examples, every one in each batch, and a fifth: the canary."""
    clip, layer = 0.7, {"w": nn.Parameter(torch.zeros(3, 4))}
    others, canary = normal(0, 4, 3, 4).float(), torch.full((1, 3, 4), 1e3)
    along = canary[0].double() / canary[0].double().norm()

    def play(there: bool) -> float:
        seen: list[Tensor] = []
        runner = PrivateSteps(nn.Identity(), layer, clip, noise, 4.0, {})
        for _ in range(steps):
            layer["w"].grad_sample = torch.cat([others, canary]) if there else others.clone()
            runner.begin(5 if there else 4)
            runner.finish()
            seen.append(layer["w"].grad.double())
        return float((torch.stack(seen).mean(dim=0) * along).sum())

    return play


def server_game(noise: float, folder: Path) -> Callable[[bool], float]:
    """One round of client-level privacy: two clients and the canary, whose head moves far."""
    layer = converted(random_factors(0, 6, 5, 2), torch.float32, "cpu")
    start = Adapter({"w": layer}, {"h": torch.zeros(50)})
    canary = Adapter(start.layers, {"h": torch.full((50,), 1e3)})
    others = [ClientResult(f"c{k}", start, 1) for k in range(2)]
    terms = Terms("server", "client", 1e9, 1e-5, "rdp")
    run = PrivateMerge(Noising("increment", noise, 3, 0.7), folder / "l", terms, 0)
    along = torch.ones(50, dtype=torch.float64) / math.sqrt(50)

    def play(there: bool) -> float:
        clients = [*others, ClientResult("canary", canary, 1)] if there else others
        for file in folder.glob("l*"):  # each game has a ledger of its own, with its head
            file.unlink()
        state = run(get_rule("fra"), ServerState(start), clients, 1, PLAIN)
        return float((state.adapter.dense["h"].double() * along).sum())

    return play


@pytest.mark.parametrize("noise", [0.5, 2.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_training_leaks_what_it_claims_and_no_more(noise: float, steps: int) -> None:
    found, claimed = audit(sgd_game(noise, steps)), math.sqrt(steps) / noise
    assert not found.caught(claimed)
    assert found.mu == pytest.approx(claimed, rel=0.12, abs=0.1)  # no less: the game is sharp


def less_noise(count: int) -> np.ndarray:
    return gaussian(count) / 1.7


def test_training_with_too_little_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpsgd, "gaussian", less_noise)
    found = audit(sgd_game(1.0, 1))
    assert found.caught(1.0)
    assert found.mu == pytest.approx(1.7, rel=0.12)


def count_game(noise: float, folder: Path) -> Callable[[bool], float]:
    """The count that moves the clip: three clients within it, and a fourth that answers or not."""
    terms = Terms("server", "client", 1e9, 1e-5, "rdp")
    noising = Noising("increment", noise, 4, 1.0, quantile=0.5)
    run = PrivateMerge(noising, folder / "l", terms, 0)
    return lambda there: -math.log(run._next_clip(1.0, [0.5] * (4 if there else 3)))


def test_the_count_leaks_what_it_claims_and_no_more(tmp_path: Path) -> None:
    noising = Noising("increment", 0.2, 4, 1.0, quantile=0.5)
    found, claimed = audit(count_game(0.2, tmp_path)), 1 / noising.count_noise
    assert not found.caught(claimed)
    assert found.mu == pytest.approx(claimed, rel=0.12)


@pytest.mark.slow
def test_a_trusted_server_leaks_what_it_claims_and_no_more(tmp_path: Path) -> None:
    found = audit(server_game(1.0, tmp_path), 800)
    assert not found.caught(1.0)
    assert found.mu == pytest.approx(1.0, rel=0.3)


@pytest.mark.slow
def test_a_server_with_too_little_noise_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_level, "gaussian", less_noise)
    found = audit(server_game(1.0, tmp_path), 800)
    assert found.caught(1.0)
