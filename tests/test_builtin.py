"""The built-in reviews: frozen, balanced, and with words in evaluation that training never had."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import cache

import pytest

from fedlora import builtin
from fedlora.builtin import LABELS, LEXICON, MAX_EXAMPLES, SHOPS, TEMPLATES, Split, reviews

SPLITS: tuple[Split, ...] = ("train", "evaluate")
EVERY = [template for family in TEMPLATES.values() for template in family]
ROUND = 2 * len(SHOPS) * len(EVERY)  # rows after which every template came alike often
Row = dict[str, str]


@cache
def all_rows(split: Split) -> list[Row]:
    """All that can be asked for."""
    return reviews(split, MAX_EXAMPLES)


def polarity_words(split: Split) -> dict[str, str]:
    """word -> the label it speaks for."""
    return {
        word: label
        for label, kinds in LEXICON[split].items()
        for words in kinds.values()
        for word in words
    }


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower())


def share_a_stem(left: str, right: str) -> bool:
    """Crude and strict: the first five letters, or four once a negative prefix is off."""
    bare = [re.sub(r"^(un|in|im|dis|mis|non)(?=.{4})", "", word) for word in (left, right)]
    return left[:5] == right[:5] or bare[0][:4] == bare[1][:4]


def best_guess(rows: Iterable[Row], feature: Callable[[Row], object]) -> float:
    """Accuracy of the best rule that sees the feature alone, on the rows that it was made from."""
    seen: dict[object, Counter[str]] = defaultdict(Counter)
    for row in rows:
        seen[feature(row)][row["label"]] += 1
    right = sum(max(counts.values()) for counts in seen.values())
    return right / sum(counts.total() for counts in seen.values())


def pattern(template: str, split: Split) -> re.Pattern[str]:
    """What the template can become, after any opener: one group per polarity word, +0, -1, ..."""
    kinds = {
        kind: "|".join(word for label in LABELS for word in LEXICON[split][label][kind])
        for kind in LEXICON[split][LABELS[0]]
    }
    found, last = r"(?:.+\. )?", 0
    seen: set[str] = set()
    for count, slot in enumerate(re.finditer(r"\{([^}]+)\}", template)):
        found += re.sub(r"(?<!\w)([Aa])\\ $", r"\1n?\\ ", re.escape(template[last : slot.start()]))
        name, sign = slot[1], slot[1][0]
        if sign in "+-":
            found += f"(?P<{'same' if sign == '+' else 'flipped'}{count}>{kinds[name[1:]]})"
        else:
            found += f"(?P={name})" if name in seen else rf"(?P<{name}>[\w& ]+)"
            seen.add(name)
        last = slot.end()
    return re.compile(found + re.escape(template[last:]))


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(split: Split) -> None:
    assert reviews(split, 300, seed=4) == reviews(split, 300, seed=4)
    texts = [{row["text"] for row in reviews(split, 300, seed)} for seed in (4, 5)]
    assert len(texts[0] & texts[1]) < 30


def test_the_text_is_frozen() -> None:
    """A change here is a new task: numbers measured before and after cannot be compared."""
    rows = [reviews(split, 900, seed=0) for split in SPLITS]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest == "3b56aa5105280e72d0113463591fff5ed143f49740b7e529623e4298109f2662"


@pytest.mark.parametrize("split", SPLITS)
def test_fewer_rows_are_a_subset_of_more(split: Split) -> None:
    few, many = ({row["text"] for row in reviews(split, count)} for count in (50, 500))
    assert few < many


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("examples", [1, 7, 100, 600, 1500])
def test_labels_and_shops_come_alike_often(split: Split, examples: int) -> None:
    rows = reviews(split, examples)
    assert len(rows) == examples
    assert all(list(row) == ["shop", "text", "label"] for row in rows)
    for key, values in (("label", LABELS), ("shop", SHOPS)):
        counts = Counter(row[key] for row in rows)
        assert set(counts) <= set(values)
        assert {counts[value] for value in values} <= {
            examples // len(values),
            -(-examples // len(values)),
        }


def test_each_polarity_of_each_split_has_words_enough() -> None:
    for split, label in itertools.product(SPLITS, LABELS):
        words = [word for kind in LEXICON[split][label].values() for word in kind]
        assert len(words) == len(set(words)) >= 40


def test_evaluation_words_share_no_stem_with_training_words() -> None:
    train, evaluate = (polarity_words(split) for split in SPLITS)
    assert share_a_stem("disappointed", "disappointing")
    assert share_a_stem("reliable", "unreliable")
    assert not set(train) & set(evaluate)
    pairs = itertools.product(train, evaluate)
    assert [pair for pair in pairs if share_a_stem(*pair)] == []
    pairs = itertools.product(train, evaluate)
    assert [(a, b) for a, b in pairs if a in b or b in a] == []


def test_no_evaluation_word_occurs_in_any_training_text_nor_the_other_way_round() -> None:
    """By whole word and by its first five letters, over all that can be asked for."""
    seen = {
        split: {word for row in all_rows(split) for word in words_of(row["text"])}
        for split in SPLITS
    }
    for split, other in (SPLITS, SPLITS[::-1]):
        assert set(polarity_words(split)) <= seen[split]
        stems = {word[:5] for word in polarity_words(other)}
        assert [word for word in seen[split] if word[:5] in stems] == []


def test_what_the_splits_share_carries_no_polarity() -> None:
    """Cues, shops and openers are shared; a polarity word comes only through the lexicon."""
    shared = " ".join([*EVERY, *builtin._OPENERS, *SHOPS, *map(str, builtin._SHOPS.values())])
    shared += str(builtin._FILLERS)
    stems = {word[:5] for split in SPLITS for word in polarity_words(split)}
    neutral = words_of(re.sub(r"\{[^}]+\}", "", " ".join(EVERY))) + words_of(shared)
    assert [word for word in neutral if word[:5] in stems] == []


def test_no_text_comes_twice_in_a_split_or_in_both() -> None:
    texts = [row["text"] for split in SPLITS for row in all_rows(split)]
    assert len(set(texts)) == 2 * MAX_EXAMPLES


@pytest.mark.parametrize("split", SPLITS)
def test_every_template_has_both_labels_alike_and_its_words_give_the_label(split: Split) -> None:
    """Read back from the text: which template it is, and what its marked words say."""
    counts: Counter[tuple[str, str]] = Counter()
    polarity = polarity_words(split)
    patterns = [(template, pattern(template, split)) for template in EVERY]
    for row in reviews(split, ROUND):
        matches = [(template, p.fullmatch(row["text"])) for template, p in patterns]
        found = [(template, match) for template, match in matches if match]
        assert len(found) == 1, row
        template, match = found[0]
        counts[template, row["label"]] += 1
        for slot, word in match.groupdict().items():
            if slot.startswith(("same", "flipped")):
                assert (polarity[word] == row["label"]) == slot.startswith("same"), row
    assert counts == {pair: len(SHOPS) for pair in itertools.product(EVERY, LABELS)}


@pytest.mark.parametrize("split", SPLITS)
def test_neither_shop_nor_length_nor_first_word_tells_the_label(split: Split) -> None:
    rows = all_rows(split)
    assert best_guess(rows, lambda row: row["shop"]) == 0.5
    assert best_guess(rows, lambda row: len(row["text"].split())) < 0.52
    assert best_guess(rows, lambda row: len(row["text"])) < 0.56
    assert best_guess(rows, lambda row: row["text"].split()[0]) < 0.52


@pytest.mark.parametrize("split", SPLITS)
def test_counting_words_of_known_polarity_is_not_enough(split: Split) -> None:
    """Even who knows the lexicon by heart, and counts, is wrong in three rows of ten."""
    polarity = polarity_words(split)

    def balance(row: Row) -> int:
        found = [polarity[word] for word in words_of(row["text"]) if word in polarity]
        return found.count("positive") - found.count("negative")

    assert best_guess(all_rows(split), balance) < 0.7


@pytest.mark.parametrize("split", SPLITS)
def test_reviews_are_short_whole_sentences(split: Split) -> None:
    rows = all_rows(split)
    lengths = sorted(len(row["text"].split()) for row in rows)
    assert lengths[0] >= 8
    assert lengths[len(lengths) // 2] <= 18
    assert lengths[-1] <= 35
    for row in rows:
        assert re.fullmatch(r"[A-Z][^{}]+\.", row["text"]), row
        assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiou]|(\b\w+) \1\b|  ", row["text"]), row


@pytest.mark.usefixtures("as_users_run_it")
def test_an_unknown_split_or_an_impossible_count_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'test'; there are train and evaluate"):
        reviews("test", 10)  # type: ignore[arg-type]
    for examples in (0, -3, MAX_EXAMPLES + 1):
        with pytest.raises(ValueError, match=f"examples is {examples}; .* 1 to {MAX_EXAMPLES}"):
            reviews("train", examples)
