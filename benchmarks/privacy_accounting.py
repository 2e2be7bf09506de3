"""Finding the noise for a budget, and epsilon after each round, beside dp-accounting's accountant.

    python benchmarks/privacy_accounting.py [--rounds 8] [--repeats 3]

Beside: the same with a new PLDAccountant for each question, which makes what a step loses anew.
Processor time, medians of interleaved repeats that each begin with nothing remembered; epsilon by
round comes after the search, as in a run, and leaves out the last, which the search has found.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import process_time

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from fedlora.privacy.accounting import (
    Mechanism,
    _epsilon,
    _rough_noise,
    _search,
    _step_losses,
    epsilon,
    noise_for,
)

DELTA = 1e-5
CASES = [(3.0, 0.00582, 5), (8.0, 0.03, 10), (1.0, 0.005, 25)]  # epsilon, rate, steps a round


def by_library(noise: float, sampling: float, steps: int) -> float:
    event = SelfComposedDpEvent(PoissonSampledDpEvent(sampling, GaussianDpEvent(noise)), steps)
    return float(PLDAccountant().compose(event).get_epsilon(DELTA))


def found_by_library(budget: float, sampling: float, steps: int) -> float:
    start = _rough_noise(budget, DELTA, steps, sampling)
    found = _search(lambda noise: by_library(noise, sampling, steps), budget, start)
    assert found is not None
    return found


def seconds(work: Callable[..., object], *given: object) -> float:
    began = process_time()
    work(*given)
    return process_time() - began


def measured(budget: float, rate: float, each: int, rounds: int) -> list[float]:
    """Seconds: our search, the library's, our epsilon by round, the library's."""
    for remembers in (noise_for, _epsilon, _step_losses):
        remembers.cache_clear()
    total = each * rounds
    search = seconds(noise_for, budget, DELTA, total, rate)
    noise = noise_for(budget, DELTA, total, rate)

    def by_round(spent: Callable[[int], float]) -> None:
        for steps in range(each, total, each):
            spent(steps)

    return [
        search,
        seconds(found_by_library, budget, rate, total),
        seconds(by_round, lambda steps: epsilon([Mechanism(noise, steps, rate)], DELTA)),
        seconds(by_round, lambda steps: by_library(noise, rate, steps)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    print("| epsilon, rate, steps | search, s | beside | epsilon by round, s | beside |")
    print("|---|---|---|---|---|", flush=True)
    for budget, rate, each in CASES:
        times = [measured(budget, rate, each, asked.rounds) for _ in range(asked.repeats)]
        search, anew, rounds, beside = (median(found) for found in zip(*times, strict=True))
        print(
            f"| {budget:g}, {rate:g}, {each * asked.rounds} | {search:.1f} | "
            f"{anew / search:.1f} times | {rounds:.2f} | {beside / rounds:.1f} times |",
            flush=True,
        )


if __name__ == "__main__":
    main()
