"""The course of local training: which rows come when, how many steps, how fast they learn."""

from __future__ import annotations

import math
from itertools import chain, islice, pairwise

import numpy as np
import pytest

from fedlora.client import batches, learning_rate
from fedlora.settings import ClientSettings, steps_per_round

ROWS = np.arange(100, 157)  # 57 rows, none of them its own number
LENGTHS = np.random.default_rng(0).integers(3, 60, 200)


def first_batches(count: int, batch: int = 8, seed: int = 0, client: str = "a", first: int = 0):
    stream = batches(ROWS, LENGTHS, batch, seed, client, first)
    return [rows.tolist() for rows in islice(stream, count)]


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("batch", [1, 8, 19, 57, 200])
def test_each_epoch_takes_each_row_once(batch: int) -> None:
    per_epoch = math.ceil(57 / batch)
    dealt = first_batches(3 * per_epoch, batch)
    for epoch in range(3):
        rows = [*chain(*dealt[epoch * per_epoch : (epoch + 1) * per_epoch])]
        assert sorted(rows) == ROWS.tolist()
    assert all(len(rows) <= batch for rows in dealt)
    assert {len(rows) for rows in dealt} <= {batch, 57 % batch}


def test_the_stream_depends_on_seed_client_and_epoch_alone() -> None:
    first = first_batches(16)
    assert first_batches(16) == first
    assert first_batches(16, seed=1) != first
    assert first_batches(16, client="b") != first
    assert first[:8] != first[8:]


@pytest.mark.parametrize("first", [1, 7, 8, 9, 20])
def test_a_stream_that_starts_later_goes_on_where_an_earlier_one_would_be(first: int) -> None:
    assert first_batches(10, first=first) == first_batches(first + 10)[first:]


def test_a_batch_holds_texts_of_like_length() -> None:
    """Sorted in pools of fifty batches: all 57 rows are one pool here."""
    ordered = sorted(first_batches(8), key=lambda rows: min(LENGTHS[row] for row in rows))
    for left, right in pairwise(ordered):
        assert max(LENGTHS[row] for row in left) <= min(LENGTHS[row] for row in right)


def test_long_and_short_batches_come_in_no_order() -> None:
    widths = [max(LENGTHS[row] for row in rows) for rows in first_batches(8)]
    assert widths != sorted(widths)
    assert widths != sorted(widths, reverse=True)


def test_pools_keep_epochs_random() -> None:
    """With more rows than a pool holds, the same lengths do not always meet."""
    rows, lengths = np.arange(1000), np.arange(1000) % 40
    dealt = list(islice(batches(rows, lengths, 4, 0, "a", 0), 500))
    assert sorted(np.concatenate(dealt[:250]).tolist()) == rows.tolist()
    together = {tuple(sorted(batch.tolist())) for batch in dealt[:250]}
    assert not together & {tuple(sorted(batch.tolist())) for batch in dealt[250:]}


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("settings", "rows", "steps"),
    [
        (ClientSettings(steps=7), 1000, 7),
        (ClientSettings(steps=7, epochs=1.0, batch=32), 100, 4),
        (ClientSettings(epochs=2.0, batch=32), 96, 6),
        (ClientSettings(epochs=0.5, batch=32), 320, 5),
        (ClientSettings(epochs=0.01, batch=32), 5, 1),
        (ClientSettings(epochs=1.0, batch=32), 1, 1),
    ],
)
def test_epochs_win_over_steps_and_at_least_one_step_is_done(
    settings: ClientSettings, rows: int, steps: int
) -> None:
    assert steps_per_round(settings, rows) == steps


# ---------------------------------------------------------------- learning rate


def course(rounds: int, steps: int, **settings: object) -> list[float]:
    chosen = ClientSettings(lr=1.0, **settings)
    return [
        learning_rate(chosen, round, rounds, step, steps)
        for round in range(1, rounds + 1)
        for step in range(steps)
    ]


def test_rates_by_hand() -> None:
    assert course(2, 2, schedule="constant") == [1.0, 1.0, 1.0, 1.0]
    assert course(2, 2, schedule="linear") == [1.0, 0.75, 0.5, 0.25]
    half = math.cos(math.pi / 4) / 2
    assert course(2, 2, schedule="cosine") == pytest.approx([1.0, 0.5 + half, 0.5, 0.5 - half])
    warm = course(2, 4, schedule="linear", warmup=0.5)
    assert warm == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert course(1, 4, schedule="constant", warmup=1.0) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_rates_are_multiples_of_the_peak() -> None:
    peak = ClientSettings(lr=3e-4, schedule="cosine", warmup=0.2)
    whole = ClientSettings(lr=1.0, schedule="cosine", warmup=0.2)
    for round, step in ((1, 0), (2, 4), (5, 1)):
        want = 3e-4 * learning_rate(whole, round, 5, step, 6)
        assert learning_rate(peak, round, 5, step, 6) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3, 0.37])
def test_there_is_one_course_over_all_rounds(schedule: str, warmup: float) -> None:
    """Cut into rounds or not, the rate at the same place is the same: nothing starts again."""
    cut = course(10, 6, schedule=schedule, warmup=warmup)
    whole = course(1, 60, schedule=schedule, warmup=warmup)
    assert cut == pytest.approx(whole, rel=1e-12)
    top = cut.index(max(cut))
    assert cut[: top + 1] == sorted(cut[: top + 1])
    assert cut[top:] == sorted(cut[top:], reverse=True)
    assert top / 60 <= warmup
    assert max(cut) > 0.9
    assert min(cut) > 0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_course_ends_near_zero(schedule: str) -> None:
    assert course(10, 10, schedule=schedule)[-1] <= 0.01 + 1e-12


def test_the_climb_of_each_round_is_extra_and_short() -> None:
    plain = course(3, 5, schedule="linear", warmup=0.2)
    climbed = course(3, 5, schedule="linear", warmup=0.2, round_warmup=2)
    factors = [rate / full for rate, full in zip(climbed, plain, strict=True)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 1] * 3)
