"""Class weights; balanced batches: what is in them, for any number of classes and processes."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from fusedacl.engine.data.balance import balanced_batches, class_weights, warn_of_single_texts
from fusedacl.engine.data.batching import epoch_batches

NAMES = ["no", "maybe", "yes"]
LABELS = [0] * 6 + [1] * 2 + [2] * 4


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    expected = compute_class_weight("balanced", classes=np.arange(3), y=np.array(LABELS))
    found = class_weights("balanced", NAMES, LABELS)
    assert found == pytest.approx(expected)
    assert class_weights(None, NAMES, LABELS) is None
    # A class without texts is left out of the balance.
    assert class_weights("balanced", [*NAMES, "none"], LABELS) == pytest.approx([*expected, 1.0])


def test_weights_of_a_file_get_the_mean_1(tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    file.write_text('{"yes": 30, "no": 10, "maybe": 0}')
    found = class_weights(str(file), NAMES, LABELS)
    assert found == pytest.approx([2 / 3, 0, 2])
    assert np.mean([found[label] for label in LABELS]) == pytest.approx(1)
    file.write_text("[10, 0, 30]")
    assert class_weights(str(file), NAMES, LABELS) == found
    file = file.with_suffix(".yaml")
    file.write_text('"yes": 3e1\n"no": 1e1\nmaybe: 0\n')  # YAML reads 3e1 as text
    assert class_weights(str(file), NAMES, LABELS) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"yes": 1, "no": 1}', "class 'maybe' has no weight"),
        ('{"yes": 1, "no": 1, "mayb": 1}', "there is no class 'mayb'. Did you mean 'maybe'"),
        ('{"yes": 1, "no": -1, "maybe": 1}', "class 'no' has -1"),
        ('{"yes": 1, "no": true, "maybe": 1}', "class 'no' has True"),
        ('{"yes": 1, "no": NaN, "maybe": 1}', "class 'no' has nan"),
        ('{"yes": 0, "no": 0, "maybe": 0}', "every training text has weight 0"),
        ("[1, 2]", "lists 2 weights for 3 classes: give one for each, in the order no, maybe, yes"),
        ("[1, 2, -3]", "class 'yes' has -3"),
        ('{"yes": "much", "no": 1, "maybe": 1}', "class 'yes' has 'much'"),
        ('{"yes": "nan", "no": 1, "maybe": 1}', "class 'yes' has nan"),
        ("yes: 2", """there is no class 'True'. YAML reads yes, no, on, off as True, False: put"""),
        ("3", "holds 3: give every class a weight"),
        ("{", "is neither 'balanced' nor a file"),
    ],
)
def test_a_bad_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / ("weights.yaml" if text == "yes: 2" else "weights.json")
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        class_weights(str(file), NAMES, LABELS)
    assert message in str(error.value)
    with pytest.raises(ValueError, match="neither 'balanced' nor a file: .* does not exist"):
        class_weights("balance", NAMES, LABELS)


def contrastive(order: np.ndarray, size: int, parts: int, chunk: int) -> list[np.ndarray]:
    """The rows of each full contrastive batch, as the processes of a run take them."""
    micro = [order[i : i + chunk * parts] for i in range(0, len(order), chunk * parts)]
    together = size // chunk
    found = []
    for start in range(0, len(order) // (size * parts) * together, together):
        for part in range(parts):
            rows = [batch[part::parts] for batch in micro[start : start + together]]
            found.append(np.concatenate(rows))
    return found


@pytest.mark.parametrize(
    ("num_classes", "per_class", "size", "parts", "chunk"),
    [(2, None, 16, 1, 16), (6, 4, 24, 1, 24), (6, 2, 8, 2, 8), (3, 4, 12, 2, 6), (20, 2, 16, 3, 4)],
)
def test_full_batches_are_balanced_and_every_text_is_seen_once(
    num_classes: int, per_class: int | None, size: int, parts: int, chunk: int
) -> None:
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat(np.arange(num_classes), 24))
    made = balanced_batches(labels, size, per_class, parts)
    order = made.order(seed=1, epoch=0)
    assert sorted(order) == list(range(len(labels)))
    for rows in contrastive(order, size, parts, chunk):
        counts = np.bincount(labels[rows])
        assert set(counts[counts > 0]) == {made.per_class}
    assert (made.order(seed=1, epoch=0) == order).all()
    for seed, epoch in ((1, 1), (2, 0)):
        assert (made.order(seed=seed, epoch=epoch) != order).any()


def test_rare_classes_last_as_long_as_they_can() -> None:
    labels = np.repeat([0, 1, 2], [90, 30, 30])
    made = balanced_batches(labels, 12, 6)
    order = made.order(seed=0, epoch=0)
    assert sorted(order) == list(range(150))
    batches = epoch_batches(np.ones(150), 12, seed=0, epoch=0, balanced=made)
    assert np.array_equal(np.concatenate(batches), order)
    assert [len(rows) for rows in batches] == [12] * 12 + [6]
    found = [np.bincount(labels[rows], minlength=3) for rows in batches]
    full = sum(sorted(counts) == [0, 6, 6] for counts in found)
    assert full == made.num_full == 10  # as many as the 60 texts of the rare classes allow


@pytest.mark.parametrize(
    ("size", "per_class", "message"),
    [
        (32, 4, "32 texts, so 8 classes, and the training texts have 3. Use 16, or leave it out"),
        (32, 5, "32 texts, which it does not divide into classes. Use 16"),
        (12, 12, "so 1 classes"),
        (3, None, "3 texts, of which a contrastive batch consists, cannot be divided into 2 to 3"),
    ],
)
def test_refused(size: int, per_class: int | None, message: str) -> None:
    with pytest.raises(ValueError) as error:
        balanced_batches(np.repeat([0, 1, 2], 20), size, per_class)
    assert message in str(error.value)


def test_classes_without_enough_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 2 classes with as many texts, and 1 of 3 have"):
        balanced_batches(np.repeat([0, 1, 2], [40, 7, 7]), 16, 8)


def test_texts_that_share_no_label_are_counted(caplog) -> None:
    labels = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]) > 0
    warn_of_single_texts(labels, [np.arange(3), np.arange(3, 6)], 1, 1)
    assert "6 of 6 training texts (100%) have no other text of their labels" in caplog.text
    assert "Use a larger contrastive_batch_size." in caplog.text
    caplog.clear()
    # All six in one batch: the text without a label is alone.
    warn_of_single_texts(labels, [np.arange(3), np.arange(3, 6)], 2, 1)
    assert not caplog.messages


def test_texts_without_another_of_their_class_are_counted(caplog) -> None:
    labels = np.array([0, 1, 2, 3, 0, 1, 2, 2])
    batches = [np.arange(4), np.arange(4, 8)]
    warn_of_single_texts(labels, batches, 1, 1)
    assert "6 of 8 training texts (75%) have no other text of their class" in caplog.text
    assert "contrastive batch of 4" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        # All eight in one batch: one text is alone. Two halves, of every other text: two are.
        warn_of_single_texts(labels, batches, 2, 1)
        assert not caplog.messages
        warn_of_single_texts(labels, [np.arange(8)], 1, 2)
    assert not caplog.messages
