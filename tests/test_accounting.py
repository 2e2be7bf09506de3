"""Epsilon against closed forms and published values; noise that keeps a budget."""

from __future__ import annotations

import math
import random

import pytest
from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from scipy.optimize import brentq

from fedlora.privacy.accounting import Accountant, Mechanism, epsilon, noise_for

BOTH: tuple[Accountant, ...] = ("pld", "rdp")


def gaussian_delta(epsilon: float, noise: float) -> float:
    """The exact delta of one Gaussian mechanism (Balle and Wang 2018, 1805.06530, theorem 8)."""
    a, b = 1 / (2 * noise), epsilon * noise
    return _phi(a - b) - math.exp(epsilon + _log_phi(-a - b))


def _phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _log_phi(x: float) -> float:
    """log of the normal distribution function; by its tail where that is below 1e-300."""
    value = _phi(x)
    return math.log(value) if value > 0 else -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi))


def exact_epsilon(noise: float, delta: float) -> float:
    return brentq(lambda e: gaussian_delta(e, noise) - delta, 0, 500, xtol=1e-10)


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0, 8.0, 40.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_one_gaussian_is_the_closed_form(noise: float, delta: float) -> None:
    """Balle and Wang 2018, theorem 8; PLD is never below it, and within 0.5 %."""
    exact, found = exact_epsilon(noise, delta), epsilon([Mechanism(noise)], delta)
    assert exact * (1 - 1e-9) <= found <= exact * 1.005 + 1e-3
    assert epsilon([Mechanism(noise)], delta, "rdp") >= exact


@pytest.mark.parametrize(("noise", "steps"), [(10.0, 100), (5.0, 4), (30.0, 1000)])
def test_many_gaussians_are_one_of_the_summed_mu(noise: float, steps: int) -> None:
    """mu-GDP (Dong, Roth, Su 2022): t steps of mu = 1 / noise are one of sqrt(t) mu."""
    exact = exact_epsilon(noise / math.sqrt(steps), 1e-5)
    assert exact * (1 - 1e-9) <= epsilon([Mechanism(noise, steps)], 1e-5) <= exact * 1.01
    mixed = [Mechanism(noise, steps // 2), Mechanism(noise, steps - steps // 2)]
    assert epsilon(mixed, 1e-5) == epsilon([Mechanism(noise, steps)], 1e-5)
    other = [Mechanism(noise, steps), Mechanism(noise / 2, steps)]
    both = exact_epsilon(1 / math.sqrt(steps / noise**2 + 4 * steps / noise**2), 1e-5)
    assert both * (1 - 1e-9) <= epsilon(other, 1e-5) <= both * 1.01


def renyi(noise: float, sampling: float, order: int) -> float:
    """Of one step of the sampled Gaussian, whole orders (Mironov, Talwar, Zhang 2019, eq. 3.3)."""
    terms = [
        math.log(math.comb(order, k)) + (order - k) * math.log1p(-sampling)
        + k * math.log(sampling) + (k * k - k) / (2 * noise**2)
        for k in range(order + 1)
    ]  # fmt: skip
    top = max(terms)
    return (top + math.log(sum(math.exp(term - top) for term in terms))) / (order - 1)


MNIST = [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)]  # TensorFlow Privacy's tutorial


@pytest.mark.parametrize(("noise", "epochs", "published"), MNIST)
def test_published_values_of_mnist(noise: float, epochs: int, published: float) -> None:
    """60,000 examples, batches of 256, delta 1e-5: published with the conversion of 2017, from
    which the one of 2020 (Balle et al., theorem 21) takes 10 to 20 %.
    """
    steps, rate, log_delta = epochs * 60_000 // 256, 256 / 60_000, math.log(1e-5)
    curve = {a: steps * renyi(noise, rate, a) for a in range(2, 65)}
    old = min(cost - log_delta / (a - 1) for a, cost in curve.items())
    new = min(
        cost + math.log((a - 1) / a) - (log_delta + math.log(a)) / (a - 1)
        for a, cost in curve.items()
    )
    assert old == pytest.approx(published, rel=0.005)  # whole orders only
    found = epsilon([Mechanism(noise, steps, rate)], 1e-5, "rdp")
    assert new * 0.99 <= found <= new * (1 + 1e-9)
    assert epsilon([Mechanism(noise, steps, rate)], 1e-5) < found


def test_values_that_are_known_of_the_library() -> None:
    spent = [Mechanism(1.0, 100, 0.2)]
    assert epsilon(spent, 1e-5) == pytest.approx(14.53, abs=0.01)
    assert epsilon(spent, 1e-5, "rdp") == pytest.approx(16.08, abs=0.01)


def test_losses_are_composed_as_the_library_composes_them() -> None:
    spent = [Mechanism(0.8, 30, 0.02), Mechanism(4.0, 5), Mechanism(1.2, 7, 0.3)]
    keeper = PLDAccountant()
    for one in spent:
        event: DpEvent = GaussianDpEvent(one.noise)
        if one.sampling < 1:
            event = PoissonSampledDpEvent(one.sampling, event)
        keeper.compose(SelfComposedDpEvent(event, one.steps))
    assert epsilon(spent, 1e-5) == pytest.approx(keeper.get_epsilon(1e-5), rel=1e-9)


def test_what_a_step_loses_is_made_once_for_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second, the rest milliseconds; each client asks for its epsilon each round."""
    made = []
    make = privacy_loss_distribution.from_gaussian_mechanism

    def counted(*given: float, **named: float) -> object:
        made.append(named)
        return make(*given, **named)

    monkeypatch.setattr(privacy_loss_distribution, "from_gaussian_mechanism", counted)
    spent = [epsilon([Mechanism(0.9173, 3 * rounds, 0.05)], 1e-5) for rounds in range(1, 6)]
    assert sorted(set(spent)) == spent
    assert len(made) == 1


@pytest.mark.parametrize("accountant", BOTH)
def test_sampling_all_is_no_sampling(accountant: Accountant) -> None:
    whole = epsilon([Mechanism(3.0, 10)], 1e-5, accountant)
    assert epsilon([Mechanism(3.0, 10, 1.0)], 1e-5, accountant) == whole
    assert epsilon([Mechanism(3.0, 10, 0.1)], 1e-5, accountant) < whole


@pytest.mark.parametrize("seed", range(8))
def test_noise_spends_the_budget_and_never_more(seed: int) -> None:
    rng = random.Random(seed)
    budget, delta = rng.uniform(0.2, 16), rng.choice([1e-4, 1e-6])
    steps, sampling = rng.randint(1, 300), rng.uniform(0.002, 1.0)
    noise = noise_for(budget, delta, steps, sampling)
    spent = epsilon([Mechanism(noise, steps, sampling)], delta)
    assert budget * 0.999 <= spent <= budget


def test_nothing_costs_nothing_and_no_noise_costs_all() -> None:
    assert epsilon([], 1e-5) == 0
    assert epsilon([Mechanism(1.0, 0)], 1e-5) == 0
    assert epsilon([Mechanism(0.0)], 1e-5) == math.inf
    assert epsilon([Mechanism(5.0), Mechanism(0.0)], 1e-5) == math.inf


def test_budgets_that_make_no_sense_are_refused() -> None:
    for bad in ((0.0, 1e-5, 1, 1.0), (1.0, 0.0, 1, 1.0), (1.0, 1e-5, 0, 1.0), (1.0, 1e-5, 1, 1.5)):
        with pytest.raises(ValueError, match="must be above 0"):
            noise_for(*bad)
    with pytest.raises(ValueError, match="delta must lie between"):
        epsilon([Mechanism(1.0)], 1.0)


def test_a_delta_that_the_accountant_cannot_tell_from_nothing_is_refused_with_remedies() -> None:
    with pytest.raises(
        ValueError, match=r"at delta 1e-16 over 10 steps: take .*accountant = 'rdp'"
    ):
        noise_for(8.0, 1e-16, 10)
    assert noise_for(8.0, 1e-16, 10, 1.0, "rdp") > noise_for(8.0, 1e-12, 10, 1.0, "rdp")
