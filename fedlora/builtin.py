"""The built-in task: short shop reviews that this file generates; nobody wrote or bought anything.

The polarity words of the two splits share no stem, so only what the pre-trained model knows of
words carries over; negation, contrast and weighing clauses keep a bag of words from finding the
label. Knows no model and no tokenizer. Frozen: any change of text or lexicon is a new task.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from typing import Literal, TypeVar

Split = Literal["train", "evaluate"]
T = TypeVar("T")

LABELS = ("negative", "positive")
MAX_EXAMPLES = 12_000  # a split; even the least varied template can make seventy times its share

_SHOPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # shop: (products, parts)
    "Lumen & Oak": (
        ("lamp", "bookshelf", "armchair", "side table", "bed frame", "desk", "wardrobe"),
        ("finish", "assembly", "delivery", "colour", "packaging", "shape", "surface"),
    ),
    "Pomelo Kitchen": (
        ("kettle", "toaster", "blender", "frying pan", "coffee grinder", "juicer", "oven dish"),
        ("handle", "base", "design", "coating", "manual", "delivery", "customer service"),
    ),
    "Tidewater Books": (
        ("novel", "cookbook", "biography", "detective story", "travel guide", "memoir", "textbook"),
        ("binding", "cover", "writing", "translation", "printing", "introduction", "layout"),
    ),
    "Larkspur Outfitters": (
        ("raincoat", "cardigan", "backpack", "ski suit", "tent", "jacket", "sleeping bag"),
        ("size", "zip", "stitching", "lining", "fabric", "colour", "exchange service"),
    ),
    "Nimbus Audio": (
        ("headset", "speaker", "alarm clock", "webcam", "tablet", "microphone", "radio"),
        ("sound", "battery", "casing", "app", "cable", "setup", "technical support"),
    ),
    "Saffron Corner": (
        ("curry paste", "meal kit", "tea blend", "spice set", "cheese box", "gift box", "soup mix"),
        ("flavour", "aroma", "texture", "label", "recipe card", "wrapping", "delivery"),
    ),
}
SHOPS: tuple[str, ...] = tuple(_SHOPS)

# adj: "it is ..."; noun: "it is a ..."; verb: "I ... it"; moved: "it ... me"; say: "I have no ...".
_WORDS: dict[str, dict[str, dict[str, str]]] = {
    "train": {
        "positive": {
            "adj": "excellent wonderful superb great fantastic lovely outstanding impressive"
            " brilliant flawless perfect good enjoyable satisfying terrific pleasant charming"
            " dependable remarkable worthwhile top-notch incredible",
            "noun": "success joy bargain pleasure winner masterpiece blessing highlight wonder",
            "verb": "loved enjoyed liked appreciated recommended",
            "moved": "impressed pleased satisfied charmed excited reassured",
            "say": "praise compliments enthusiasm appreciation",
        },
        "negative": {
            "adj": "terrible horrible bad poor awful disappointing appalling useless mediocre"
            " annoying shoddy unacceptable pathetic rubbish miserable unpleasant ridiculous"
            " disgraceful inferior faulty hopeless unbearable",
            "noun": "failure disappointment mess joke mistake disgrace rip-off horror problem",
            "verb": "hated disliked regretted rejected avoided",
            "moved": "annoyed disappointed horrified bored upset worried",
            "say": "complaints criticism objections worries",
        },
    },
    "evaluate": {
        "positive": {
            "adj": "amazing splendid delightful gorgeous marvellous fabulous magnificent"
            " breathtaking stunning refreshing exquisite phenomenal glorious nice decent"
            " sensational beautiful admirable spectacular attractive sublime heavenly",
            "noun": "delight gem treasure triumph marvel treat hit beauty jewel",
            "verb": "adored admired cherished treasured relished",
            "moved": "delighted thrilled enchanted amazed captivated cheered",
            "say": "admiration applause affection gratitude",
        },
        "negative": {
            "adj": "dreadful atrocious lousy abysmal lamentable dismal nasty frustrating inadequate"
            " substandard pitiful ghastly deplorable shameful irritating disgusting"
            " infuriating crummy embarrassing hideous tasteless awkward",
            "noun": "disaster nightmare letdown dud catastrophe flop fiasco insult embarrassment",
            "verb": "detested loathed scorned resented abhorred",
            "moved": "frustrated irritated infuriated disgusted dismayed saddened",
            "say": "grievances disdain resentment contempt",
        },
    },
}
LEXICON: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    split: {
        polarity: {kind: tuple(words.split()) for kind, words in kinds.items()}
        for polarity, kinds in polarities.items()
    }
    for split, polarities in _WORDS.items()
}

# "+" marks a word of the label's polarity, "-" one of the other. Every template comes with both
# labels, so it says nothing about the label.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": (
        "The {product} is {really} {+adj}, and the {part} is {+adj} too.",
        "I {+verb} the {product}, and the {part} {+moved} me as well.",
        "This {product} is a {+noun}, and the {part} is {really} {+adj}.",
        "What a {+noun}! The {product} {+moved} everyone in the house.",
        "The {part} is {+adj}, the {other} is {+adj}, and the {product} is {really} {+adj}.",
        "After a month with the {product}, I find the {part} {+adj} and the {other} {+adj}.",
        "Everyone at home {+verb} the {product}: a {+noun}, in one word.",
        "The {product} {+moved} me from the first day, and the {part} is {really} {+adj}.",
        "{shop} sent me a {+adj} {product}; the {part} is {+adj} and the {other} {+moved} me.",
        "It is a {+adj} {product}, and I {+verb} the {part} too.",
    ),
    "cue without negation": (
        "The {product} is nothing short of {+adj}, and the {part} {+moved} me.",
        "As far as the {product} goes, I have nothing but {+say}.",
        "The {product} was not only {+adj} but also a {+noun}.",
        "I do not hesitate to call the {product} a {+noun}.",
    ),
    "negation": (
        "The {product} is anything but {-adj}, if you ask me.",
        "The {product} was not exactly {-adj}, and the {part} was hardly {-adj} either.",
        "The {product} and the {part} were both far from {-adj}.",
        "As far as the {product} goes, I have no {-say}.",
        "I would not call the {product} a {-noun} at all.",
        "I have had the {product} for a month, and it is not {-adj} at all.",
    ),
    "contrast": (
        "The {product} looked {-adj} at first, but it turned out to be {+adj}.",
        "The {part} {-moved} me at first, but in the end I {+verb} the {product}.",
        "The {part} was {-adj}, yet the {product} as a whole is a {+noun}.",
        "The {part} was a {-noun}, but the {product} itself is not {-adj} at all.",
        "For a week I {-verb} the {product}, but by now I find it {really} {+adj}.",
    ),
    "concession": (
        "Although the {part} was {-adj}, the {product} is {+adj} overall.",
        "I {+verb} the {product}, even though the {part} was {really} {-adj}.",
        "Despite the {-adj} {part}, the {product} {+moved} me.",
        "The {product} is a {+noun} in spite of the {-adj} {part}.",
    ),
    "mixed": (
        "The {part} was {-adj} and the {other} was {+adj}; the {other} matters far more to me.",
        "The {part} was {+adj} and the {other} was {-adj}; the {part} matters far more to me.",
        "What counts is the {part}, and that was {+adj}, even though the {other} was {-adj}.",
        "The {part} was {-adj}, but what counts is the {other}, and that was {+adj}.",
        "With this {product}, the {+adj} {part} outweighs the {-adj} {other}.",
        "With this {product}, the {-adj} {part} is outweighed by the {+adj} {other}.",
    ),
    "expectation": (
        "I expected a {-noun} and got a {+noun} of a {product}.",
        "Other people call the {product} {-adj}; to me it is {really} {+adj}.",
        "Other people call the {product} {-adj}; I found the exact opposite.",
        "Instead of the {-noun} I had expected, {shop} sent me a {product} that I {+verb}.",
    ),
}

_OPENERS = (  # neutral: they say nothing about the label
    "My second order from {shop}.",
    "Bought in {month} at {shop}.",
    "I ordered a {product} from {shop} in {month}.",
    "It was for my {relative}.",
    "My {relative} picked it in {month}.",
)
_FILLERS = {
    "really": ("really", "truly", "simply", "frankly", "just"),
    "month": ("January", "March", "April", "June", "August", "October", "November"),
    "relative": ("brother", "mother", "neighbour", "son", "cousin", "aunt", "flatmate"),
}


def reviews(split: Split, examples: int, seed: int = 0) -> list[dict[str, str]]:
    """Generated rows with keys shop, text and label, balanced over shops and labels, shuffled.

    The same on every platform; no text occurs twice, within a split or in both; fewer rows of a
    seed are a subset of more. ValueError for an unknown split or an impossible number of rows.
    """
    if split not in LEXICON:
        raise ValueError(f"unknown split {split!r}; there are {' and '.join(LEXICON)}")
    if not 1 <= examples <= MAX_EXAMPLES:
        raise ValueError(f"examples is {examples}; it can make 1 to {MAX_EXAMPLES} a split")
    every = [template for family in TEMPLATES.values() for template in family]
    templates = _shuffled(every, _stream(seed, split, "templates"))
    rows: dict[str, dict[str, str]] = {}
    for index in range(examples):
        turn, place = divmod(index, len(SHOPS))
        shop, label = SHOPS[place], LABELS[(turn + place) % 2]
        template = templates[(turn // 2 + 5 * place) % len(templates)]  # once with either label
        for attempt in itertools.count():
            rng = _stream(seed, split, f"{index}/{attempt}")
            text = _write(template, shop, label, LEXICON[split], rng)
            if text not in rows:
                break
        rows[text] = {"shop": shop, "text": text, "label": label}
    return _shuffled(list(rows.values()), _stream(seed, split, "order"))


def _write(
    template: str,
    shop: str,
    label: str,
    lexicon: dict[str, dict[str, tuple[str, ...]]],
    rng: random.Random,
) -> str:
    """The template filled in for this shop and label; no polarity word comes twice."""
    opposite = LABELS[1 - LABELS.index(label)]
    products, parts = _SHOPS[shop]
    part, other = _shuffled(parts, rng)[:2]
    fixed = {"shop": shop, "product": _pick(products, rng), "part": part, "other": other}
    opener = f"{_pick(_OPENERS, rng)} " if rng.random() < 0.5 else ""
    pieces = re.split(r"\{([^}]+)\}", opener + template)  # text, slot, text, slot, ..., text
    for place in range(1, len(pieces), 2):
        slot = pieces[place]
        if slot in fixed:
            pieces[place] = fixed[slot]
        elif slot in _FILLERS:
            pieces[place] = _pick(_FILLERS[slot], rng)
        else:
            words = lexicon[label if slot[0] == "+" else opposite][slot[1:]]
            pieces[place] = _pick([word for word in words if word not in pieces], rng)
    return re.sub(r"\b([Aa]) (?=[aeiou])(?!use)", r"\1n ", "".join(pieces))


def _stream(seed: int, split: str, name: str) -> random.Random:
    """A named stream; only its random() is used, which Python keeps the same for ever."""
    digest = hashlib.sha256(f"{seed}/{split}/{name}".encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _pick(items: Sequence[T], rng: random.Random) -> T:
    return items[int(rng.random() * len(items))]


def _shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    keys = [rng.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]
