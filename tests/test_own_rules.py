"""Rules of a user's own that have ordinary bugs: one line that says rule, file, line and remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench import Place
from conftest import dense, random_adapter, random_factors

from fedlora.adapter import ClientResult, Factors
from fedlora.adapter_folder import write_folder
from fedlora.answers import answer_problem
from fedlora.cli import main
from fedlora.cli_rules import rule_lines
from fedlora.own_rules import import_rule
from fedlora.rules import LAWS, get_rule, rule_names, traffic, trained
from fedlora.server import ServerState, aggregate

pytest_plugins = ["tiny"]
pytestmark = pytest.mark.usefixtures("no_trace", "as_users_run_it")
Tiny = Callable[[str], Path]
Command = Callable[..., tuple[int, str, str]]
LORA = {"peft_type": "LORA", "target_modules": ["query", "value"], "r": 1, "lora_alpha": 1}
DECLINED = ", ".join(f'{law}="as it comes"' for law in LAWS if law != "mixed_ranks")
HEAD = f'''"""Mine.

Formula: none.
"""

import torch

from fedlora import Factors, Merged, rule
from fedlora.adapter import equal_ranks


@rule(mixed_ranks=True, {DECLINED})
def mine(prev, clients, weights):
    """Mine."""
'''
LINE = HEAD.count("\n")  # the last line of it; the body's first line is the next one
NAN = "return Factors(prev.A + torch.nan, prev.B, prev.scaling)"
BUGS = {  # the body of the rule: what is said, and at which line after the head
    "return None": ("returned None", "return Factors or Merged", -1),
    "return prev.A, prev.B": ("returned a tuple", "return Factors or Merged", -1),
    NAN: ("returned NaN or Inf in A", "", -1),
    "return Factors(prev.A, prev.B.T @ prev.B, prev.scaling)": (
        "returned an increment of", "the layer is", -1,
    ),
    "return Merged(prev, prev.A)": ("returned a Merged with a Tensor as residual", "", -1),
    "return Factors(prev.A.numpy(), prev.B.numpy(), prev.scaling)": (
        "returned a ndarray as A", "tensors of floating-point numbers", -1,
    ),
    "return prev.nothing": ("AttributeError: 'Factors' object has no attribute 'nothing'", "", 1),
    "return Factors(torch.stack([c.A for c in [prev.A.T, prev]]), 1)": ("AttributeError", "", 1),
    "torch.linalg.svd(prev.A + torch.nan)": ("LinAlgError", "", 1),
    "return Factors(prev.A.T, prev.B, 1.0)": ("do not make a product B @ A", "", 1),
    "\n    equal_ranks(prev, [Factors(prev.A[:1], prev.B[:, :1], 1.0)])": (
        "equal ranks are needed here", "", 2,
    ),
}  # fmt: skip


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """The adapters a and b of rank 2, in other scalings."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        write_folder(folder, random_adapter(seed, 2, 1.0 + seed), LORA)
    return folders


def written(folder: Path, body: str) -> str:
    """A file with this body for its rule, and the rule's name."""
    (folder / "b_mine.py").write_text(f"{HEAD}    {body}\n")
    return f"{folder / 'b_mine.py'}:mine"


@pytest.mark.parametrize("body", BUGS, ids=[says for says, _, _ in BUGS.values()])
def test_an_ordinary_bug_of_a_rule_is_told_in_one_line(
    tmp_path: Path, pair: list[Path], command: Command, body: str
) -> None:
    says, remedy, after = BUGS[body]
    reference = written(tmp_path, body)
    code, out, err = command("merge", *pair, "--rule", reference, "--dry-run")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "rule 'mine'" in err
    assert "block.query" in err
    assert f"b_mine.py, line {LINE + after}" in err
    assert says in err
    assert remedy in err


@pytest.mark.parametrize("body", ["return None", NAN, "return prev.nothing"])
def test_a_run_tells_the_same_before_anybody_trains(
    tiny: Tiny, tmp_path: Path, command: Command, body: str
) -> None:
    place = Place(tiny("bert"), tmp_path)
    reference, config = written(tmp_path, body), tmp_path / "own.toml"
    config.write_text(place.config("own").toml().replace('"fra"', f'"{reference}"'))
    code, _, err = command("run", config)
    assert code == 2
    assert err.count("\n") == 1
    assert "b_mine.py, line" in err
    assert not (tmp_path / "own").exists()


def test_a_refusal_in_a_program_names_the_rule() -> None:
    prev = random_factors(1)
    with pytest.raises(ValueError, match=r"rule 'fedavg': .* equal ranks"):
        get_rule("fedavg")(prev, [random_factors(2, r=2), prev], [0.5, 0.5])


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        ("plan=lambda round, memory: memory['nothing'], ", "KeyError: 'nothing'"),
        ("reweigh=lambda sent, results, weights: weights.nothing, ", "AttributeError: "),
    ],
)
def test_a_bug_in_a_hook_is_told_too(
    tmp_path: Path, pair: list[Path], command: Command, hook: str, says: str
) -> None:
    (tmp_path / "h.py").write_text(HEAD.replace("@rule(", f"@rule({hook}") + "    return prev\n")
    code, _, err = command("merge", *pair, "--rule", f"{tmp_path / 'h.py'}:mine", "--dry-run")
    assert code == 2
    assert says in err
    assert f"h.py, line {LINE - 2}" in err


@pytest.mark.parametrize(
    ("option", "says"),
    [("cut=1", "has no type"), ("cut: int", "has no default"), ("cut: int = 1", "")],
)
def test_an_option_needs_a_type_and_a_default(tmp_path: Path, option: str, says: str) -> None:
    text = HEAD.replace("weights):", f"weights, *, {option}):") + "    return prev\n"
    (tmp_path / "o.py").write_text(text)
    if says:
        with pytest.raises(
            ValueError, match=rf"o\.py failed: .*option 'cut' of rule 'mine' {says}"
        ):
            import_rule(f"{tmp_path / 'o.py'}:mine")
    else:
        import_rule(f"{tmp_path / 'o.py'}:mine")
        assert get_rule(f"{tmp_path / 'o.py'}:mine").name == "mine"


def test_a_file_that_cannot_be_run_says_at_which_line(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("x = 1\n\ny = x.nothing\n")
    with pytest.raises(ValueError, match=r"r\.py failed: AttributeError: .* \(r\.py, line 3\)"):
        import_rule(f"{tmp_path / 'r.py'}:mine")
    (tmp_path / "s.py").write_text("x = 1\ny = = 2\n")
    with pytest.raises(ValueError, match=r"s\.py failed: .*\(s\.py, line 2\)$"):
        import_rule(f"{tmp_path / 's.py'}:mine")


@pytest.mark.parametrize("command_name", ["rules", "run", "merge"])
def test_a_file_without_a_name_names_its_rules(
    tmp_path: Path,
    pair: list[Path],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    command_name: str,
) -> None:
    written(tmp_path, "return prev")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text('[merge]\nrule = "./b_mine.py"\n')
    arguments: dict[str, list[object]] = {
        "rules": ["./b_mine.py"],
        "run": ["c.toml"],
        "merge": [*pair, "--dry-run", "--rule", "./b_mine.py"],
    }
    code, _, err = command(command_name, *arguments[command_name])
    assert code == 2
    assert "names a file and no rule in it; it registers mine: write " in err
    assert "b_mine.py:mine" in err


def test_an_answer_in_another_scaling_is_the_same_increment_to_everybody(tmp_path: Path) -> None:
    """What is sent carries no scaling, so the server writes it in the layer's own."""
    reference = written(tmp_path, "return Factors(prev.A, 8 * prev.B, prev.scaling / 8)")
    import_rule(reference)
    start = random_adapter(1, 2, 4.0)
    results = [
        ClientResult(name, random_adapter(seed, 2, 4.0), 1) for seed, name in enumerate("ab")
    ]
    after = aggregate(get_rule(reference), ServerState(start), results, 1).adapter
    for name, factors in after.layers.items():
        assert factors.scaling == 4.0
        torch.testing.assert_close(dense(factors), dense(start.layers[name]))


@pytest.mark.parametrize(("odd", "says"), [(1e308, ""), (torch.inf, "NaN or Inf in B")])
def test_large_numbers_are_finite_and_infinite_ones_of_either_sign_are_not(
    odd: float, says: str
) -> None:
    """Of which the sum is Inf or NaN in all cases."""
    prev = random_factors(1)
    B = prev.B.clone()
    B[:3, 0] = B.new_tensor([odd, odd, -odd if says else odd])
    assert answer_problem(Factors(prev.A, B, prev.scaling), prev)[0] == says


# ---------------------------------------------------------------- what a rule is given


@pytest.mark.parametrize("name", rule_names())
@pytest.mark.parametrize(("m", "n"), [(7, 4), (6, 5), (5, 7)])
def test_clients_of_another_layer_are_refused_with_their_place(name: str, m: int, n: int) -> None:
    prev = random_factors(1, 7, 5)
    clients = [random_factors(2, 7, 5), random_factors(3, m, n)]
    with pytest.raises(ValueError, match=rf"clients\[1\] .* {m} x {n}.* prev .* 7 x 5"):
        get_rule(name)(prev, clients, [0.5, 0.5])


def test_what_is_no_factors_is_refused_with_its_place() -> None:
    prev = random_factors(1)
    with pytest.raises(ValueError, match=r"clients\[1\] is a Tensor: give Factors"):
        get_rule("fra")(prev, [prev, prev.A], [0.5, 0.5])  # type: ignore[list-item]


def test_numbers_beyond_the_wanted_dtype_are_refused_in_a_dry_run_too(
    tmp_path: Path, command: Command
) -> None:
    big = random_adapter(1, 2, 1.0)
    layers = {name: Factors(f.A * 1e5, f.B * 1e5, f.scaling) for name, f in big.layers.items()}
    write_folder(tmp_path / "big", type(big)(layers, big.dense), LORA)
    code, _, err = command("merge", tmp_path / "big", "--dtype", "float16", "--dry-run")
    assert code == 2
    assert "beyond torch.float16: it is not written; take the dtype bfloat16 or float32" in err
    assert "block." in err
    code, out, _ = command("merge", tmp_path / "big", "--dtype", "bfloat16", "--dry-run")
    assert (code, "energy kept: 99.9" in out) == (0, True)


# ---------------------------------------------------------------- the list of rules


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_list_of_rules_fits_the_page_and_cuts_no_word_off(width: int) -> None:
    lines = rule_lines(width)
    assert max(map(len, lines)) <= width
    assert len(lines) < 5 * len(rule_names()) + 10
    text = " ".join(" ".join(lines).split())
    for name in rule_names():
        rule = get_rule(name)
        up, down = traffic(rule)
        assert f"{name} {rule.summary} trains {trained(rule)}" in text
        assert f"; up {up}; down {down}" in text
        assert name in {line.partition(" ")[0] for line in lines}
    assert "…" not in text
