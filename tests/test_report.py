"""Figures and tables of run directories: what is drawn is what the log says."""

import builtins
import json
import math
from pathlib import Path

import numpy as np
import pytest

from fedlora.figures import draw_comparison, draw_run
from fedlora.report import markdown, write_report
from fedlora.rundir import read_run, rolling_mean

pytest.importorskip("matplotlib")

ACCURACY = [0.5, 0.6, 0.75, 0.7]
CLIENTS = {"0": [0.55, 0.65, 0.72], "1": [0.5, 0.7, 0.74], "10": [0.4, 0.5, 0.6]}


def scores(accuracy: float | None, loss: float = 0.5) -> dict | None:
    if accuracy is None:
        return None
    return {"accuracy": accuracy, "macro_f1": accuracy - 0.1, "loss": loss, "examples": 100}


def personal(clients: list[dict]) -> dict | None:
    """The mean of the clients' accuracies, as where each has an adapter of its own."""
    own = [client["evaluation"] for client in clients]
    return scores(sum(one["accuracy"] for one in own) / len(own)) if own and all(own) else None


def log(accuracy=ACCURACY, clients=CLIENTS, error=0.03, sent=2_000_000) -> list[dict]:
    """One line a round; client k has 100 * (k + 1) examples and training loss 0.4 + 0.1 k."""
    lines = []
    for round, value in enumerate(accuracy):
        taking_part = {
            client: {
                "examples": 100 * (k + 1),
                "steps": 7,
                "train_loss": 0.4 + 0.1 * k,
                "evaluation": scores(values[round - 1]),
                "heldout": scores(0.81) if client == "0" else None,
            }
            for k, (client, values) in enumerate(clients.items() if round else ())
        }
        lines.append(
            {
                "round": round,
                "global": scores(value),
                "personal": personal(list(taking_part.values())) if value is None else None,
                "subset": None,
                "heldout": None,
                "clients": taking_part,
                "merge_error": error if round else None,
                "bytes_up": sent if round else 0,
                "bytes_down": 2 * sent if round else 0,
            }
        )
    return lines


def make_run(
    path: Path, lines=None, *, mode="federated", rule="fra", seed=0, rank=4, summary=None
) -> Path:
    path.mkdir(parents=True)
    (path / "config.toml").write_text(
        f'[run]\nmode = "{mode}"\nname = "{path.name}"\nseed = {seed}\nrounds = 3\n'
        f'[merge]\nrule = "{rule}"\n[adapter]\nrank = {rank}\n'
    )
    text = "".join(json.dumps(line) + "\n" for line in (log() if lines is None else lines))
    (path / "metrics.jsonl").write_text(text)
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


SUMMARY = {
    "labels": ["negative", "positive"],
    "confusion": [[40, 10], [5, 45]],
    "final": {"accuracy": 0.85, "macro_f1": 0.849, "loss": 0.41, "examples": 100},
    "trainable_parameters": 74498,
    "full_finetuning_bytes_total": 547_000_000,
}


def line_of(ax, ending: str):
    (found,) = [line for line in ax.lines if line.get_label().endswith(ending)]
    return found


def words(figure) -> str:
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    legends = [ax.get_legend() for ax in figure.axes if ax.get_legend()]
    texts += [text.get_text() for legend in legends for text in legend.get_texts()]
    return "\n".join([*texts, *(text.get_text() for text in figure.texts)])


def test_the_lines_drawn_are_the_values_of_the_log(tmp_path):
    main, loss, error, moved, _ = draw_run(read_run(make_run(tmp_path / "a", summary=SUMMARY))).axes
    np.testing.assert_array_equal(line_of(main, "global").get_xydata(), [*enumerate(ACCURACY)])
    for client, values in CLIENTS.items():
        want = [*enumerate(values, start=1)]
        np.testing.assert_array_equal(line_of(main, f"client {client}").get_xydata(), want)
    mean_loss = (100 * 0.4 + 200 * 0.5 + 300 * 0.6) / 600
    np.testing.assert_allclose(line_of(loss, "training").get_ydata(), [mean_loss] * 3, rtol=1e-15)
    np.testing.assert_array_equal(line_of(loss, "evaluation").get_ydata(), [0.5] * 4)
    np.testing.assert_array_equal(error.lines[0].get_xydata(), [(1, 0.03), (2, 0.03), (3, 0.03)])
    np.testing.assert_array_equal(line_of(moved, "up 6.0").get_ydata(), [0, 2, 4, 6])
    np.testing.assert_array_equal(line_of(moved, "down 12.0").get_ydata(), [0, 4, 8, 12])


def test_the_page_says_what_was_run_and_how_it_ended(tmp_path):
    text = words(draw_run(read_run(make_run(tmp_path / "demo", summary=SUMMARY))))
    for part in ("demo", "merge rule fra", "3 clients", "3 rounds", "85.0%", "would move 547"):
        assert part in text
    assert "40\n80%" in text  # confusion: 40 of 50 true negatives found


def test_clients_are_in_numerical_order_with_the_last_value_beside_them(tmp_path):
    main = draw_run(read_run(make_run(tmp_path / "a"))).axes[0]
    want = ["70.0%  global", "72.0%  client 0", "74.0%  client 1", "60.0%  client 10"]
    assert [text.get_text() for text in main.get_legend().get_texts()] == want


def test_the_rolling_mean_is_trailing_and_leaves_gaps_out():
    values = np.array([1.0, 2.0, math.nan, 6.0, 8.0])
    want = [1.0, 1.5, math.nan, 4.0, 7.0]  # (2 + 6) / 2 over rounds 1 to 3, then (6 + 8) / 2
    np.testing.assert_array_equal(rolling_mean(values, 3), want)
    np.testing.assert_array_equal(rolling_mean(values, 1), values)
    with pytest.raises(ValueError, match="1 or more, got 0"):
        rolling_mean(values, 0)


def test_a_rolling_mean_leaves_round_0_out_and_keeps_the_raw_points_behind_it(tmp_path):
    main = draw_run(read_run(make_run(tmp_path / "a")), rolling=2).axes[0]
    np.testing.assert_allclose(line_of(main, "global").get_ydata(), [0.5, 0.6, 0.675, 0.725])
    raw = [line for line in main.lines if line.get_label() == "_raw"]
    np.testing.assert_array_equal(raw[0].get_ydata(), ACCURACY)
    assert raw[0].get_linestyle() == "None"
    assert "rolling mean of 2 rounds" in words(main.figure)


def test_rounds_that_were_not_evaluated_are_bridged(tmp_path):
    clients = {"a": [None, None, 0.7], "b": [0.6, None, None]}
    lines = log([0.5, None, None, 0.8], clients)
    main, loss, *_ = draw_run(read_run(make_run(tmp_path / "a", lines)), rolling=2).axes
    np.testing.assert_array_equal(line_of(main, "global").get_xydata(), [(0, 0.5), (3, 0.8)])
    np.testing.assert_array_equal(line_of(main, "%  a").get_xydata(), [(3, 0.7)])
    np.testing.assert_array_equal(line_of(main, "%  b").get_xydata(), [(1, 0.6)])
    assert line_of(loss, "evaluation").get_xdata().tolist() == [0, 3]


def test_a_loss_that_hardly_moves_is_drawn_level_and_one_that_nobody_told_not_at_all(tmp_path):
    lines = log()
    for line in lines:
        line["global"]["loss"] = 0.69315 - 1e-5 * line["round"]
        for client in line["clients"].values():
            client["train_loss"] = None
    loss = draw_run(read_run(make_run(tmp_path / "a", lines))).axes[1]
    low, high = loss.get_ylim()
    assert high - low == pytest.approx(0.01)
    assert low < 0.69312 < 0.69315 < high
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["evaluation"]


def test_a_run_that_was_never_evaluated_is_drawn_and_tabled(tmp_path):
    path = make_run(tmp_path / "a", log([None] * 4, {"0": [None] * 3}, error=None))
    write_report([path])
    assert "| - | - | - | - | - | 6.00 |" in (path / "report.md").read_text()
    write_report([path, make_run(tmp_path / "b")], tmp_path / "both")


def test_a_run_of_one_client_that_sat_out_still_has_its_line(tmp_path):
    lines = log()
    del lines[2]["clients"]["1"]
    main = draw_run(read_run(make_run(tmp_path / "a", lines))).axes[0]
    np.testing.assert_array_equal(line_of(main, "client 1").get_xydata(), [(1, 0.5), (3, 0.74)])


def test_fifty_clients_are_a_bundle_with_a_median_and_three_legend_entries(tmp_path):
    many = {str(k): [0.5 + k / 1000] * 3 for k in range(50)}
    main = draw_run(read_run(make_run(tmp_path / "a", log(clients=many)))).axes[0]
    labels = [text.get_text() for text in main.get_legend().get_texts()]
    assert labels == ["70.0%  global", "50 clients", "52.4%  median of clients"]
    np.testing.assert_allclose(line_of(main, "median of clients").get_ydata(), [0.5245] * 3)
    assert len(main.lines) == 52


def test_a_local_run_shows_the_mean_of_its_clients_and_no_merge(tmp_path):
    lines = log([None] * 4, error=None, sent=0)
    figure = draw_run(read_run(make_run(tmp_path / "a", lines, mode="local")))
    mean = np.mean([*CLIENTS.values()], axis=0)
    drawn = line_of(figure.axes[0], "mean of clients").get_xydata()
    np.testing.assert_allclose(drawn, np.stack([[1, 2, 3], mean], axis=1))
    assert "nothing merged" in words(figure)
    assert "nothing sent" in words(figure)


def test_a_local_run_starts_from_the_common_start_that_all_modes_evaluate(tmp_path):
    lines = log([0.5, None, None, None], error=None, sent=0)
    run = read_run(make_run(tmp_path / "a", lines, mode="local"))
    mean = np.mean([*CLIENTS.values()], axis=0)
    np.testing.assert_allclose(run.evaluation("accuracy"), [0.5, *mean])
    drawn = line_of(draw_run(run).axes[0], "mean of clients").get_ydata()
    np.testing.assert_allclose(drawn, [0.5, *mean])


def test_a_central_run_is_one_line(tmp_path):
    lines = log(clients={"central": ACCURACY[1:]}, error=None, sent=0)
    main = draw_run(read_run(make_run(tmp_path / "a", lines, mode="central"))).axes[0]
    assert [line.get_label() for line in main.lines] == ["70.0%  central"]


def test_an_exact_merge_is_called_exact_and_others_get_a_log_axis_where_needed(tmp_path):
    exact = draw_run(read_run(make_run(tmp_path / "a", log(error=3e-9))))
    assert "exact" in words(exact)
    assert not exact.axes[2].lines
    lines = log()
    lines[1]["merge_error"] = 0.9e-3
    assert draw_run(read_run(make_run(tmp_path / "b", lines))).axes[2].get_yscale() == "log"
    lines[1]["merge_error"] = 0.0
    mixed = draw_run(read_run(make_run(tmp_path / "c", lines))).axes[2]
    assert mixed.get_yscale() == "symlog"
    assert mixed.lines[0].get_ydata().tolist() == [0.0, 0.03, 0.03]


def test_an_interrupted_run_is_reported_without_summary_and_without_its_cut_line(tmp_path):
    path = make_run(tmp_path / "a")
    file = path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    run = read_run(path)
    assert [line["round"] for line in run.rounds] == [0, 1, 2]
    assert run.final("accuracy") == 0.75
    start_alone = make_run(tmp_path / "start", log()[:1])
    assert math.isnan(read_run(start_alone).final("accuracy"))
    figure = draw_run(run)
    assert len(figure.axes) == 4  # no confusion matrix
    assert "2 of 3 rounds so far" in words(figure)


def test_a_broken_earlier_line_is_refused_with_its_place_and_a_remedy(tmp_path):
    path = make_run(tmp_path / "a")
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join([lines[0], lines[1][:30] + "\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*delete this one"):
        read_run(path)
    (path / "metrics.jsonl").write_text("".join([lines[0], lines[2], lines[1]]))
    with pytest.raises(ValueError, match="line 3: its round does not follow"):
        read_run(path)
    (path / "metrics.jsonl").write_text("[1]\n" + lines[0])
    with pytest.raises(ValueError, match="line 1: not an object with clients"):
        read_run(path)


def test_what_is_not_a_run_directory_is_refused_and_near_ones_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere' is not a run directory.*config\.toml"):
        read_run(tmp_path / "nowhere")
    make_run(tmp_path / "inner")
    with pytest.raises(FileNotFoundError, match=r"did you mean .*inner"):
        read_run(tmp_path)
    (make_run(tmp_path / "empty") / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no whole round yet"):
        read_run(tmp_path / "empty")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.toml", "[run\n", r"config\.toml: .*restore"),
        ("config.toml", "run = 3\n", "mode is None; it must be one of federated, central, local"),
        ("config.toml", '[run]\nmode = "federated"\n', "rule; restore"),
        ("summary.json", '{"labels": ', r"summary\.json: .*restore"),
        ("summary.json", "3", r"summary\.json: .*restore"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, file, text, message):
    (make_run(tmp_path / "a") / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "a")


def test_seeds_of_one_method_become_their_mean_with_a_band(tmp_path):
    runs = [
        read_run(make_run(tmp_path / f"s{seed}", log([0.5, 0.6, top]), seed=seed))
        for seed, top in enumerate((0.7, 0.8, 0.9))
    ]
    other = read_run(make_run(tmp_path / "avg", log([0.5, 0.6, 0.65]), rule="fedavg"))
    main, _, _, traffic = draw_comparison([other, *runs]).axes
    np.testing.assert_allclose(line_of(main, "fra, 3 seeds").get_ydata(), [0.5, 0.6, 0.8])
    np.testing.assert_array_equal(line_of(traffic, "fedavg").get_xdata(), [0, 6, 12])
    band = main.collections[0].get_paths()[0].vertices
    assert band[band[:, 0] == 2][:, 1].min() == 0.7
    assert band[band[:, 0] == 2][:, 1].max() == 0.9
    labels = [text.get_text() for text in main.get_legend().get_texts()]
    assert labels == ["80.0%  fra, 3 seeds", "65.0%  fedavg"]  # best first


def test_runs_of_one_rule_with_other_settings_are_not_averaged(tmp_path):
    runs = [read_run(make_run(tmp_path / f"r{r}", rank=r, seed=r)) for r in (4, 8)]
    labels = [line.get_label() for line in draw_comparison(runs).axes[0].lines]
    assert labels == ["70.0%  fra, rank 4", "70.0%  fra, rank 8"]


def test_a_mean_over_seeds_covers_only_rounds_that_all_of_them_have(tmp_path):
    full = read_run(make_run(tmp_path / "full"))
    short = read_run(make_run(tmp_path / "short", log()[:3], seed=1))
    main = draw_comparison([full, short]).axes[0]
    assert line_of(main, "2 seeds").get_xdata().tolist() == [0, 1, 2]


def test_what_sends_nothing_is_a_level_line_against_traffic(tmp_path):
    lines = log([None] * 4, error=None, sent=0)
    local = read_run(make_run(tmp_path / "local", lines, mode="local"))
    traffic = draw_comparison([read_run(make_run(tmp_path / "fra")), local]).axes[3]
    want = np.mean([values[-1] for values in CLIENTS.values()])
    np.testing.assert_allclose(line_of(traffic, "local").get_ydata(), [want, want])


def test_the_table_holds_the_values_of_the_log_and_the_summary(tmp_path):
    run = read_run(make_run(tmp_path / "a|b", summary=SUMMARY))
    head, _, row, _, client_head, _, first, second, _ = markdown([run]).splitlines()
    assert head.startswith("| run | mode/rule | seed | rounds | accuracy | macro-F1 | loss |")
    assert row == (
        "| a\\|b | federated/fra | 0 | 3 | 85.0% | 84.9% | 0.410 | -0.123 | 0.03 "
        "| 6.00 | 12.00 | 74,498 |"
    )
    assert client_head.startswith("| client | examples | steps | train loss | accuracy |")
    assert first == "| 0 | 100 | 7 | 0.400 | 72.0% | 62.0% | 81.0% | - |"
    assert second == "| 1 | 200 | 7 | 0.500 | 74.0% | 64.0% | - | - |"


def test_repeated_runs_are_tabled_by_method_too(tmp_path):
    runs = [
        read_run(make_run(tmp_path / f"s{seed}", log([0.5, top]), seed=seed))
        for seed, top in enumerate((0.7, 0.8))
    ]
    assert "| fra, 2 seeds | 75.0% | 70.0% | 80.0% |" in markdown(runs)


def test_the_same_log_gives_the_same_bytes(tmp_path):
    paths = [make_run(tmp_path / f"s{seed}", seed=seed, summary=SUMMARY) for seed in range(2)]
    for runs, out in ((paths[:1], None), (paths, tmp_path / "both")):
        first = {path.name: path.read_bytes() for path in write_report(runs, out)}
        assert sorted(first) == ["report.md", "report.png", "report.svg"]
        assert {path.name: path.read_bytes() for path in write_report(runs, out)} == first
        assert not [*(out or paths[0]).glob(".*")]  # no temporary file stays


def test_several_runs_need_a_folder_and_none_is_no_report(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    with pytest.raises(ValueError, match="2 runs and no folder to write to"):
        write_report(runs)
    with pytest.raises(ValueError, match="0 runs"):
        write_report([], tmp_path)


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    load = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return load(name, *rest)

    run = read_run(make_run(tmp_path / "a"))
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert "| a | federated/fra |" in markdown([run])
    with pytest.raises(ImportError, match=r"pip install 'fedlora\[report\]'"):
        draw_run(run)


def test_the_figure_says_what_the_scores_are_of(tmp_path):
    """Rows that the clients held out are no shared set: nobody else could score the same ones."""
    shared, own = make_run(tmp_path / "a", summary=SUMMARY), make_run(tmp_path / "b")
    tables = {shared: 'evaluate = "dev.csv"', own: 'evaluate = ""'}
    for run, text in tables.items():
        config = run / "config.toml"
        config.write_text(f'{config.read_text()}[data]\ntrain = "a.csv"\n{text}\nclients = {{}}\n')
    assert "Accuracy on the shared evaluation set" in words(draw_run(read_run(shared)))
    assert "Accuracy on the clients' held-out rows" in words(draw_run(read_run(own)))
    two = words(draw_comparison([read_run(own), read_run(own)]))
    assert "Accuracy on the clients' held-out rows\n" in two
    both = "Accuracy on the shared evaluation set, or on the clients' held-out rows"
    assert both in words(draw_comparison([read_run(own), read_run(shared)]))


def test_a_tick_is_printed_as_it_is(tmp_path):
    """42.5 % is not 43 %."""
    figure = draw_run(read_run(make_run(tmp_path / "a", log([0.4, 0.42, 0.45, 0.44], {}))))
    written = figure.axes[0].yaxis.get_major_formatter()
    ticks = {0.425: "42.5%", 0.4: "40%", 0.57: "57%", 1.0: "100%", 0.0: "0%"}
    assert {value: written(value, 0) for value in ticks} == ticks
