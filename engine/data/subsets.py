"""Parts of a training split, drawn at random: a validation split, and some texts of each class."""

from collections import defaultdict
from collections.abc import Sequence
from random import Random

from .columns import TextSplit


def draw_subsets(
    train: TextSplit,
    class_names: Sequence[str],
    seed: int,
    *,
    samples_per_class: int | None = None,
    validation_percentage: int | None = None,
    where: str,
) -> tuple[TextSplit, TextSplit | None]:
    """Texts to train on, at most `samples_per_class` of each, and a share of each for validation.

    Both keep the order of the split. The seed puts the texts of each class in an order: validation
    takes the first, training the last, so that ten texts of each class are among the fifty of the
    same seed, with and without a validation split. Without a percentage, there is no such split:
    the second value is None. Texts that may have several labels are drawn as if of one class.

    Raises:
        ValueError: a class is too small to have a text in both.
    """
    assert train.labels is not None
    draw = Random(seed)
    keys = [draw.random() for _ in train.labels]
    by_class: defaultdict[int | None, list[int]] = defaultdict(list)
    for row in sorted(range(len(keys)), key=keys.__getitem__):
        by_class[None if train.num_labels else train.labels[row]].append(row)
    trained: list[int] = []
    held_out: list[int] = []
    for label, rows in by_class.items():
        number = 0
        if validation_percentage is not None:
            number = max(1, round(len(rows) * validation_percentage / 100))
            if number == len(rows):
                of_class = "" if label is None else f" of class {class_names[label]!r}"
                raise ValueError(
                    f"validation_split_percentage={validation_percentage}: {where} has "
                    f"{len(rows)} texts{of_class}: too few for training and validation. Add texts, "
                    "or name a validation_file instead."
                )
        held_out += rows[:number]
        trained += rows[number:][-(samples_per_class or len(rows)) :]
    held_out_split = None if validation_percentage is None else train.take(sorted(held_out))
    return train.take(sorted(trained)), held_out_split
