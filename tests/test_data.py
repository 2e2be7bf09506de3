"""From files to tokenised clients: the central label order, what is held out, what evaluates."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import LABELS, make_tokenizer, toy_rows, write_csv, write_lines

from fedlora.config import Config, make_config
from fedlora.data import Data, Silos, encode, read_silos, tokenised
from fedlora.tables import Table

CPU = torch.device("cpu")


def config_of(train: Path | str, **changes: Any) -> Config:
    named = {name.replace("__", ".", 1): value for name, value in changes.items()}
    return make_config({"data.train": str(train), "data.holdout": 0.25} | named)


def silos_of(train: Path | str, **changes: Any) -> Silos:
    return read_silos(config_of(train, **changes))


def data_of(train: Path | str, **changes: Any) -> Data:
    config = config_of(train, **changes)
    return tokenised(config, read_silos(config), make_tokenizer("bert"))


def refusal(train: Path | str, **changes: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers look at the message
        silos_of(train, **changes)
    return str(caught.value)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """60 rows, one half of each label."""
    return write_csv(tmp_path / "train.csv", toy_rows(60))


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """One file per client from its labels, texts numbered through."""

    def write(**labels: Iterable[str]) -> dict[str, str]:
        return {
            client: str(
                write_csv(
                    tmp_path / f"{client}.csv",
                    [(f"good {client} {row}", label) for row, label in enumerate(own)],
                )
            )
            for client, own in labels.items()
        }

    return write


# ---------------------------------------------------------------- one file per client


def test_clients_whose_files_differ_in_order_and_labels_get_the_same_ids(
    files: Callable[..., dict[str, str]],
) -> None:
    """b's file begins with another label than a's, and c never saw `mid`."""
    clients = files(a=["neg", "mid", "pos"], b=["pos", "neg", "mid", "mid"], c=["pos", "neg"])
    silos = silos_of("", data__clients=clients, data__labels=["pos", "mid", "neg"])
    want = {"pos": 0, "mid": 1, "neg": 2}
    assert silos.labels == ["pos", "mid", "neg"]
    assert [want[label] for label in silos.table.labels] == silos.label_ids
    assert silos.counts == {"a": [1, 1, 1], "b": [1, 2, 1], "c": [1, 0, 1]}


def test_every_client_keeps_its_own_rows(files: Callable[..., dict[str, str]]) -> None:
    clients = files(b=["x", "y", "x"], a=["y", "x"])
    silos = silos_of("", data__clients=clients, data__labels=["x", "y"])
    assert list(silos.parts) == ["a", "b"]
    for client, rows in silos.parts.items():
        assert {silos.table.texts[row].split()[1] for row in rows} == {client}
    assert sum(rows.size for rows in silos.parts.values()) == len(silos.table) == 5


def test_files_of_clients_need_the_labels_and_are_told_which_were_found(
    files: Callable[..., dict[str, str]],
) -> None:
    message = refusal("", data__clients=files(a=["x", "y"], b=["z", "x"]))
    assert "data.labels must list the labels" in message
    assert 'labels = ["x", "y", "z"]' in message


def test_an_unknown_label_names_the_clients_file_and_its_line(
    files: Callable[..., dict[str, str]],
) -> None:
    clients = files(a=["neg", "pos"], b=["neg", "pos", "Pos"])
    message = refusal("", data__clients=clients, data__labels=["neg", "pos"])
    assert f"{clients['b']}, line 4: unknown label 'Pos'; did you mean 'pos'?" in message
    assert clients["a"] not in message


def test_a_text_without_a_token_is_named_in_its_own_clients_file(
    files: Callable[..., dict[str, str]],
) -> None:
    """Not in the table of all clients' rows."""
    clients = files(a=["x", "y"], b=["x", "y", "x"])
    silos = silos_of("", data__clients=clients, data__labels=["x", "y"])
    assert [silos.table.place(row) for row in (1, 2, 4)] == [
        f"{clients['a']}, line 3", f"{clients['b']}, line 2", f"{clients['b']}, line 4"
    ]  # fmt: skip


def test_clients_with_pairs_and_without_do_not_mix(tmp_path: Path) -> None:
    one = write_csv(tmp_path / "a.csv", [["a", "x"], ["b", "y"]])
    two = write_csv(
        tmp_path / "b.csv", [["a", "b", "x"], ["c", "d", "y"]], ["premise", "hypothesis", "label"]
    )
    clients = {"a": str(one), "b": str(two)}
    message = refusal("", data__clients=clients, data__labels=["x", "y"])
    assert "a.csv has single texts where other clients have pairs" in message


def test_a_label_listed_twice_is_refused(train: Path) -> None:
    """Its id would be that of either place, and the model would have a label that nothing has."""
    assert "'neg' twice" in refusal(train, data__labels=["neg", "pos", "neg"])


def test_a_label_listed_twice_is_told_before_one_that_is_missing(
    files: Callable[..., dict[str, str]],
) -> None:
    """`urgent` is missing because `routine` was written twice."""
    clients = files(a=["routine", "urgent"], b=["urgent", "routine"])
    message = refusal("", data__clients=clients, data__labels=["routine", "routine"])
    assert "data.labels lists 'routine' twice" in message


# ---------------------------------------------------------------- private rows stay private


def test_a_file_in_two_places_is_refused(
    train: Path, files: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    """A client's own rows would count as a public evaluation set, or twice."""
    clients = files(a=["x", "y"], b=["y", "x"])
    labels = {"data__labels": ["x", "y"]}
    (tmp_path / "link.csv").symlink_to(clients["a"])
    for other in (clients["a"], str(tmp_path / "link.csv"), f"{tmp_path}/./a.csv"):
        message = refusal("", data__clients=clients, data__evaluate=other, **labels)
        assert f"data.evaluate = {other!r} is data.clients.a too" in message
        assert "held-out rows are scored" in message
        message = refusal("", data__clients=clients | {"c": other}, **labels)
        assert f"data.clients.a and data.clients.c are both {other!r}" in message
    message = refusal(train, data__evaluate=str(train))
    assert f"data.evaluate = {str(train)!r} is data.train too" in message
    assert "is data.train too" in refusal("builtin:reviews", data__evaluate="builtin:reviews")
    assert "is data.train too" in refusal("glue/sst2", data__evaluate="glue/sst2:train")
    assert silos_of(train, data__clients=clients, data__evaluate=str(train), **labels | {
        "data__labels": ["x", "y", "neg", "pos"]}).evaluation is not None  # fmt: skip


def test_a_client_whose_own_file_has_one_label_is_told_which_file(
    files: Callable[..., dict[str, str]],
) -> None:
    clients = files(a=["x", "x"], b=["y", "x"])
    message = refusal("", data__clients=clients, data__labels=["x", "y"])
    assert f"{clients['a']} (client a) holds the single label 'x'" in message
    assert "change the partition" not in message


# ---------------------------------------------------------------- one file for all


@pytest.mark.parametrize("by", ["iid", "dirichlet", "shares", "column"])
def test_a_partition_gives_each_row_to_one_client_at_most(tmp_path: Path, by: str) -> None:
    rows = [(text, label, f"site{n % 4}") for n, (text, label) in enumerate(toy_rows(80, seed=3))]
    rows = [(text, LABELS[n // 4 % 2], site) for n, (text, _, site) in enumerate(rows)]
    file = write_csv(tmp_path / "train.csv", rows, ("text", "label", "site"))
    silos = silos_of(
        file,
        partition__by=by,
        partition__column="site",
        partition__clients=3,
        partition__alpha=5.0,
        partition__shares=[[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]] if by == "shares" else [],
    )
    dealt = np.concatenate(list(silos.parts.values()))
    assert len(set(dealt.tolist())) == dealt.size
    if by != "shares":
        assert dealt.size == 80
    if by == "column":
        assert list(silos.parts) == ["site0", "site1", "site2", "site3"]
        for site, own in silos.parts.items():
            assert {rows[row][2] for row in own} == {site}
    else:
        assert list(silos.parts) == ["0", "1", "2"]


def test_a_limit_draws_rows_by_the_seed(train: Path) -> None:
    def chosen(seed: int) -> list[int]:
        silos = silos_of(train, data__limit=20, run__seed=seed)
        return sorted(np.concatenate(list(silos.parts.values())).tolist())

    assert len(chosen(0)) == 20
    assert chosen(0) == chosen(0) != chosen(1)
    assert chosen(0) != list(range(20))
    assert len(np.concatenate(list(silos_of(train, data__limit=500).parts.values()))) == 60


def test_the_seed_deals_the_rows(train: Path) -> None:
    parts = [silos_of(train, run__seed=seed).parts["0"].tolist() for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]


def test_a_client_with_a_single_label_is_refused_unless_allowed(tmp_path: Path) -> None:
    rows = [(f"good {n}", LABELS[n % 2], "one" if n % 2 else "two") for n in range(12)]
    rows += [("bad", "neg", "both"), ("good", "pos", "both")]
    file = write_csv(tmp_path / "a.csv", rows, ("text", "label", "site"))
    column = {"partition__by": "column", "partition__column": "site"}
    message = refusal(file, **column)
    assert "client one holds the single label 'pos'" in message
    assert "partition.single_class = 'allow'" in message
    silos = silos_of(file, partition__single_class="allow", **column)
    assert silos.counts["one"] == [0, 6]


def test_data_of_one_label_are_refused(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [["a", "x"], ["b", "x"]])
    assert "single label 'x'" in refusal(file)


def test_an_empty_value_names_no_client(tmp_path: Path) -> None:
    """'' stands for the adapter that all share, and a client is a folder of the run directory."""
    rows = [("good", LABELS[n // 2 % 2], ("", "site")[n % 2]) for n in range(16)]
    file = write_csv(tmp_path / "a.csv", rows, ("text", "label", "site"))
    assert "''" in refusal(file, partition__by="column", partition__column="site")


@pytest.mark.parametrize("name", ["../up", "a/b", "/etc"])
def test_a_client_whose_name_is_a_path_is_refused(
    files: Callable[..., dict[str, str]], name: str
) -> None:
    """Its adapter would be written outside the run directory."""
    own = files(a=["x", "y"], b=["x", "y"])
    clients = {"plain": own["a"], name: own["b"]}
    assert repr(name) in refusal("", data__clients=clients, data__labels=["x", "y"])


@pytest.mark.parametrize("other", ["MERCY", "mercy "])
def test_clients_whose_folders_some_disks_take_for_one_are_refused(
    files: Callable[..., dict[str, str]], other: str
) -> None:
    """Their ledgers would be one there, and their adapters."""
    own = files(a=["x", "y"], b=["x", "y"])
    message = refusal(
        "", data__clients={"mercy": own["a"], other: own["b"]}, data__labels=["x", "y"]
    )
    assert all(repr(name) in message for name in ("mercy", other))
    assert "one folder" in message


# ---------------------------------------------------------------- held out and evaluated


def test_held_out_rows_are_apart_and_of_the_same_mix(tmp_path: Path) -> None:
    rows = [(text, "pos" if n % 4 == 0 else "neg") for n, (text, _) in enumerate(toy_rows(120))]
    data = data_of(write_csv(tmp_path / "a.csv", rows), data__holdout=0.2)
    assert data.rows.keys() == data.heldout.keys() == {"0", "1", "2"}
    for client, kept in data.rows.items():
        apart = data.heldout[client]
        assert not set(kept) & set(apart)
        assert np.bincount(data.train.labels[apart]).tolist() == [6, 2]
        assert np.bincount(data.train.labels[kept]).tolist() == [24, 8]
    together = np.concatenate([*data.rows.values(), *data.heldout.values()])
    assert sorted(together) == list(range(120))


def test_what_a_client_holds_out_is_its_own_draw(files: Callable[..., dict[str, str]]) -> None:
    """Another client's rows do not shift it, and two clients do not hold out the same places."""
    labels = ["x", "y"] * 20
    alone = files(b=labels, c=labels)
    both = files(a=labels, b=labels, c=labels)
    few, many = (
        data_of("", data__clients=clients, data__labels=["x", "y"]) for clients in (alone, both)
    )
    assert (few.heldout["b"] + 40).tolist() == many.heldout["b"].tolist()
    assert (many.heldout["a"] + 40).tolist() != many.heldout["b"].tolist()
    other = data_of("", data__clients=both, data__labels=["x", "y"], run__seed=1)
    assert other.heldout["a"].tolist() != many.heldout["a"].tolist()


PRIVATE = {"privacy__unit": "example"}
OWN = [(f"good film {number}", LABELS[number % 2]) for number in range(200)]
NEW = ("so very warm", "pos")


def placed(folder: Path, rows: list[tuple[str, str]], **changes: Any) -> dict[str, Counter]:
    """Which rows a client with this file trains on, and which it holds out."""
    files = {
        "a": str(write_csv(folder / "a.csv", rows)),
        "b": str(write_csv(folder / "b.csv", OWN)),
    }
    data = data_of("", data__clients=files, data__labels=list(LABELS), **changes)
    return {
        "kept": Counter(rows[row] for row in data.rows["a"]),
        "held": Counter(rows[row] for row in data.heldout["a"]),
    }


@pytest.mark.parametrize("at", [0, 77, 200])
@pytest.mark.parametrize("new", [*[(f"warm {n}", "neg") for n in range(6)], OWN[3]])
def test_a_row_more_changes_its_own_place_alone_under_privacy(
    tmp_path: Path, at: int, new: tuple[str, str]
) -> None:
    """Neighbours differ in one training row or in none; also where the row is there twice."""
    before = placed(tmp_path, OWN, **PRIVATE)
    after = placed(tmp_path, [*OWN[:at], new, *OWN[at:]], **PRIVATE)
    assert before["kept"] - after["kept"] == before["held"] - after["held"] == Counter()
    more = [after[place] - before[place] for place in ("kept", "held")]
    assert sum(more, Counter()) == Counter([new])


def test_copies_of_a_row_are_held_out_each_by_itself(tmp_path: Path) -> None:
    """All at once, a count of the rows that are left would tell how many there are."""
    held = placed(tmp_path, [*OWN, *[NEW] * 100], **PRIVATE)["held"][NEW]
    assert 10 < held < 45  # 25 expected, with a deviation of 4


@pytest.mark.parametrize("at", [0, 1, 120, 199])
def test_a_row_less_or_relabelled_changes_its_own_place_alone_under_privacy(
    tmp_path: Path, at: int
) -> None:
    before = placed(tmp_path, OWN, **PRIVATE)
    less = placed(tmp_path, [*OWN[:at], *OWN[at + 1 :]], **PRIVATE)
    gone = [before[place] - less[place] for place in ("kept", "held")]
    assert sum(gone, Counter()) == Counter([OWN[at]])
    assert less["kept"] - before["kept"] == less["held"] - before["held"] == Counter()
    other = (OWN[at][0], LABELS[1 - LABELS.index(OWN[at][1])])
    turned = placed(tmp_path, [*OWN[:at], other, *OWN[at + 1 :]], **PRIVATE)
    new = [turned[place] - before[place] for place in ("kept", "held")]
    assert sum(new, Counter()) == Counter([other])
    old = [before[place] - turned[place] for place in ("kept", "held")]
    assert sum(old, Counter()) == Counter([OWN[at]])


def test_without_privacy_the_split_keeps_the_mix_of_labels(tmp_path: Path) -> None:
    """And is of the whole file: one row more may move others."""
    before, after = placed(tmp_path, OWN), placed(tmp_path, [NEW, *OWN])
    assert Counter(label for _, label in before["held"].elements()) == {"neg": 25, "pos": 25}
    assert sum((after["kept"] - before["kept"]).values()) > 1


def test_what_is_held_out_under_privacy_is_about_the_share_and_the_seeds(tmp_path: Path) -> None:
    drawn = [placed(tmp_path, OWN, **PRIVATE, run__seed=seed)["held"] for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] != drawn[3]
    sizes = [held.total() for held in drawn]
    assert all(25 < size < 80 for size in sizes)  # 50 expected, with a deviation of 6
    other = shutil.copy(tmp_path / "b.csv", tmp_path / "c.csv")
    public = {"data__holdout": 0.0, "data__evaluate": str(other)}
    nothing = placed(tmp_path, OWN, **PRIVATE, **public)
    assert nothing["held"].total() == 0
    both = data_of(
        "", data__clients={"a": str(tmp_path / "b.csv"), "b": str(other)},
        data__labels=list(LABELS), **PRIVATE,
    )  # fmt: skip
    assert (both.heldout["a"] + 200).tolist() != both.heldout["b"].tolist()


def test_the_second_text_of_a_pair_is_part_of_its_row(tmp_path: Path) -> None:
    rows = [("good", f"film {number}", LABELS[number % 2]) for number in range(100)]
    file = write_csv(tmp_path / "p.csv", rows, ("sentence1", "sentence2", "label"))
    data = data_of("", data__clients={"a": str(file)}, data__labels=list(LABELS), **PRIVATE)
    assert 5 < data.heldout["a"].size < 50


def test_a_client_that_would_hold_out_everything_is_told(tmp_path: Path) -> None:
    """Keeping one all the same would let its place depend on the other rows."""
    rows = [(f"good film {number}", LABELS[number]) for number in range(2)]
    told = []
    for seed in range(20):
        try:
            placed(tmp_path, rows, **PRIVATE, data__holdout=0.9, run__seed=seed)
        except ValueError as error:
            told.append(str(error))
    assert told
    assert (
        "client a would hold out each of its 2 rows (data.holdout = 0.9): hold out less" in told[0]
    )


def test_without_an_evaluation_set_the_held_out_rows_of_all_evaluate(train: Path) -> None:
    data = data_of(train)
    assert data.evaluation is data.train
    assert sorted(data.evaluation_rows) == sorted(np.concatenate(list(data.heldout.values())))


def test_a_set_evaluation_file_evaluates_with_the_central_ids(train: Path, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "dev.csv", [["warm", "pos"], ["cold", "neg"], ["fine", "pos"]])
    data = data_of(train, data__evaluate=str(file))
    assert data.evaluation.labels.tolist() == [1, 0, 1]
    assert data.evaluation_rows.tolist() == [0, 1, 2]
    assert data.evaluation is not data.train


def test_an_evaluation_set_with_another_label_is_refused(train: Path, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "dev.csv", [["warm", "pos"], ["cold", "ngea"]])
    assert "dev.csv, line 3: unknown label 'ngea'" in refusal(train, data__evaluate=str(file))


def test_an_evaluation_set_of_pairs_does_not_fit_single_texts(train: Path, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "dev.csv", [["a", "b", "pos"]], ["sentence1", "sentence2", "label"])
    assert "one has pairs, the other has not" in refusal(train, data__evaluate=str(file))


def test_nothing_to_evaluate_on_is_refused(train: Path) -> None:
    message = refusal(train, data__holdout=0.0)
    assert "set data.evaluate, or data.holdout above 0" in message


def test_a_holdout_that_rounds_to_no_row_is_nothing_to_evaluate_on(tmp_path: Path) -> None:
    """0.1 of four rows of a label is none; without an evaluation set that leaves nothing."""
    file = write_csv(tmp_path / "a.csv", toy_rows(24))
    with pytest.raises(ValueError, match=r"data\.evaluate"):
        data_of(file, data__holdout=0.1)


def test_the_best_adapter_needs_an_evaluation_set_apart(train: Path) -> None:
    assert "run.save_best needs data.evaluate" in refusal(train, run__save_best=True)
    with pytest.raises(ValueError, match=r"run.save_best needs data.holdout"):
        config_of(train, run__save_best=True, data__holdout=0.0)


# ---------------------------------------------------------------- tokens and batches

TEXTS = ["the film was very good", "cold", "bad food and", "so warm a film but not very good food"]
PAIRS = ["warm", "the food was bad", "so", "and"]


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["single", "pairs"])
def test_a_batch_is_what_the_tokenizer_itself_pads(kind: str, pairs: list[str] | None) -> None:
    tokenizer = make_tokenizer(kind)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    examples = encode(Table("t", TEXTS, pairs, ["neg"] * 4), [0, 1, 0, 1], tokenizer, 32)
    rows = np.array([3, 0, 2])
    inputs, labels = examples.batch(rows, CPU)
    texts, seconds = ([part[row] for row in rows] if part else None for part in (TEXTS, pairs))
    want = tokenizer(texts, seconds, padding=True, padding_side="right", return_tensors="pt")
    assert inputs.keys() == want.keys()
    for name, tensor in inputs.items():
        assert torch.equal(tensor, want[name]), name
    assert labels.tolist() == [1, 0, 0]


def test_pairs_of_bert_say_which_text_a_token_is_of() -> None:
    examples = encode(Table("t", TEXTS, PAIRS, ["neg"] * 4), [0] * 4, make_tokenizer("bert"), 32)
    inputs, _ = examples.batch(np.array([1, 0]), CPU)
    assert inputs["token_type_ids"].tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 1, 0],  # [CLS] cold [SEP] the food was bad [SEP] [PAD]
        [0, 0, 0, 0, 0, 0, 0, 1, 1],
    ]
    assert inputs["attention_mask"].sum(dim=1).tolist() == [8, 9]


def test_texts_are_cut_to_the_longest_input() -> None:
    tokenizer = make_tokenizer("bert")
    examples = encode(Table("t", TEXTS, None, ["neg"] * 4), [0] * 4, tokenizer, 5)
    assert examples.lengths.tolist() == [5, 3, 5, 5]
    ends = [examples.inputs["input_ids"][row][-1] for row in range(4)]
    assert set(ends) == {tokenizer.sep_token_id}
    pairs = encode(Table("t", TEXTS, PAIRS, ["neg"] * 4), [0] * 4, tokenizer, 8)
    assert max(pairs.lengths) == 8


def test_a_text_without_a_token_is_refused_with_its_row() -> None:
    """GPT-2 adds no token of its own: a batch of empty texts would have no width."""
    tokenizer = make_tokenizer("gpt2")
    tokenizer.pad_token = "<eos>"
    table = Table("new.csv", ["good", "", "bad"], None, ["neg"] * 3)
    with pytest.raises(ValueError, match=r"new\.csv, row 2"):
        encode(table, [0] * 3, tokenizer, 8)
    assert encode(table, [0] * 3, make_tokenizer("bert"), 8).lengths.tolist() == [3, 2, 3]


def test_pairs_of_a_file_reach_the_batches(tmp_path: Path) -> None:
    rows = [
        {"premise": text, "hypothesis": pair, "label": LABELS[n % 2]}
        for n, (text, pair) in enumerate(zip(TEXTS * 6, PAIRS * 6, strict=True))
    ]
    data = data_of(write_lines(tmp_path / "a.jsonl", rows))
    inputs, _ = data.train.batch(np.array([0]), CPU)
    assert inputs["input_ids"].tolist() == make_tokenizer("bert")(TEXTS[:1], PAIRS[:1])["input_ids"]


def test_published_files_are_dealt_without_edits(data_folder: Path) -> None:
    sst2, mnli = data_folder / "sst2", data_folder / "mnli"
    silos = silos_of(sst2 / "train.tsv", data__evaluate=str(sst2 / "dev.tsv"))
    assert silos.labels == ["0", "1"]
    assert sum(silos.label_ids) == 37_569
    assert np.sum(list(silos.counts.values()), axis=0).tolist() == [67_349 - 37_569, 37_569]
    assert silos.evaluation is not None
    silos = silos_of(mnli / "train_10k.jsonl", data__evaluate=str(mnli / "dev_matched.jsonl"))
    assert silos.labels == ["contradiction", "entailment", "neutral"]
    assert np.sum(list(silos.counts.values()), axis=0).tolist() == [3_349, 3_213, 3_326]


def test_a_hub_set_without_a_validation_split_is_refused_with_remedies(tmp_path: Path) -> None:
    """IMDB has train and test."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):
        texts = [text for text, _ in toy_rows(12)]
        made = datasets.Dataset.from_dict({"text": texts, "label": ["no", "yes"] * 6})
        made.to_parquet(tmp_path / "hub" / f"{split}.parquet")
    source = str(tmp_path / "hub")
    said = refusal(source)
    assert f"cannot load {source}:validation" in said
    assert "set data.evaluate to another split" in said
    assert len(silos_of(source, data__evaluate=f"{source}:test").evaluation or []) == 12
    assert silos_of(source, data__evaluate="none").evaluation is None
    assert "set data.evaluate to" not in refusal(source, data__evaluate=f"{source}:validation")
