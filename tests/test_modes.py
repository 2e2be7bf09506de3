"""The modes of a run and the ways with the head, each against its rounds done by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bench import ALL, Place, records, summary
from conftest import same_adapters
from safetensors.torch import load_file

from fedlora.adapter import PARTS, Adapter, ClientState, flatten
from fedlora.client import make_fit
from fedlora.model import load_adapter
from fedlora.recording import Job
from fedlora.run import execute

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]


@pytest.fixture
def place(tiny: Tiny, tmp_path: Path) -> Place:
    return Place(tiny("bert"), tmp_path)


def alone(job: Job, client: str, rounds: int = 2) -> Adapter:
    """The client's rounds by hand, one after another, optimiser kept."""
    fit = make_fit(job.model, job.data, job.config)
    adapter, state = job.start, ClientState()
    for round in range(1, rounds + 1):
        result = fit(client, round, ALL, adapter, state)
        adapter, state = result.adapter, result.state
    return adapter


def test_central_takes_the_same_steps_on_batches_of_all_clients(place: Place) -> None:
    folder = place.run(run__mode="central")
    log = records(folder)
    assert list(log[-1]["clients"]) == ["central"]
    client = log[-1]["clients"]["central"]
    assert (client["steps"], client["examples"], client["evaluation"]) == (3, 36, None)
    assert (log[-1]["merge_error"], log[-1]["bytes_up"], log[-1]["bytes_down"]) == (None, 0, 0)
    by_hand = place.job("hand", client__batch=12, client__optimiser="keep")
    rows = np.sort(np.concatenate(list(by_hand.data.rows.values())))
    data = replace(by_hand.data, rows={"central": rows}, heldout={"central": rows[:0]})
    want = alone(replace(by_hand, data=data), "central")
    assert same_adapters(load_adapter(by_hand.model, folder / "adapter"), want)


def test_local_leaves_each_client_alone_and_exports_them_all(place: Place) -> None:
    folder = place.run(run__mode="local")
    by_hand = place.job("hand", client__optimiser="keep")
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == ["0", "1", "2"]
    for client in ("0", "1", "2"):
        got = load_adapter(by_hand.model, folder / "adapter" / client)
        assert same_adapters(got, alone(by_hand, client))
        assert (folder / "adapter" / client / "README.md").is_file()
    last = records(folder)[-1]
    assert last["global"] is None
    own = [client["evaluation"]["accuracy"] for client in last["clients"].values()]
    assert last["personal"]["accuracy"] == pytest.approx(sum(own) / 3)
    assert summary(folder)["final"] == last["personal"]
    assert summary(folder)["bytes_up_total"] == 0


def test_the_average_head_is_the_mean_by_examples(place: Place) -> None:
    job = place.job(run__rounds=1, partition__by="dirichlet", partition__alpha=2.0)
    fit = make_fit(job.model, job.data, job.config)
    results = [fit(client, 1, ALL, job.start, ClientState()) for client in job.data.rows]
    total = sum(result.examples for result in results)
    assert len({result.examples for result in results}) > 1
    want = sum(
        result.examples / total * result.adapter.dense["classifier.weight"].double()
        for result in results
    )
    saved = load_file(execute(job) / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(saved["base_model.model.classifier.weight"], want.float())


@pytest.mark.parametrize("mode", ["federated", "central", "local"])
def test_a_frozen_head_stays_as_drawn(place: Place, mode: str) -> None:
    job = place.job(merge__head="freeze", run__mode=mode)
    folder = execute(job) / "adapter" / ("0" if mode == "local" else "")
    saved = load_adapter(job.model, folder)
    for name, tensor in job.start.dense.items():
        assert torch.equal(saved.dense[name], tensor)
    assert not any(
        torch.equal(factors.B, job.start.layers[name].B) for name, factors in saved.layers.items()
    )


def test_local_heads_are_exported_on_the_common_layers(place: Place) -> None:
    job = place.job(merge__head="local")
    folder = execute(job)
    saved = {c: load_adapter(job.model, folder / "adapter" / c) for c in ("0", "1", "2")}
    for client, other in (("0", "1"), ("1", "2")):
        for name, tensor in flatten(saved[client], PARTS - {"head"}).items():
            assert torch.equal(tensor, flatten(saved[other])[name])
        head = saved[client].dense["classifier.weight"]
        assert not torch.equal(head, saved[other].dense["classifier.weight"])
    assert summary(folder)["bytes_up_total"] == 2 * 3 * 4 * 2 * 4 * 3 * 32  # A and B alone


def test_updates_of_which_a_part_stays_at_home_are_not_judged_as_a_whole(place: Place) -> None:
    with pytest.raises(ValueError, match="judges whole updates, of which rule 'fedsa' gets a part"):
        place.job("blind", merge__rule="fedsa", merge__robust="norm_clipping")


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"merge__participation": 0.5}, 2),
        ({"run__min_clients": 2}, 3),
        ({"merge__robust_faulty": 2}, 3),
    ],
)
def test_a_round_too_small_for_its_robust_method_is_refused_before_training(
    place: Place, changes: dict[str, object], asked: int
) -> None:
    says = f"'multi_krum' needs . replies in a round: {asked} clients are asked"
    with pytest.raises(ValueError, match=says):
        place.job("small", merge__robust="multi_krum", **changes)
    place.job("fits", merge__robust="multi_krum")
