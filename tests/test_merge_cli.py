"""`fedlora merge`: what it prints, writes and refuses, its card and its figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import dense, normal, random_adapter
from peft_adapters import make_adapter, reconfigure

import fedlora
from fedlora import merge_command
from fedlora.adapter import Adapter, Factors
from fedlora.adapter_folder import open_folder, write_folder
from fedlora.canvas import render
from fedlora.cli import main
from fedlora.merge_card import counted, model_card, natural, percent, shortened, summary
from fedlora.merging import Outcome, merge_folders
from fedlora.rules import LAWS, get_rule
from fedlora.spectra import draw_spectra

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
PLAIN = {"peft_type": "LORA", "target_modules": ["query", "value"], "r": 1, "lora_alpha": 1}
Merge = Callable[..., tuple[int, str, str]]


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders a, b and c of ranks 2, 3 and 1 in the working folder."""
    for name, seed, rank, scaling in (("a", 1, 2, 4.0), ("b", 2, 3, 0.5), ("c", 3, 1, 1.0)):
        adapter = random_adapter(seed, rank, scaling)
        settings = PLAIN | {"base_model_name_or_path": "org/base: 7b"}
        write_folder(tmp_path / name, adapter, settings)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Merge:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedlora", "merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_the_command_of_the_readme_merges_and_says_what_it_did(three: Path, merge: Merge) -> None:
    code, out, err = merge("a/", "b/", "c/", "--rank", 2, "--weights", "3,1,1", "-o", "out/")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:3] == [
        " 0.6000  a: rank 2, scaling 4, float32",
        " 0.2000  b: rank 3, scaling 0.5, float32",
        " 0.2000  c: rank 1, scaling 1, float32",
    ]
    assert lines[3] == "merged by fra: 2 layers of rank 2, float32"
    assert lines[4].startswith("energy kept: 9")
    assert "block.query: rank 2; 99 % would take rank " in out
    assert lines[-2].startswith("rank that holds 99 % over all layers: ")
    assert lines[-1] == "written to out"
    written = sorted(file.name for file in Path("out").iterdir())
    assert written == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_a_merged_folder_is_what_the_function_writes(three: Path, merge: Merge) -> None:
    merge("a", "b", "c", "--rank", "auto:0.9", "--dtype", "bfloat16", "-o", "out")
    outcome = merge_folders(
        ["a", "b", "c"], get_rule("fra"), "twin", rank="auto:0.9", dtype=torch.bfloat16
    )
    for file in Path("twin").iterdir():
        assert (Path("out") / file.name).read_bytes() == file.read_bytes()
    assert Path("out/README.md").read_text() == model_card(outcome)


def test_a_dry_run_prints_the_same_and_writes_nothing(three: Path, merge: Merge) -> None:
    before = sorted(three.rglob("*"))
    _, dry, _ = merge("a", "b", "--rank", 2, "--dry-run")
    _, named, _ = merge("a", "b", "--rank", 2, "--dry-run", "--report", "-o", "out")
    assert sorted(three.rglob("*")) == before
    _, wet, _ = merge("a", "b", "--rank", 2, "-o", "out")
    assert dry == named
    assert dry.splitlines()[-1] == "nothing was written (--dry-run)"
    assert dry.splitlines()[:-1] == wet.splitlines()[:-1]


def test_options_reach_the_rule(three: Path, merge: Merge) -> None:
    code, _, _ = merge("a", "b", "--option", "rank=1", "--option", "gauge=orthonormal", "-o", "out")
    assert code == 0
    A = open_folder("out").factors("block.query").A
    assert A.shape == (1, 5)
    assert float(A.norm()) == pytest.approx(1, abs=1e-6)
    assert "**fra** (gauge = orthonormal, rank = 1)" in Path("out/README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "fraa"], "unknown rule 'fraa'; did you mean 'fra'?"),
        (["--rule", "ffa"], "rule 'ffa' cannot merge finished adapters"),
        (["--rule", "fedavg"], "rule 'fedavg' takes one rank only"),
        (["--option", "gauge=balancd"], "option 'gauge' of rule 'fra' is 'balancd', "),
        (["--option", "gauche=balanced"], "no option 'gauche'; did you mean 'gauge'?"),
        (["--option", "gauge"], "--option 'gauge' is not of the form KEY=VALUE"),
        (["--option", "rank=[1]"], "a rule's option is a number, a text, true or false"),
        (["--rank", "0"], "rank '0' is neither a whole number above 0 nor auto:SHARE"),
        (["--rank", "9"], "rank 9 is above what layer 'block.query' of shape 7 x 5 can have"),
        (["--weights", "1,2,3"], "3 weights for 2 adapters"),
        (["--weights", "1,x"], "--weights '1,x' is no list of numbers"),
        (["--weights", "1,"], "is no list of numbers"),
        (["--weights", "1,true"], "is no list of numbers"),
        (["--weights", "nan,1"], "weight nan is not a finite number"),
        (["--weights=-1,2"], "weight -1.0 is not a finite number >= 0"),
        (["--weights", "0,0"], "the weights sum to 0"),
        (["--dtype", "float31"], "unknown dtype 'float31'; did you mean 'float32'?"),
        (["-o", "c"], "c exists already; nothing was written"),
        (["-o", "c", "--dry-run"], "c exists already"),
        (["nowhere"], "there is no adapter folder nowhere"),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_a_mistake_is_one_line_and_exit_code_2_and_nothing_is_written(
    three: Path, merge: Merge, arguments: list[str], message: str
) -> None:
    before = sorted(three.rglob("*"))
    place = [] if "-o" in arguments else ["-o", "out"]
    code, out, err = merge("a", "b", *place, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(three.rglob("*")) == before


def test_a_place_to_write_is_asked_for(three: Path, merge: Merge) -> None:
    code, _, err = merge("a", "b")
    assert code == 2
    assert "--out is missing: name the new folder to write, or say --dry-run" in err


@pytest.mark.parametrize("again", ["a", "a/", "./a", "link"])
def test_the_same_folder_twice_is_refused(three: Path, merge: Merge, again: str) -> None:
    (three / "link").symlink_to("a")
    code, out, err = merge("a", "b", again, "-o", "out")
    assert (code, out) == (2, "")
    assert f"adapter {Path(again)} is given twice" in err
    assert "say with --weights how much it counts" in err
    assert not Path("out").exists()


def test_a_run_directory_is_answered_with_the_adapters_in_it(three: Path, merge: Merge) -> None:
    for place in ("run/adapter", "own/adapter/north", "own/adapter/south"):
        (three / place).parent.mkdir(parents=True, exist_ok=True)
        write_folder(three / place, random_adapter(1), PLAIN)
    code, _, err = merge("a", "run", "-o", "out")
    assert code == 2
    assert "run is a run directory and no adapter: did you mean run/adapter?" in err
    _, _, err = merge("a", "own", "-o", "out")
    assert "did you mean own/adapter/north or own/adapter/south?" in err


def test_bases_of_other_names_need_a_word(three: Path, merge: Merge) -> None:
    reconfigure(Path("b"), base_model_name_or_path="org/renamed")
    code, _, err = merge("a", "b", "-o", "out")
    assert code == 2
    assert "b is an adapter of another base" in err
    assert "--other-base" in err
    assert merge("a", "b", "--other-base", "-o", "out")[0] == 0


def test_without_matplotlib_a_figure_is_refused_before_the_merge(
    three: Path, merge: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = merge("a", "b", "--report", "-o", "out")
    assert code == 2
    assert "--report: figures need matplotlib" in err
    assert not Path("out").exists()


@pytest.mark.slow
def test_a_rule_of_ones_own_file_merges(three: Path) -> None:
    """In a process of its own: a rule once registered stays."""
    laws = ", ".join(f'{law}="as it comes"' for law in LAWS if law != "mixed_ranks")
    Path("mine.py").write_text(
        "from fedlora.rules import rule\n"
        f"@rule(mixed_ranks=True, {laws})\n"
        "def last(prev, clients, weights):\n"
        '    """The last client."""\n'
        "    return clients[-1]\n"
    )
    command = [sys.executable, "-m", "fedlora", "merge", "a", "b", "-o", "out"]
    root = Path(fedlora.__file__).parent.parent
    subprocess.run(
        [*command, "--rule", "./mine.py:last"],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    written, given = open_folder("out").factors("block.query"), open_folder("b")
    torch.testing.assert_close(dense(written), dense(given.factors("block.query")))


def test_an_interrupted_merge_leaves_nothing(
    three: Path, merge: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(outcome: Outcome, figure: str = "") -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_command, "model_card", stopped)
    before = sorted(three.rglob("*"))
    code, _, err = merge("a", "b", "-o", "out")
    assert (code, err) == (130, "fedlora: interrupted; nothing was written\n")
    assert sorted(three.rglob("*")) == before


def test_a_number_of_threads_that_was_set_comes_back(three: Path) -> None:
    torch.set_num_threads(2)
    try:
        merge_command.merged([Path("a")], None, rule="fra", dry_run=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_adapters_of_a_real_model_merge_on_the_command_line(
    tiny: Tiny, tmp_path: Path, merge: Merge
) -> None:
    lora = {"target_modules": ["c_attn"]}
    folders = [make_adapter(tiny("gpt2"), tmp_path / f"{n}", n, **lora) for n in (1, 2)]
    code, out, _ = merge(*folders, "-o", tmp_path / "out")
    assert code == 0
    assert "2 layers of rank 3" in out
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"]


# ---------------------------------------------------------------- the card and the words


@pytest.fixture
def outcome(three: Path) -> Outcome:
    return merge_folders(["a", "b", "c"], get_rule("fra"), rank=2, weights=[3, 1, 1])


def test_the_card_says_what_was_merged_and_names_no_place(outcome: Outcome, three: Path) -> None:
    card = model_card(outcome, figure="spectra.png")
    assert card.startswith('---\nbase_model: "org/base: 7b"\nlibrary_name: peft\n')
    assert "| `a` | 0.6 | 2 | 4 | float32 |" in card
    assert "| `c` | 0.2 | 1 | 1 | float32 |" in card
    assert "rule **fra**: The truncated SVD" in card
    assert "(spectra.png)" in card
    assert str(three) not in card


def test_many_adapters_are_summed_up_in_one_line(three: Path) -> None:
    outcome = merge_folders(["a", "b", "c"] * 3, get_rule("fra"))
    assert summary(outcome)[0] == (
        "9 adapters, weights 0.111111: rank 1 to 3, scaling 0.5 to 4, float32"
    )


def test_layers_that_lost_nothing_are_not_listed(three: Path) -> None:
    lines = summary(merge_folders(["a"], get_rule("fra")))
    assert lines[2:] == [
        "energy kept: 100 % of the averaged increment",
        "rank that holds 99 % over all layers: 2",
    ]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (1.0, "100 %"),
        (1 - 1e-14, "100 %"),
        (0.5, "50.00 %"),
        (0.99996, "100.00 %"[:0] + "99.996 %"),
        (1 - 1e-9, "99.9999999 %"),
        (-0.5, "-50.00 %"),
    ],
)
def test_a_share_shows_as_many_nines_as_it_has(share: float, text: str) -> None:
    assert percent(share) == text


def test_words_for_ranks_layers_and_names() -> None:
    assert (counted([8, 8]), counted([16, 4, 8]), counted([0.5])) == ("8", "4 to 16", "0.5")
    names = ["m.layers.10.q", "m.layers.9.q", "m.layers.9.k"]
    assert sorted(names, key=natural) == ["m.layers.9.k", "m.layers.9.q", "m.layers.10.q"]
    assert shortened(names) == ["10.q", "9.q", "9.k"]
    assert shortened(["m.q"]) == ["q"]
    assert shortened(["m.q", "m.q.v"]) == ["q", "q.v"]


# ---------------------------------------------------------------- the figure


def test_the_figure_is_written_and_named_in_the_card(three: Path, merge: Merge) -> None:
    code, _, _ = merge("a", "b", "c", "--report", "--rank", 2, "-o", "out")
    assert code == 0
    assert Path("out/spectra.png").read_bytes()[:4] == b"\x89PNG"
    assert "fra of 3 adapters, 2 layers" in Path("out/spectra.svg").read_text()
    assert "(spectra.png)" in Path("out/README.md").read_text()


def test_the_figure_shows_the_outcomes_numbers(outcome: Outcome) -> None:
    left, right = draw_spectra(outcome).axes
    lines = {line.get_label().partition(" ")[0]: line for line in left.get_lines()}
    for layer in outcome.layers:
        drawn = torch.tensor(lines[layer.name.rpartition(".")[2]].get_ydata())
        torch.testing.assert_close(drawn, layer.values / layer.values[0])
    assert {line.get_xdata()[0] for line in left.get_lines()} >= {2.5}
    spots = sorted(float(y) for spot in right.collections[:1] for _, y in spot.get_offsets())
    assert spots == sorted(layer.rank_for(0.99) for layer in outcome.layers)


def many_layers(folder: Path, count: int) -> Outcome:
    layers = {
        f"model.layers.{index // 7}.module_{index % 7}": Factors(
            normal(index, 8, 12) * (0.2 + 0.7 * index / count) ** torch.arange(8)[:, None],
            normal(index + 1000, 16, 8),
            1.0,
        )
        for index in range(count)
    }
    settings = PLAIN | {"target_modules": "all-linear"}
    write_folder(folder, Adapter(layers), settings)
    return merge_folders([folder], get_rule("fra"), rank=4)


@pytest.mark.parametrize("count", [1, 200])
def test_nothing_in_the_figure_overlaps_or_is_cut_off(tmp_path: Path, count: int) -> None:
    figure = draw_spectra(many_layers(tmp_path / "a", count))
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    page = figure.bbox
    boxes = [legend.get_window_extent(renderer) for legend in figure.legends]
    boxes += [ax.get_tightbbox(renderer) for ax in figure.axes]
    boxes += [text.get_window_extent(renderer) for text in figure.texts]
    for index, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= page.x1
        assert box.y1 <= page.y1
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
    assert len(figure.legends[0].get_texts()) == min(count, 5)


def test_the_same_outcome_gives_the_same_picture(outcome: Outcome) -> None:
    assert render(draw_spectra(outcome), "svg") == render(draw_spectra(outcome), "svg")
