"""Balance of the classes: their weights in the losses, and batches with several texts each.

The batches are those of `MPerClassSampler` (pytorch-metric-learning) and `GROUP_BY_LABEL`
(sentence-transformers), except that every text is in one of them: no text is drawn twice in an
epoch, and none is left out.
"""

import contextlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.files import read_values
from ..runtime.text import did_you_mean

logger = logging.getLogger("fusedacl")
BALANCED = "balanced"


def class_weights(
    option: str | None, label_names: Sequence[str], labels: Sequence[int]
) -> list[float] | None:
    """One weight per class, in the order of the logits; None without the option.

    They are scaled to a mean of 1 over the training texts, so that the learning rate keeps its
    meaning.

    Args:
        option: "balanced" (one over the number of a class's texts; 1 for a class without any), or
            a JSON or YAML file with a weight for each class, by name or in the order of the logits.
        labels: classes of the training texts.

    Raises:
        ValueError: the file cannot be read, a class is missing or unknown, a list has another
            length, a weight is negative or no number, or all texts have weight 0.
    """
    if option is None:
        return None
    counts = np.bincount(np.asarray(labels), minlength=len(label_names))
    if option == BALANCED:
        num_found = np.count_nonzero(counts)
        weights = np.where(counts > 0, len(labels) / (num_found * np.maximum(counts, 1)), 1.0)
    else:
        weights = np.array(_read(option, label_names))
        mean = float(weights @ counts) / len(labels)
        if mean <= 0:
            raise ValueError(f"class_weights={option!r}: every training text has weight 0.")
        weights /= mean
    named = ", ".join(f"{n} {w:.3g}" for n, w in zip(label_names, weights, strict=True))
    logger.info("Class weights: %s.", named if len(label_names) <= 20 else f"{named[:300]} …")
    return [float(weight) for weight in weights]


def _read(path: str, label_names: Sequence[str]) -> list[float]:
    where = f"class_weights={path!r}"
    try:
        found = read_values(path)
    except ValueError as error:
        raise ValueError(f"{where} is neither {BALANCED!r} nor a file: {error}") from None
    if isinstance(found, list):
        if len(found) != len(label_names):
            raise ValueError(
                f"{where} lists {len(found)} weights for {len(label_names)} classes: give one for "
                f"each, in the order {', '.join(label_names)}, or a mapping of class to weight."
            )
        found = dict(zip(label_names, found, strict=True))
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds {found!r}: give every class a weight, `class: weight`.")
    for key in found:
        if str(key) not in label_names:
            hint = did_you_mean(str(key), label_names)
            if isinstance(key, bool):
                hint = ' YAML reads yes, no, on, off as True, False: put them in quotes, "yes": 2.'
            raise ValueError(f"{where}: there is no class {str(key)!r}.{hint}")
    found = {str(name): weight for name, weight in found.items()}
    weights = []
    for name in label_names:
        weight: Any = found.get(name)
        if isinstance(weight, str):
            # YAML reads 1e-1, without a dot, as text.
            with contextlib.suppress(ValueError):
                weight = float(weight)
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not math.isfinite(weight) or weight < 0:
            raise ValueError(
                f"{where}: class {name!r} has {'no weight' if weight is None else repr(weight)}; "
                "give every class a number of 0 or more."
            )
        weights.append(float(weight))
    return weights


@dataclass(frozen=True)
class BalancedBatches:
    """Orders of the training texts in which a batch has several texts of each of its classes.

    A full batch has `num_classes` classes with `per_class` texts each.

    Args:
        labels: classes of the texts [N].
        size: texts of a batch in which texts are contrasted with each other.
        interleaved: number of such batches that are read together, their rows in turns: batch b has
            rows b, b + interleaved, … of the stretch that they share.
    """

    labels: np.ndarray
    size: int
    per_class: int
    interleaved: int = 1

    @property
    def num_classes(self) -> int:
        return self.size // self.per_class

    @property
    def num_full(self) -> int:
        """Number of full batches in an epoch."""
        left = np.unique(self.labels, return_counts=True)[1] // self.per_class
        number = 0
        while np.count_nonzero(left) >= self.num_classes:
            left[np.argsort(-left)[: self.num_classes]] -= 1
            number += 1
        return number

    def order(self, *, seed: int, epoch: int) -> np.ndarray:
        """All rows [N] in the order of an epoch; it depends on the arguments only.

        While there are enough classes with `per_class` texts left, a batch takes those with the
        most. The rest is dealt out so that the texts of a class lie far apart in groups. Full
        batches are shuffled.
        """
        random = np.random.default_rng([seed, epoch])
        shuffled = random.permutation(len(self.labels))
        by_class = [shuffled[self.labels[shuffled] == c] for c in np.unique(self.labels)]
        groups = [
            [rows[start : start + self.per_class] for start in range(0, len(rows), self.per_class)]
            for rows in by_class
        ]
        batches = []
        left = np.array([len(rows) // self.per_class for rows in by_class])
        while np.count_nonzero(left) >= self.num_classes:
            # Classes with equally many are drawn at random.
            most = np.lexsort([random.random(len(left)), -left])[: self.num_classes]
            batches.append(np.concatenate([groups[index].pop(0) for index in most]))
            left[most] -= 1
        # The middle of each group's share of its class: groups of a class come at equal distances.
        rest = [
            ((place + 0.5) / len(parts), random.random(), part)
            for parts in groups
            for place, part in enumerate(parts)
        ]
        rest.sort(key=lambda entry: entry[:2])
        tail = np.concatenate([part for _, _, part in rest]) if rest else np.zeros(0, np.int64)
        num_full = len(tail) // self.size
        batches += [tail[i * self.size : (i + 1) * self.size] for i in range(num_full)]
        random.shuffle(batches)
        return self._interleave([*batches, tail[num_full * self.size :]])

    def _interleave(self, batches: list[np.ndarray]) -> np.ndarray:
        rows = np.concatenate(batches)
        together = self.size * self.interleaved
        whole = len(rows) // together * together
        blocks = rows[:whole].reshape(-1, self.interleaved, self.size)
        return np.concatenate([blocks.transpose(0, 2, 1).ravel(), rows[whole:]])


def balanced_batches(
    labels: np.ndarray, size: int, per_class: int | None, interleaved: int = 1
) -> BalancedBatches:
    """`BalancedBatches`; `per_class` None: as few texts as the number of classes allows.

    Raises:
        ValueError: the texts have fewer classes than a batch needs, or it cannot be divided.
    """
    num_found = len(np.unique(labels))
    possible = [size // n for n in range(2, min(num_found, size // 2) + 1) if size % n == 0]
    if not possible:
        raise ValueError(
            f"sampler=balanced: {size} texts, of which a contrastive batch consists, cannot be "
            f"divided into 2 to {num_found} classes with as many texts each: use another "
            "per_device_train_batch_size."
        )
    chosen = possible[-1] if per_class is None else per_class
    if chosen not in possible:
        why = "which it does not divide into classes"
        if size % chosen == 0:
            why = f"so {size // chosen} classes, and the training texts have {num_found}"
        raise ValueError(
            f"samples_per_class={chosen}: a contrastive batch has {size} texts, {why}. Use "
            f"{', '.join(map(str, reversed(possible)))}, or leave it out."
        )
    made = BalancedBatches(labels, size, chosen, interleaved)
    if made.num_full == 0:
        counts = np.unique(labels, return_counts=True)[1]
        raise ValueError(
            f"samples_per_class={chosen}: a contrastive batch of {size} texts needs "
            f"{made.num_classes} classes with as many texts, and {(counts >= chosen).sum()} of "
            f"{num_found} have them. Use a smaller per_device_train_batch_size, or sampler=random."
        )
    return made


def warn_of_single_texts(
    labels: np.ndarray, batches: Sequence[np.ndarray], together: int, parts: int
) -> None:
    """Warn if most texts are contrasted with no other text of their class, or of their labels.

    Args:
        labels: classes [N], or the labels that apply, bool [N, K].
        batches: rows of the micro-batches of an epoch.
        together: micro-batches that are one contrastive batch.
        parts: contrastive batches in it, whose rows take turns: part p has rows p, p + parts, ….
    """
    num_single = num_texts = 0
    for start in range(0, len(batches), together):
        for part in range(parts):
            rows = np.concatenate([rows[part::parts] for rows in batches[start : start + together]])
            num_single += _num_single(labels[rows])
            num_texts += len(rows)
    if 2 * num_single > num_texts:
        size = -(-len(batches[0]) // parts) * together
        several = labels.ndim == 2
        remedies = "a larger contrastive_batch_size"
        if not several:
            remedies = f"sampler=balanced, {remedies} or negatives=global"
        logger.warning(
            "%d of %d training texts (%.0f%%) have no other text of their %s in their "
            "contrastive batch of %d, so the contrastive loss has no text to draw them to. Use %s.",
            num_single, num_texts, 100 * num_single / num_texts,
            "labels" if several else "class", size, remedies,
        )  # fmt: skip


def _num_single(labels: np.ndarray) -> int:
    """The number of texts of a batch that share no label with another one."""
    if labels.ndim == 1:
        return int((np.bincount(labels) == 1).sum())
    shared = labels & (labels.sum(axis=0) > 1)
    return int((~shared.any(axis=1)).sum())
