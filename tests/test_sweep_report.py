"""The report of a sweep: its numbers are those of the runs, its page stands alone."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from made_sweeps import ROUNDS, heldout, line, make_sweep, rising
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.privacy.accounting import Mechanism
from fedlora.privacy.ledger import Terms, intend
from fedlora.sweep_report.budget import layer_shares
from fedlora.sweep_report.budget_figures import budget_pictures, short_layers
from fedlora.sweep_report.cases import read_cases
from fedlora.sweep_report.clients import MOST, clients_tables
from fedlora.sweep_report.content import Choices, Picture, Table, Words
from fedlora.sweep_report.curves import accuracy, area, curve, reached
from fedlora.sweep_report.findings import (
    compared,
    exactness,
    final,
    mean_error,
    one_setting_apart,
    speed,
    target_of,
)
from fedlora.sweep_report.markdown import plain_text
from fedlora.sweep_report.page import html_page
from fedlora.sweep_report.privacy import usual_range
from fedlora.sweep_report.results import exactness_picture, tried_scores
from fedlora.sweep_report.rounds import accuracy_picture
from fedlora.sweep_report.sheets import draw_sheet
from fedlora.sweep_report.write import sweep_report, write_sweep_report
from fedlora.sweepdir import read_sweep, run_path, write_plan

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

ODD = 'a<b> & "c"'
HEADS = ("method", "what")
METHODS = {
    "fra": {"merge.rule": "fra"},
    "fedavg": {"merge.rule": "fedavg"},
    'a<b> & "c"': {"merge.rule": "fra", "merge.head": "<i>freeze"},
}
FINALS = {  # by seed
    "fra": (0.80, 0.84, 0.85),
    "fedavg": (0.79, 0.82, 0.82),
    'a<b> & "c"': (0.70, 0.72, 0.74),
}
ERRORS = {"fra": 0.01, "fedavg": 0.1, 'a<b> & "c"': 1e-9}
RATES = {"fra": {0.001: 0.7, 0.002: 0.8}, "fedavg": {0.001: 0.6, 0.002: 0.9, 0.004: 0.7}}
VOID = {"meta", "br", "hr", "img", "link", "input"}


def known_lines(method, case, seed):
    return rising(FINALS[method][seed], ERRORS[method])


@pytest.fixture
def known(tmp_path):
    return make_sweep(tmp_path / "sweep", METHODS, known_lines, tried=RATES)


BUDGET = {
    "wanted": 2.0, "tail": 0.2, "cross": 0.4, "effective_rank": 3.25,
    "update": 0.5, "drift": 0.5, "new": 0.3, "new_drift": 0.4,
    "layers": {
        "m.0.q.x": {"wanted": 1.0, "tail": 0.1}, "m.0.v.x": {"wanted": 2.0, "tail": 0.1},
        "m.1.q.x": {"wanted": 0.0, "tail": 0.0},
    },
}  # fmt: skip


class Page(HTMLParser):
    """Tags balanced, ids once, nothing loaded from elsewhere, cells of tables by row."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.rows, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert len(found) == len(attributes), (tag, attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[key] for key in ("src", "href", "xlink:href", "data") if key in found]
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data

    def rows_of(self, method, width):
        return [row for row in self.rows if row[0] == method and len(row) == width]


class Read:
    """A report's tables and words, nothing drawn."""

    def __init__(self, folder, **choices):
        self.report = sweep_report(folder, None, Choices(**choices))
        blocks = [block for section in self.report.sections for block in walk(section)]
        tables = [block for block in blocks if isinstance(block, Table)]
        self.rows = [list(row) for table in tables for row in table.rows]
        self.slugs = [block.slug for block in blocks if isinstance(block, Picture)]
        self.text = " ".join(self.report.summary)
        for block in blocks:
            words = isinstance(block, Words)
            said = block.lines if words else [getattr(block, "title", ""), block.caption]
            self.text += " " + " ".join(said)
        for table in tables:
            self.text += " ".join(["", table.caption, *table.notes])
            assert {len(table.head)} == {len(row) for row in table.rows}, table.caption

    def rows_of(self, method, width):
        return [row for row in self.rows if row[0] == method and len(row) == width]


def walk(section):
    yield from section.blocks
    for inner in section.sections:
        yield from walk(inner)


def the_case(folder):
    (case,) = read_cases(read_sweep(folder))
    return case


def test_the_tables_hold_the_figures_of_the_runs(known):
    """fra: mean 0.83, deviation 0.0264575; 4.302653 of its standard errors are 0.0657245."""
    page = Read(known)
    (row,) = page.rows_of("fra", 8)[:1]
    assert row == [
        "fra",
        "3",
        "83.00 ± 6.57",
        "2.65",
        "80.00",
        "85.00",
        "78.00 ± 6.57",
        "0.500 ± 0.000",
    ]


def test_differences_are_paired_by_seed_with_effect_sizes_and_holms_p(known):
    """fra - fedavg: 1, 2, 3 points: t = 2 sqrt 3, p = 1 - sqrt(12 / 14); the other one: -9, -10, -8
    with mean -9, deviation 1, t = -9 sqrt 3, p = 1 - sqrt(243 / 245): the smaller, so doubled.
    """
    page = Read(known)
    p, other = 1 - math.sqrt(12 / 14), 1 - math.sqrt(243 / 245)
    assert p == pytest.approx(0.0742, abs=1e-4)
    assert [
        "fra",
        "3",
        "+2.00",
        "-0.48 to +4.48",
        "3.46",
        f"{p:.3f}",
        f"{p:.3f}",
        "+2.00",
        "+1.13",
    ] in page.rows
    method = 'a<b> & "c"'
    want = [
        method,
        "3",
        "-9.00",
        "-11.48 to -6.52",
        "-15.59",
        f"{other:.3f}",
        f"{2 * other:.3f}",
        "-9.00",
        "-5.08",
    ]
    assert want in page.rows
    assert "With 3 pairs a test decides nothing: this takes 5 or more." in page.text


def test_seeds_that_only_one_method_has_are_not_compared(tmp_path):
    def lines(method, case, seed):
        return None if (method, seed) == ("fra", 1) else known_lines(method, case, seed)

    folder = make_sweep(tmp_path / "s", METHODS, lines)
    (one, _) = compared(the_case(folder), "fedavg")
    assert (one.arm.method, one.paired.n) == ("fra", 2)
    assert one.paired.difference.mean == pytest.approx((0.01 + 0.03) / 2)
    page = Read(folder)
    text = page.text
    assert "Not complete: 8 of 9 planned runs are there" in text
    assert "fra, balanced: 2 of 3 runs are there; missing: seed 1." in text
    assert page.rows_of("fra", 8)[0][1] == "2"

    def fewer(method, case, seed):
        return None if (method, seed) == ("fedavg", 2) else lines(method, case, seed)

    (one, _) = compared(the_case(make_sweep(tmp_path / "f", METHODS, fewer)), "fedavg")
    assert (one.paired.n, one.paired.difference.mean) == (1, pytest.approx(0.01))


def test_a_method_that_is_in_other_cases_alone_is_not_missing(tmp_path):
    folder = make_sweep(
        tmp_path / "s", METHODS, lambda *_: rising(0.8), cases=("balanced", "imbalanced")
    )
    plan = json.loads((folder / "sweep.json").read_text())
    plan["runs"] = [
        one for one in plan["runs"] if (one["method"], one["case"]) != ("fedavg", "imbalanced")
    ]
    (folder / "sweep.json").write_text(json.dumps(plan))
    text = Read(folder).text
    assert "Not complete" not in text
    assert "fedavg, imbalanced" not in text


def test_who_is_soonest_is_said_where_somebody_is_later(tmp_path):
    def finals(method, case, seed):
        return rising(0.6 if later and method == "fedavg" else 0.8)

    for later in (False, True):
        folder = make_sweep(tmp_path / f"{later}", METHODS, finals)
        assert ("Soonest at" in Read(folder).text) is later


def test_the_baseline_can_be_chosen_and_fedavg_or_the_first_is_the_default(known, tmp_path):
    assert "Differences to fedavg" in Read(known).text
    page = Read(known, baseline="fra")
    assert "Differences to fra" in page.text
    assert page.rows_of("fedavg", 9)[0][2] == "-2.00"
    others = {"ffa": {"merge.rule": "ffa"}, "fedsa": {"merge.rule": "fedsa"}}
    folder = make_sweep(tmp_path / "o", others, lambda method, case, seed: rising(0.8 + seed / 100))
    assert "Differences to ffa" in Read(folder).text
    rates = {f"fedavg, lr {lr}": {"merge.rule": "fedavg", "client.lr": lr} for lr in (1e-3, 2e-3)}
    two = make_sweep(tmp_path / "two", others | rates, lambda *_: rising(0.8))
    assert "Differences to fedavg, lr 0.001" in Read(two).text
    assert "Differences to fedsa" in Read(two, baseline="fedsa").text
    with pytest.raises(ValueError, match="several methods 'fedavg'"):
        Read(two, baseline="fedavg")


def test_a_tuning_run_that_failed_is_told_and_its_value_is_no_edge(tmp_path):
    folder = make_sweep(
        tmp_path / "s", {"fra": {}}, lambda *_: rising(0.8),
        tried={"fra": {1e-3: 0.7, 2e-3: 0.8, 4e-3: 0.6}},
    )  # fmt: skip
    lost = next(e for e in read_sweep(folder).entries if e.grid == {"client.lr": 4e-3})
    (run_path(folder, lost.id) / "summary.json").unlink()
    page = Read(folder)
    assert "fra, balanced: 1 of 3 tuning runs have no score" in page.text
    assert "Not complete" not in page.text
    assert ["fra", "client.lr", "0.001, 0.002, 0.004", "0.002", "no"] in page.rows


def test_an_unknown_baseline_is_refused_with_the_nearest_name(known):
    result = CliRunner().invoke(app, ["report", str(known), "--baseline", "fedavgg"])
    assert isinstance(result.exception, ValueError)
    assert "no method 'fedavgg'; did you mean 'fedavg'?; it has 'fra'" in str(result.exception)
    with pytest.raises(ValueError, match=r"target must be a share above 0, at most 1, got 1\.5"):
        Read(known, target=1.5)


def test_options_of_sweeps_are_refused_for_runs_and_sweeps_are_given_alone(known):
    run = str(next((known / "runs").iterdir()))
    for arguments, message in (
        ([run, "--baseline", "fra"], "belong to the report of a sweep"),
        ([run, str(known)], "is a sweep: give it alone"),
    ):
        result = CliRunner().invoke(app, ["report", *arguments])
        assert message in str(result.exception)


OWN = {  # accuracy on the clients' own rows, by seed and client
    "fra": ({"a": 0.80, "b": 0.70}, {"a": 0.84, "b": 0.72}),
    "alone": ({"a": 0.70, "b": 0.75}, {"a": 0.75, "b": 0.74}),
    "pooled": ({"central": 0.9}, {"central": 0.8}),
}
MODES = {"alone": "local", "pooled": "central"}


def own_rows(found):
    """A finished run whose clients scored this on their own rows."""
    last = line(1, 0.5, clients=list(found))
    return [line(0, 0.5), {**last, "heldout": heldout(found)}]


def test_each_client_is_scored_on_its_own_rows_and_against_training_alone(tmp_path):
    """Client a gains 10 and 9 points: 9.5, its interval 12.706 standard errors of 0.5 wide."""
    methods = {method: {"run.mode": MODES.get(method, "federated")} for method in OWN}
    folder = make_sweep(
        tmp_path / "s", methods, lambda method, _, seed: own_rows(OWN[method][seed]), seeds=(0, 1)
    )
    scores, gained = clients_tables(the_case(folder))
    assert scores.head == ["method", "mean of clients, %", "lowest", "highest", "a", "b"]
    assert [row[2:] for row in scores.rows] == [
        ["71.0", "82.0", "82.0", "71.0"],
        ["72.5", "74.5", "72.5", "74.5"],
        ["-", "-", "-", "-"],
    ]
    assert scores.rows[0][1] == "76.5 ± 19.1"
    assert scores.rows[2][1] == "85.0 ± 63.5"
    assert gained.rows == [["fra", "1 of 2", "-3.5", "+9.5 ± 6.4", "-3.5 ± 19.1"]]


def test_many_clients_have_no_columns_and_one_client_no_table(tmp_path):
    many = {str(k): 0.5 + k / 100 for k in range(MOST + 1)}
    methods = {"fra": {}, "local": {"run.mode": "local"}}
    folder = make_sweep(tmp_path / "s", methods, lambda *_: own_rows(many), seeds=(0, 1))
    scores, gained = clients_tables(the_case(folder))
    assert scores.rows[0] == ["fra", "56.0 ± 0.0", "50.0", "62.0"]
    assert gained.rows == [["fra", "0 of 13", "+0.0"]]
    folder = make_sweep(tmp_path / "one", {"fra": {}}, lambda *_: own_rows({"0": 0.5}), seeds=(0,))
    assert clients_tables(the_case(folder)) == []


EPSILONS = {"epsilon 1": 1.0, "epsilon 8": 8.0, "none": None}
BY_EPSILON = {"epsilon 1": 0.6, "epsilon 8": 0.7, "none": 0.8}


def private_sweep(folder, finals=BY_EPSILON, failing=()):
    """Two methods at two epsilons and none, each at its own rate, which is one rate without
    privacy; a ledger for each private run. `failing` is a method, a case, and how it ends.
    """

    def curve(method, case, seed):
        final = failing[-1] if (method, case) == failing[:2] else finals[case]
        return rising(final + 0.01 * seed)

    made = make_sweep(
        folder, {"fra": {}, "ffa": {"merge.rule": "ffa"}}, curve, cases=tuple(EPSILONS),
        seeds=(0, 1),
    )  # fmt: skip
    plan = json.loads((made / "sweep.json").read_text())
    for entry in plan["runs"]:
        epsilon, run = EPSILONS[entry["case"]], run_path(made, entry["id"])
        unit = "example" if epsilon else "none"
        rate = 0.01 if epsilon and entry["method"] == "fra" else 0.02
        budget = f"epsilon = {epsilon}" if epsilon else ""
        written = re.sub("lr = .*", f"lr = {rate}", (run / "config.toml").read_text())
        more = f'[privacy]\nunit = "{unit}"\n{budget}\n[partition]\nclients = 3\n'
        (run / "config.toml").write_text(written + more)
        if epsilon:
            (run / "ledgers").mkdir()
            terms = Terms("0", "example", 1e6, 1e-5, "rdp")
            intend(run / "ledgers" / "0.ledger", terms, 1, [Mechanism(10.0 / epsilon)])
        entry["varied"] |= {
            "partition.clients": 3, "privacy.epsilon": epsilon, "client.lr": rate,
        }  # fmt: skip
    (made / "sweep.json").write_text(json.dumps(plan))
    return made


def test_accuracy_is_shown_against_epsilon_with_the_noise_beside_it(tmp_path):
    pytest.importorskip("dp_accounting")
    page = Read(private_sweep(tmp_path / "s"))
    (row,) = [row for row in page.rows_of("fra", 4) if row[1].startswith("60.5")]
    assert [cell.split()[0] for cell in row] == ["fra", "60.50", "70.50", "80.50"]
    assert ["noise multiplier", "10", "1.25", "0"] in page.rows
    assert "Final accuracy by epsilon, %: clients 3" in page.text
    section = next(part for part in page.report.sections if part.title == "Privacy")
    (picture,) = [block for block in section.blocks if isinstance(block, Picture)]
    assert [panel.title for panel in picture.panels] == [
        "clients 3", "Noise, clients 3",
    ]  # fmt: skip
    ax = draw_sheet(picture).axes[0]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "8", "none"]


def test_a_method_that_fails_does_not_press_the_others_together(tmp_path):
    """Three epsilons with means near 70 %, and one of 20 %, which is written at the edge."""
    pytest.importorskip("dp_accounting")
    finals = {"epsilon 1": 0.70, "epsilon 8": 0.72, "none": 0.71}
    made = private_sweep(tmp_path / "s", finals, failing=("ffa", "none", 0.2))
    report = Read(made).report
    section = next(part for part in report.sections if part.title == "Privacy")
    (picture,) = [block for block in section.blocks if isinstance(block, Picture)]
    figure = draw_sheet(picture)
    ax, noise = figure.axes[:2]
    low, high = ax.get_ylim()
    assert 0.5 < low < 0.70
    assert 0.72 < high < 0.9
    assert [note.get_text() for note in ax.texts] == ["20.5%"]
    assert ax.get_subplotspec().rowspan == noise.get_subplotspec().rowspan
    page = html_page(replace(report, sections=[section]))
    assert 'class="panels columns-2"' in page.partition('<figure id="privacy">')[2]
    assert ".columns-2 {" in page


@pytest.mark.parametrize(
    ("levels", "usual"),
    [
        ([[0.76, 0.75, 0.63], [0.74, 0.73, 0.75]], (0.73, 0.76)),
        ([[0.90, 0.91, 0.92], [0.70, 0.71, 0.72], [0.71, 0.71, 0.72]], (0.70, 0.92)),  # by level
        ([[0.5, 0.6, 0.7, 0.8, 0.9, 1.0]], (0.5, 1.0)),  # nothing is the rule, nothing is far
        ([[0.7, math.nan], []], (0.7, 0.7)),
        ([[math.nan]], (-math.inf, math.inf)),
    ],
)
def test_what_is_far_is_so_from_the_methods_beside_it(levels, usual):
    assert usual_range(levels) == usual


def test_without_epsilons_to_compare_there_is_no_privacy_section(known):
    assert "Privacy" not in [part.title for part in Read(known).report.sections]


def test_rounds_and_megabytes_to_the_target_count_who_never_got_there(tmp_path):
    """Finals 0.9, 0.8, 0.5 rise in four even steps from 0.5: 0.7 is reached in round 2, 3, never;
    a round moves 3 MB.
    """
    finals = (0.9, 0.8, 0.5)
    folder = make_sweep(tmp_path / "s", {"fra": {}}, lambda m, c, seed: rising(finals[seed]))
    (arm,) = the_case(folder).arms
    found = [reached(run, 0.7) for run in arm.all]
    assert [one.round for one in found] == [2, 3, math.inf]
    assert [one.megabytes for one in found] == [6, 9, math.inf]
    assert speed(arm, 0.7) == (type(speed(arm, 0.7)))(3, 2, 3.0, 9.0)
    assert speed(arm, 0.85).rounds == math.inf
    assert [area(run) for run in arm.all] == pytest.approx([0.7, 0.65, 0.5])
    assert target_of(the_case(folder), 0.9) == pytest.approx(0.9 * 2.2 / 3)
    page = Read(folder, target=0.9)  # 66 %: rounds 2 (0.7), 3 (0.725) and never
    assert ["fra", "2 of 3", "3", "9.0", "61.67 ± 25.86"] in page.rows
    page = Read(folder, target=1.0)  # 73.3 %: rounds 3 (0.8), 4 (0.8) and never
    assert page.rows_of("fra", 5)[0][1:4] == ["2 of 3", "4", "12.0"]


def test_a_curve_is_the_mean_over_seeds_with_students_band_after_smoothing(known):
    runs = the_case(known).arm("fedavg").all
    found = curve(runs, accuracy)
    means = [0.5 + (0.81 - 0.5) * t / ROUNDS for t in range(ROUNDS + 1)]
    np.testing.assert_allclose(found.mean, means)
    spread = np.std([0.79, 0.82, 0.82], ddof=1) / math.sqrt(3) * 4.3026527
    np.testing.assert_allclose(
        found.half, [spread * t / ROUNDS for t in range(ROUNDS + 1)], rtol=1e-7
    )
    smooth = curve(runs, accuracy, rolling=2)
    want = [means[0], means[1], *((means[t] + means[t - 1]) / 2 for t in (2, 3, 4))]
    np.testing.assert_allclose(smooth.mean, want)
    np.testing.assert_allclose(smooth.raw, means)


def test_what_is_drawn_are_these_curves_client_by_client(known):
    picture = accuracy_picture(the_case(known), 1)
    assert [panel.title for panel in picture.panels] == list(METHODS)
    ax = draw_sheet(picture).axes[0]
    first, second, whole = (ax.lines[place].get_ydata() for place in range(3))
    np.testing.assert_allclose(whole[-1], 0.83)
    np.testing.assert_allclose([first[-1], second[-1]], [0.82, 0.81])
    assert [name for name, _ in picture.legend[1:]] == ["client 0", "client 1"]
    assert "rolling" not in picture.caption
    assert "Rolling mean of 3 rounds" in accuracy_picture(the_case(known), 3).caption


def test_many_clients_are_their_lowest_median_and_highest(tmp_path):
    names = [str(place) for place in range(11)]
    made = [line(t, 0.7, clients=names) for t in range(3)]
    folder = make_sweep(tmp_path / "s", {"fra": {}}, lambda *_: made)
    picture = accuracy_picture(the_case(folder), 1)
    want = ["lowest of 11 clients", "median of 11 clients", "highest of 11 clients"]
    assert [name for name, _ in picture.legend[1:]] == want
    lines = draw_sheet(picture).axes[0].lines
    np.testing.assert_allclose([one.get_ydata()[-1] for one in lines[:3]], [0.59, 0.64, 0.69])


def test_a_method_keeps_its_look_and_references_are_black_and_grey(tmp_path):
    methods = {
        "central": {"run.mode": "central"}, "fra": {}, "local": {"run.mode": "local"}, "ffa": {}
    }  # fmt: skip
    folder = make_sweep(tmp_path / "s", methods, lambda *_: rising(0.8), cases=("a", "b"))
    cases = read_cases(read_sweep(folder))
    for case in cases:
        assert [(arm.method, arm.index) for arm in case.arms] == [
            ("central", -1), ("fra", 0), ("local", -1), ("ffa", 1)
        ]  # fmt: skip
    assert [arm.mode for arm in cases[0].arms][:2] == ["central", "federated"]


def test_overfitting_is_evaluation_minus_training_loss(tmp_path):
    made = [line(t, 0.7, loss=loss, train=0.3) for t, loss in enumerate([0.7, 0.5, 0.4, 0.6])]
    folder = make_sweep(tmp_path / "s", {"fra": {}}, lambda *_: made)
    row = ["fra", "0.300 ± 0.000", "0.600 ± 0.000", "+0.300 ± 0.000", "2", "+0.200 ± 0.000"]
    page = Read(folder)
    assert row in page.rows
    assert "evaluation loss rose by 0.200 ± 0.000 nats with fra." in page.text


def test_who_overfits_most_is_said_where_it_is_sure(tmp_path):
    """Rises of 0.1 to 0.3 at three seeds may be none; such of 0.19 to 0.21 are some."""

    def lines(method, case, seed):
        rise = (0.2, 0.1, 0.3)[seed] if method == "fra" else 0.02
        return [line(t, 0.7, loss=loss) for t, loss in enumerate([0.7, 0.4, 0.4 + rise])]

    text = Read(make_sweep(tmp_path / "s", {"fra": {}, "ffa": {}}, lines)).text
    assert "Overfitting:" not in text

    def surely(method, case, seed):
        rise = (0.2, 0.19, 0.21)[seed] if method == "fra" else 0.02
        return [line(t, 0.7, loss=loss) for t, loss in enumerate([0.7, 0.4, 0.4 + rise])]

    text = Read(make_sweep(tmp_path / "t", {"fra": {}, "ffa": {}}, surely)).text
    assert (
        "Overfitting: once at its lowest, evaluation loss rose by 0.200 ± 0.025 nats with fra, "
        "least, by 0.020, with ffa." in text
    )


def test_cost_counts_both_ways_against_the_full_model_and_the_servers_time(known):
    """Four rounds of 1 MB up and 2 MB down, of 300 MB; 0.2 s in four rounds."""
    want = ["fra", "4.00", "8.00", "12.00", "4.00", "50.0 ± 0.0", "1,000", "0.01"]
    page = Read(known)
    assert want in page.rows
    assert page.rows_of(ODD, 8)[1][-1] == "exact"


def test_tuning_shows_what_was_tried_and_what_was_chosen(known):
    arm = the_case(known).arm("fedavg")
    assert tried_scores(arm.tried, "client.lr") == RATES["fedavg"]
    page = Read(known)
    assert ["fra", "client.lr", "0.001, 0.002", "0.002", "yes"] in page.rows
    assert ["fedavg", "client.lr", "0.001, 0.002, 0.004", "0.002", "no"] in page.rows
    assert "5 tuning runs, seed 1000" in page.text


def test_methods_one_setting_apart_are_an_ablation(known):
    """The third method is fra with another head; fedavg is another rule and no ablation of fra."""
    keys = ["merge.rule", "merge.head"]
    ((base, (change,)),) = one_setting_apart(the_case(known), keys)
    assert (base.method, change.key, change.before, change.after) == (
        "fra", "merge.head", "average", "<i>freeze"
    )  # fmt: skip
    assert change.versus.paired.difference.mean == pytest.approx(-0.11)
    page = Read(known)
    assert ["fra", "baseline", "83.00 ± 6.57", "3", "-", "-", "-", "-"] in page.rows
    (row,) = [row for row in page.rows if "merge.head: average to <i>freeze" in row]
    assert row[3:5] == ["3", "-11.00"]


def test_three_values_of_a_setting_have_one_base(tmp_path):
    methods = {head: {"merge.head": head} for head in ("freeze", "average", "local")}
    methods["carry"] = {"merge.head": "average", "merge.residual": "carry"}
    folder = make_sweep(tmp_path / "s", methods, lambda m, c, seed: rising(0.8 + seed / 100))
    ((base, changes),) = one_setting_apart(the_case(folder), ["merge.head", "merge.residual"])
    assert base.method == "average"
    assert [change.versus.arm.method for change in changes] == ["freeze", "local", "carry"]


def test_merge_error_and_accuracy_are_correlated_within_each_seed(known):
    """Per seed the errors rank 2, 3, 1 and the accuracies 3, 2, 1; what is exact is a floor."""
    tie = exactness(the_case(known))
    assert (tie.runs, tie.methods) == (9, 3)
    assert tie.rho_methods == pytest.approx(0.5)
    assert 0.3 < tie.rho < 0.8
    picture = exactness_picture([the_case(known)])
    drawn = draw_sheet(picture).axes[0].lines
    places = {x for one in drawn for x in one.get_xdata()}
    assert sorted(places)[1:] == pytest.approx([0.01, 0.1])
    assert 5e-7 < min(places) < 2e-6
    assert "3 methods are too few to say more" in Read(known).text


def test_an_early_merge_counts_however_exact_the_later_ones_are(tmp_path):
    """A hybrid is no exact method: what its first merges lost is in the model."""
    errors = {"exact": (0.0, 0.0), "early": (0.2, 0.0), "late": (0.0, 0.1)}

    def lines(method, case, seed):
        first, second = errors[method]
        accuracy = 0.8 + 0.01 * list(errors).index(method)
        return [line(0, 0.5), line(1, 0.6, error=first), line(2, accuracy, error=second)]

    folder = make_sweep(tmp_path / "s", {method: {} for method in errors}, lines)
    case = the_case(folder)
    assert [mean_error(arm.all[0]) for arm in case.there] == pytest.approx([1e-6, 0.1, 0.05])
    assert exactness(case).rho_methods == pytest.approx(0.5)


def test_pairs_that_do_not_vary_have_an_interval_and_no_p(tmp_path):
    def lines(method, case, seed):
        return rising(0.8 + seed / 100 + (0.01 if method == "fra" else 0.0))

    text = Read(make_sweep(tmp_path / "s", METHODS, lines, seeds=range(5))).text
    assert "+1.00 points (95 % interval +1.00 to +1.00); the pairs do not vary" in text


def test_methods_are_tied_over_the_seeds_that_all_of_them_have(tmp_path):
    """Accuracy rises with the error; seed 1 is easier for all, and half of the methods lack it."""
    methods = {f"m{place}": {} for place in range(4)}

    def lines(method, case, seed):
        place = int(method[1])
        if seed == 1 and place > 1:
            return None
        return [line(0, 0.5), line(1, 0.6 + 0.01 * place + 0.2 * seed, error=0.01 * (place + 1))]

    tie = exactness(the_case(make_sweep(tmp_path / "s", methods, lines, seeds=(0, 1))))
    assert (tie.runs, tie.methods) == (4, 4)
    assert (tie.rho, tie.rho_methods) == pytest.approx((1, 1))


def test_methods_without_a_common_seed_are_not_tied(tmp_path):
    def lines(method, case, seed):
        return rising(0.8) if seed == int(method[1]) else None

    folder = make_sweep(tmp_path / "s", {f"m{seed}": {} for seed in range(3)}, lines)
    assert exactness(the_case(folder)).runs == 0
    assert Read(folder).text


def test_one_seed_has_no_interval_and_no_test(tmp_path):
    folder = make_sweep(tmp_path / "s", METHODS, known_lines, seeds=(0,))
    page = Read(folder)
    assert page.rows_of("fra", 8)[0] == [
        "fra", "1", "80.00", "-", "80.00", "80.00", "75.00", "0.500"
    ]  # fmt: skip
    assert page.rows_of("fra", 9)[0] == ["fra", "1", "+1.00", *["-"] * 6]
    assert "with 1 seed in common this decides nothing" in page.text


def test_five_seeds_can_tell_a_difference_from_noise(tmp_path):
    noise = (0.0, 0.001, -0.001, 0.002, -0.002)

    def lines(method, case, seed):
        return rising(0.8 + seed / 50 + (0.03 + noise[seed]) * (method == "fra"))

    folder = make_sweep(tmp_path / "s", {"fra": {}, "fedavg": {}}, lines, seeds=range(5))
    text = Read(folder).text
    assert (
        "Against fedavg: +3.00 points (95 % interval +2.80 to +3.20, p < 0.001 after Holm)" in text
    )
    assert "; beyond the noise of the seeds." in text
    assert "decides nothing" not in text


def test_a_case_without_runs_is_named_and_the_others_are_shown(tmp_path):
    def lines(method, case, seed):
        return known_lines(method, case, seed) if case == "SST-2 iid" else None

    folder = make_sweep(tmp_path / "s", METHODS, lines, cases=("SST-2 iid", "shares", ""))
    page = Read(folder)
    text = page.text
    assert "SST-2 iid: highest mean accuracy of 3 federated methods: fra" in text
    assert "Shares: no run with a final score is there." in text
    assert "fra, shares: 0 of 3 runs are there; missing: seed 0, 1, 2." in text
    assert "sst-2-iid-final" in page.slugs


def test_a_sweep_of_one_case_without_a_name_speaks_of_none(tmp_path):
    folder = make_sweep(tmp_path / "s", METHODS, known_lines, cases=("",))
    text = Read(folder).text
    assert "results" not in text.lower()
    assert "Highest mean accuracy of 3 federated methods: fra" in text
    assert "Accuracy by round" in text


def test_a_baseline_without_runs_leaves_differences_out(tmp_path):
    def lines(method, case, seed):
        return None if method == "fedavg" else known_lines(method, case, seed)

    text = Read(make_sweep(tmp_path / "s", METHODS, lines)).text
    assert "No run of the baseline fedavg is there" in text


def test_a_sweep_without_a_finished_run_is_refused(tmp_path):
    folder = make_sweep(tmp_path / "s", METHODS, lambda *_: None)
    with pytest.raises(ValueError, match=r"no run of the sweep .* has ended yet"):
        Read(folder)
    write_plan(folder, "none", [])
    with pytest.raises(ValueError, match="has ended yet: run it first"):
        Read(folder)


def test_a_score_of_an_earlier_round_is_never_taken_for_the_final_one(tmp_path):
    """Clients alone that were not evaluated: the start's score is not theirs."""

    def lines(method, case, seed):
        if method == "fra":
            return rising(0.8)
        return [line(0, 0.6), line(1, None), line(2, None)]

    folder = make_sweep(tmp_path / "s", {"fra": {}, "alone": {"run.mode": "local"}}, lines)
    arm = the_case(folder).arm("alone")
    assert arm.finals() == {}
    assert math.isnan(final(arm).mean)
    page = Read(folder)
    assert page.rows_of("alone", 8)[0][1:3] == ["0", "-"]
    assert page.rows_of("alone", 5)[0][1:4] == ["-", "-", "-"]


def test_an_untrained_start_above_the_target_has_reached_nothing(tmp_path):
    made = [line(t, score) for t, score in enumerate((0.9, 0.6, 0.7, 0.8))]
    folder = make_sweep(tmp_path / "s", {"fra": {}}, lambda *_: made, seeds=(0, 1))
    assert speed(the_case(folder).arm("fra"), 0.7).rounds == 2


def test_what_was_not_evaluated_by_round_is_named_and_not_drawn(tmp_path):
    def lines(method, case, seed):
        return rising(0.8) if method == "fra" else [line(0, 0.6), line(1, None), line(2, 0.7)]

    folder = make_sweep(tmp_path / "s", {"fra": {}, "late": {}}, lines)
    assert "Not evaluated by round" not in Read(folder).text

    def never(method, case, seed):
        return rising(0.8) if method == "fra" else [line(0, 0.6), line(1, None)]

    folder = make_sweep(tmp_path / "n", {"fra": {}, "never": {}}, never)
    assert "Not evaluated by round: never." in Read(folder).text
    assert [panel.title for panel in accuracy_picture(the_case(folder), 1).panels] == ["fra"]
    folder = make_sweep(tmp_path / "o", {"never": {}}, never)
    page = Read(folder)
    assert "balanced-accuracy" not in page.slugs
    assert "No accuracy by round is there" in page.text


def test_rounds_measured_on_fewer_rows_are_said_to_be(tmp_path):
    made = [line(t, 0.7, rows=200 if t == 3 else 30) for t in range(4)]
    text = Read(make_sweep(tmp_path / "s", {"fra": {}}, lambda *_: made)).text
    assert "measured on 30 of the 200 evaluation rows" in text


def test_a_curve_is_of_the_same_rows_to_its_end_and_the_final_score_of_all(tmp_path):
    """The last line has the score of all rows, 0.8, and beside it that of the part, 0.6."""
    made = [line(t, 0.5 + t / 20, rows=30) for t in range(3)]
    made[-1] = line(2, 0.8, rows=200) | {"subset": made[-1]["global"]}
    case = the_case(make_sweep(tmp_path / "s", {"fra": {}}, lambda *_: made))
    arm = case.arm("fra")
    np.testing.assert_allclose(accuracy(arm.all[0]), [0.5, 0.55, 0.6])
    assert final(arm).mean == pytest.approx(0.8)


def test_a_budget_is_drawn_and_tabled_where_there_is_one(tmp_path, known):
    made = [line(t, 0.7, budget=BUDGET) for t in range(3)]
    folder = make_sweep(
        tmp_path / "b", {"fra": {}, "ffa": {}}, lambda m, c, s: made if m == "fra" else rising(0.8)
    )
    case = the_case(folder)
    want = ["fra", "2", "0.2", "0.4", "3.25", "0.5", "0.5", "0.3", "0.4"]
    assert want in Read(folder).rows
    x, shares = layer_shares(case.arm("fra").all, list(BUDGET["layers"]), "tail")
    assert x.tolist() == [1, 2]
    np.testing.assert_allclose(shares, [[0.1, 0.1], [0.05, 0.05], [np.nan, np.nan]])
    errors, heat, changes, space = budget_pictures(case)
    for picture in (errors, heat, changes):
        assert [panel.title for panel in picture.panels] == ["fra"]
    lines = draw_sheet(errors).axes[0].lines  # 0.2 / 2 and 0.4 / 2
    np.testing.assert_allclose([one.get_ydata() for one in lines], [[0.1, 0.1], [0.2, 0.2]])
    image = draw_sheet(heat).axes[0].images[0]
    np.testing.assert_allclose(image.get_array().filled(np.nan), shares)
    areas = draw_sheet(changes).axes[0].collections  # of 0.5: 0.25 - 0.09, 0.09, 0.25 - 0.16, 0.16
    tops = [one.get_paths()[0].vertices[:, 1].max() for one in areas]
    np.testing.assert_allclose(tops, [0.32, 0.5, 0.68, 1.0])
    assert [panel.title for panel in space.panels] == ["Effective rank"]  # angles are not there
    (ranks,) = draw_sheet(space).axes[0].lines
    np.testing.assert_allclose(ranks.get_xydata(), [[1, 3.25], [2, 3.25]])
    assert "Error budget" not in Read(known).text
    assert budget_pictures(the_case(known)) == []


def test_what_becomes_of_the_adapters_space_is_drawn_for_all_methods_together(tmp_path):
    def lines(method, case, seed):
        lower = 4.0 if method == "fra" else 1.0
        own = [BUDGET | {"effective_rank": lower / t, "row_angle": 10.0 * t} for t in (1, 2)]
        del own[0]["row_angle"]  # round 1 has no round before it
        return [line(0, 0.5), *(line(t + 1, 0.6, budget=one) for t, one in enumerate(own))]

    folder = make_sweep(tmp_path / "s", {"fra": {}, "hetlora": {}}, lines)
    space = budget_pictures(the_case(folder))[-1]
    sheet = draw_sheet(space).axes
    drawn = [[one.get_xydata().tolist() for one in axes.lines] for axes in sheet[:2]]
    assert drawn == [
        [[[1, 4], [2, 2]], [[1, 1], [2, 0.5]]], [[[2, 20]], [[2, 20]]],
    ]  # fmt: skip
    assert [name for name, _ in space.legend] == ["fra", "hetlora"]


@pytest.mark.parametrize(
    "budget", [3, {"layers": 3}, {"layers": {"a": 3}}, {"wanted": "x", "tail": None}, {"tail": 1.0}]
)
def test_a_budget_of_another_form_does_no_harm(tmp_path, budget):
    made = [line(0, 0.5), line(1, 0.6) | {"budget": budget}]
    folder = make_sweep(tmp_path / "s", {"fra": {}}, lambda *_: made)
    assert "fra" in Read(folder).text
    assert budget_pictures(the_case(folder)) == []


def test_layer_names_keep_what_tells_them_apart():
    assert short_layers(["m.0.q.x", "m.0.v.x", "m.1.q.x"]) == ["0 q", "0 v", "1 q"]
    assert short_layers(["m.0.q.x", "m.head.x"]) == ["0.q", "head"]
    assert short_layers(["m.0.q"]) == ["q"]
    assert short_layers(["a", "a.b"]) == ["a", "b"]


# ---------------------------------------------------------------- the page and the files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sweep with everything in it, and what the command wrote and said."""

    def lines(method, case, seed):
        made = known_lines(method, case, seed)
        return [one | {"budget": BUDGET} for one in made] if method == "fra" else made

    folder = make_sweep(tmp_path_factory.mktemp("w") / "made", METHODS, lines, tried=RATES)
    result = CliRunner().invoke(app, ["report", str(folder), "--rolling", "2", "--target", "0.9"])
    assert result.exit_code == 0, result.exception
    return folder / "report", result.output


def test_the_page_is_well_formed_and_loads_nothing(written):
    text = (written[0] / "index.html").read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert {"balanced-changes", "balanced-tail", "balanced-budget", "exactness"} <= set(page.ids)
    own = ("#", "data:image/png;base64,")
    assert page.links
    assert [link for link in page.links if not link.startswith(own)] == []
    assert not re.search(r"url\((?!#)|@import|<script|<link", text)
    used = re.findall(r"url\(#([^)]*)\)", text) + [a[1:] for a in page.links if a[0] == "#"]
    assert set(used) <= set(page.ids)


def test_figures_on_the_page_follow_its_colours_and_have_names(written):
    text = (written[0] / "index.html").read_text()
    panels = re.findall(r'<svg viewBox="[^"]*" role="img" aria-label="([^"]*)"><title>', text)
    assert "Accuracy by round, balanced: fra" in panels
    assert len(panels) > 12
    drawn = text[text.index("</style>") :]
    for colour in ("#1a1a1a", "#666666", "#dddddd", "#ffffff", "#000000"):
        assert colour not in drawn
    assert "currentColor" in drawn
    assert "prefers-color-scheme: dark" in text


def test_names_from_files_are_escaped_everywhere(written):
    raw = (written[0] / "index.html").read_text()
    assert ODD in [row[0] for row in Page(raw).rows]
    assert not re.search("a<b>|<i>", raw)
    assert "a<b>" not in (written[0] / "report.md").read_text()
    assert plain_text("a|b *c* [d](e)\n_f_ snake_case <g>") == (
        "a\\|b \\*c\\* \\[d\\](e) \\_f\\_ snake_case &lt;g&gt;"
    )


def test_the_page_has_the_tables_of_the_report_and_so_has_the_markdown(written):
    rows = Read(written[0].parent, rolling=2, target=0.9).rows
    page = Page((written[0] / "index.html").read_text())
    assert [row for row in page.rows if row[0] not in HEADS] == rows
    text = (written[0] / "report.md").read_text()
    assert "| fra | 3 | 83.00 ± 6.57 |" in text
    for link in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text):
        assert (written[0] / link).is_file()


def test_the_command_names_what_it_wrote_and_how_to_make_it_again(written):
    folder, said = written
    text = (folder / "index.html").read_text()
    assert "fedlora report made --rolling 2 --target 0.9" in text
    assert str(folder.parent.parent) not in text
    assert "index.html" in said
    figures = [path.name for path in (folder / "figures").iterdir()]
    assert f"{len(figures)} files" in said
    assert {"exactness.svg", "balanced-accuracy.png", "balanced-tail.svg"} <= set(figures)


def test_the_same_sweep_gives_the_same_bytes(tmp_path):
    folder = make_sweep(tmp_path / "s", {"fra": {}}, lambda *_: rising(0.8), seeds=(0, 1))
    first = {path: path.read_bytes() for path in write_sweep_report(folder)}
    assert {path: path.read_bytes() for path in write_sweep_report(folder)} == first


def test_a_report_needs_no_torch():
    code = "import sys, fedlora.sweep_report.write; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
