"""Every rule and every policy in whole runs of a tiny model: what is saved, and the same bits
twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Place, adapter_bytes, records
from conftest import same_adapters
from tiny import logits, tokens

from fedlora.cli import main
from fedlora.config import load_config, make_config
from fedlora.display import start_line
from fedlora.model import load_adapter, read_adapter
from fedlora.own_rules import import_rule
from fedlora.predictor import load_predictor
from fedlora.rules import get_rule, rule_names, traffic

pytest_plugins = ["tiny"]
pytestmark = pytest.mark.usefixtures("no_trace")
Tiny = Callable[[str], Path]
MEDIAN = '''"""The coordinate-wise median of the factors.

Formula: A = median(A_k), B = median(B_k), entry by entry.
"""

import torch

from fedlora import Factors, rule


@rule(
    exact="a median is no mean", linear="a median is not linear",
    mixed_ranks="a median needs equal ranks", equivariant="a median depends on coordinates",
    weighted="weights are not looked at", idempotent=True, steady=True,
)
def median(prev, clients, weights):
    """The median of each factor."""
    A = torch.stack([client.A for client in clients]).median(dim=0).values
    B = torch.stack([client.B for client in clients]).median(dim=0).values
    return Factors(A, B, prev.scaling)
'''


@pytest.fixture
def place(tiny: Tiny, tmp_path: Path) -> Place:
    return Place(tiny("bert"), tmp_path)


def saved(run: Path) -> list[Path]:
    """The adapter folders of a run: one for all, or one per client."""
    own = sorted(path for path in (run / "adapter").iterdir() if path.is_dir())
    return own or [run / "adapter"]


@pytest.mark.parametrize("rule", rule_names())
def test_every_rule_runs_and_gives_the_same_bytes_twice(place: Place, rule: str) -> None:
    """Three rounds, so that a residual is folded twice and every turn comes; personal ones too."""
    first, second = (place.run(name, merge__rule=rule, run__rounds=3) for name in ("one", "two"))
    clients = [folder.name for folder in saved(first)] if rule == "fedsa" else [""]
    assert len(clients) == (3 if rule == "fedsa" else 1)
    for client in clients:
        kind = f"adapter/{client}" if client else "adapter"
        assert adapter_bytes(first, kind) == adapter_bytes(second, kind)
        config, model = load_predictor(first, client)
        assert config.merge.rule == rule
        assert torch.isfinite(logits(model.network, tokens(model, ["the film was good"]))).all()
    figures = [record["merge"] for record in records(first)[1:]]
    assert all("merge_error" in figure for figure in figures)
    folds = get_rule(rule).residual[:1] == ("fold",)
    assert all((figure.get("frozen_rank", 0) > 0) == folds for figure in figures)


@pytest.mark.parametrize("rule", rule_names())
def test_the_bytes_of_a_run_are_those_of_the_rules_formulas(place: Place, rule: str) -> None:
    """q and v of two layers, 32 x 32, rank 3; the head of 66 numbers; float32; three clients."""
    log = records(place.run(merge__rule=rule, run__rounds=3))
    head = 0 if rule == "fedsa" else 66
    for record in log[1:]:
        f = log[record["round"] - 1]["merge"].get("frozen_rank", 0)
        numbers = {"m": 32, "n": 32, "r": 3, "r_k": 3, "f": f}
        for way, formula in zip(("bytes_up", "bytes_down"), traffic(get_rule(rule)), strict=True):
            phases = formula.split(", then ")  # no rule changes its ways by itself in three rounds
            turns = phases[0].removesuffix(" in turn").split(", ")
            text = turns[(record["round"] - 1) % len(turns)]
            want = eval(re.sub(r"(?<=\w) (?=[\w(])", " * ", text), {}, numbers)
            folded = "f (" in text
            got = record[way] / 4 / 3 - head
            assert got == 4 * want if not folded else got <= 4 * want


def test_after_the_switch_of_a_run_clients_send_b_alone(place: Place) -> None:
    log = records(place.run(merge__rule="hybrid", merge__options={"switch": 1}, run__rounds=3))
    A = B = 4 * 3 * 32
    assert [r["bytes_up"] / 4 / 3 - 66 for r in log[1:]] == [A + B, B, B]
    assert [r["budget"]["new"] == 0 for r in log[1:]] == [False, True, True]
    assert log[3]["budget"]["row_angle"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"client__ranks": [1, 2, 3]},
        {"client__ranks": [1, 3], "merge__rule": "flora"},
        {"client__ranks": [1, 2, 3], "merge__rule": "hetlora"},
        {"client__ranks": [1, 2, 3], "merge__rule": "raflora", "client__optimiser": "transport"},
        {"merge__residual": "fold", "merge__fold_rank": 2},
        {"merge__residual": "carry"},
        {"merge__server_lr": 0.5},
        {"merge__robust": "norm_clipping"},
        {"merge__robust": "geometric_median"},
        {"client__prox": 0.1},
        {"client__optimiser": "transport"},
        {"merge__options": {"gauge": "aligned"}, "client__optimiser": "keep"},
        {"model__rslora": True, "client__ranks": [1, 2, 3], "merge__residual": "fold"},
    ],
    ids=lambda changes: "-".join(f"{k.partition('__')[2]}={v}" for k, v in changes.items()),
)
def test_a_policy_changes_the_result_and_gives_the_same_bytes_twice(
    place: Place, changes: dict[str, object]
) -> None:
    plain = place.run("plain", **{k: v for k, v in changes.items() if k == "merge__rule"})
    first, second = (place.run(name, **changes) for name in ("one", "two"))
    assert adapter_bytes(first) == adapter_bytes(second)
    assert adapter_bytes(first) != adapter_bytes(plain)
    _, model = load_predictor(first)
    adapter = load_adapter(model, first / "adapter")
    assert same_adapters(read_adapter(model, adapter), adapter)


@pytest.mark.parametrize(("robust", "said"), [("none", False), ("multi_krum", True)])
def test_robust_merging_of_few_clients_says_that_it_protects_nobody(
    place: Place, robust: str, said: bool
) -> None:
    heard: dict[str, Any] = {}
    place.run("run", lambda event, facts: heard.setdefault(event, facts), merge__robust=robust,
              run__rounds=1)  # fmt: skip
    assert ["protects nobody" in note for note in heard["start"]["notes"]] == [True] * said
    assert "protects nobody" in start_line(heard["start"]) or not said


# ---------------------------------------------------------------- a rule of one's own


def test_a_rule_of_ones_own_comes_from_a_file_on_the_command_line(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place.folder
    (folder / "mine.py").write_text(MEDIAN)
    config = place.config("own")
    (folder / "own.toml").write_text(config.toml().replace('"fra"', '"./mine.py:median"'))
    monkeypatch.setattr("sys.argv", ["fedlora", "run", str(folder / "own.toml")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    loaded, _ = load_predictor(folder / "own")
    assert loaded.merge.rule == f"{folder / 'mine.py'}:median"
    assert get_rule(loaded.merge.rule).doc.startswith("The coordinate-wise median")
    assert (folder / "own" / "report.png").is_file()
    assert (folder / "own" / "rule.py").read_text() == MEDIAN  # the run can be redone
    card = (folder / "own" / "adapter" / "README.md").read_text()
    assert "merge rule **median**" in card
    assert str(folder) not in card


def test_an_option_that_the_rule_refuses_is_found_before_anything_is_written(place: Place) -> None:
    with pytest.raises(ValueError, match=r"rule 'fedrot', layer .*: strength 3\.0 is outside"):
        place.job(merge__rule="fedrot", merge__options={"strength": 3.0})
    assert not (place.folder / "run").exists()


def test_a_config_that_does_not_come_from_the_command_line_runs_no_file(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemError('it ran')")
    (tmp_path / "c.toml").write_text('[merge]\nrule = "./evil.py:evil"\n')
    for read in (
        lambda: load_config(tmp_path / "c.toml"),
        lambda: make_config({"merge.rule": f"{tmp_path / 'evil.py'}:evil"}),
    ):
        with pytest.raises(ValueError, match="on the local command line only"):
            read()
    assert load_config(tmp_path / "c.toml", merges=False).merge.rule.endswith("evil.py:evil")
    with pytest.raises(ValueError, match=r"evil\.py failed: .*it ran \(evil\.py, line 1\)"):
        load_config(tmp_path / "c.toml", own_rule=import_rule)


@pytest.mark.parametrize(
    ("text", "reference", "says"),
    [
        (None, "none.py:rule", "there is no file .*none.py"),
        ("x = 1", "empty.py:mine", "registers none at all: put @rule"),
        (
            MEDIAN.replace("median(", "middle("),
            "m.py:midle",
            "no rule 'midle'.*did you mean 'middle'",
        ),
        (
            "import nonsense_that_is_not_there",
            "b.py:x",
            "b.py failed: ModuleNotFoundError: No module named",
        ),
    ],
)
def test_a_file_without_the_rule_is_refused(
    tmp_path: Path, text: str | None, reference: str, says: str
) -> None:
    if text is not None:
        (tmp_path / reference.partition(":")[0]).write_text(text)
    with pytest.raises(ValueError, match=says):
        import_rule(f"{tmp_path}/{reference}")
