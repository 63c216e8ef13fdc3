from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusedacl.engine.data import batching
from fusedacl.engine.data.batching import (
    EncodedSplit,
    collate,
    encode,
    epoch_batches,
    evaluation_batches,
)
from fusedacl.engine.data.columns import TextSplit
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoTokenizer,
    BertTokenizerFast,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{number}" for number in range(20)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer of 25 entries for a model of 32 positions; word w5 is token 10."""
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(SPECIAL_TOKENS + WORDS), encoding="utf-8")
    tokenizer = BertTokenizerFast(str(path), model_max_length=32)
    assert tokenizer("w5")["input_ids"] == [2, 10, 3]
    return tokenizer


def random_pairs(num_rows: int, longest: int) -> TextSplit:
    """Pairs of 1 to `longest` words, with labels 0..2."""
    random = np.random.default_rng(0)

    def texts() -> list[str]:
        return [
            " ".join(random.choice(WORDS, size=random.integers(1, longest + 1)))
            for _ in range(num_rows)
        ]

    return TextSplit(texts(), texts(), random.integers(3, size=num_rows).tolist())


def rows_of(encoded: EncodedSplit, row: int) -> list[int]:
    return encoded.tokens[encoded.offsets[row] : encoded.offsets[row + 1]].tolist()


@pytest.mark.parametrize("num_rows", [1, 1000, 1001])
def test_encoding_equals_the_tokenizer_row_by_row(
    tokenizer: PreTrainedTokenizerBase, num_rows: int
) -> None:
    split = random_pairs(num_rows, longest=10)
    encoded = encode(split, tokenizer, 16)
    assert len(encoded) == num_rows
    assert encoded.tokens.dtype == np.int32 and encoded.offsets.dtype == np.int64
    assert encoded.token_types is not None and split.second is not None
    num_longer = 0
    for row in range(num_rows):
        pair = split.first[row], split.second[row]
        expected = tokenizer(*pair, truncation=True, max_length=16)
        assert rows_of(encoded, row) == expected["input_ids"]
        types = encoded.token_types[encoded.offsets[row] : encoded.offsets[row + 1]]
        assert types.tolist() == expected["token_type_ids"]
        num_longer += len(tokenizer(*pair)["input_ids"]) > 16
    assert encoded.num_truncated == num_longer
    assert encoded.lengths.tolist() == [len(rows_of(encoded, row)) for row in range(num_rows)]
    assert encoded.labels is not None and encoded.labels.dtype == torch.int64
    assert encoded.labels.tolist() == split.labels


def test_a_text_that_just_fits_is_not_truncated(tokenizer: PreTrainedTokenizerBase) -> None:
    split = TextSplit(["w1 w2 w3", "w1 w2 w3 w4", "w1"])
    encoded = encode(split, tokenizer, 5)
    assert encoded.lengths.tolist() == [5, 5, 3]
    assert encoded.num_truncated == 1
    assert encoded.labels is None
    assert encode(split, tokenizer, 32).num_truncated == 0


def test_token_types_only_where_the_model_has_them(tokenizer: PreTrainedTokenizerBase) -> None:
    class WithoutTokenTypes(BertTokenizerFast):
        model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    plain = WithoutTokenTypes(tokenizer_object=tokenizer.backend_tokenizer)
    encoded = encode(TextSplit(["w1"], ["w2"], [0]), plain, 8)
    assert encoded.token_types is None
    assert "token_type_ids" not in collate(encoded, [0], pad_token_id=0)


@pytest.mark.parametrize(
    ("max_length", "model_limit", "message"),
    [
        (33, None, "max_seq_length=33 is beyond the model.*at most 32 tokens; use 32"),
        (32, 24, "max_seq_length=32 is beyond the model.*at most 24"),
        (4, None, "max_seq_length=4 leaves no room.*use 5 or more"),
    ],
)
def test_lengths_that_the_model_cannot_take(
    tokenizer: PreTrainedTokenizerBase, max_length: int, model_limit: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode(random_pairs(3, 2), tokenizer, max_length, model_limit)


def test_a_tokenizer_without_a_limit_leaves_it_to_the_model(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    unlimited = BertTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert unlimited.model_max_length > 10**20
    split = TextSplit(["w1 " * 100])
    assert encode(split, unlimited, 64).lengths.tolist() == [64]
    with pytest.raises(ValueError, match="at most 48"):
        encode(split, unlimited, 64, model_limit=48)


def test_a_text_without_tokens_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
    with pytest.raises(ValueError, match="data row 2 has no token"):
        # The normaliser removes this control character.
        encode(TextSplit(["w1", "\u0001"]), bare, 8)


def test_real_tokenizer_counts_what_it_cuts(minilm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    texts = ["A caf\u00e9 in Z\u00fcrich.", "unbelievable " * 50, "short"]
    encoded = encode(TextSplit(texts), tokenizer, 20)
    assert encoded.num_truncated == 1
    assert rows_of(encoded, 0) == tokenizer(texts[0])["input_ids"]
    with pytest.raises(ValueError, match=r"max_seq_length=1024 is beyond the model.*512"):
        encode(TextSplit(texts), tokenizer, 1024)


def small_tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """Tokenizers of each kind, trained on a few words: pieces of words, of bytes, of segments."""
    corpus = [
        "the quick brown fox jumps over the lazy dog, again and again",
        "caf\u00e9 \u4e2d\u6587",
    ]
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    segments = Tokenizer(models.Unigram())
    segments.normalizer = normalizers.NFKC()
    segments.pre_tokenizer = pre_tokenizers.Metaspace()
    made = {}
    for name, tokenizer, trainer in (
        ("wordpiece", wordpiece, trainers.WordPieceTrainer(vocab_size=80)),
        ("bytes", bytes_, trainers.BpeTrainer(vocab_size=300)),
        ("segments", segments, trainers.UnigramTrainer(vocab_size=60, unk_token="[UNK]")),
    ):
        trainer.special_tokens = [AddedToken(token) for token in SPECIAL_TOKENS]
        tokenizer.train_from_iterator(corpus, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        made[name] = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    return made


ALPHABET = [
    "the ",
    "quick",
    "fox",
    " ",
    "\n",
    "\t ",
    ",",
    "caf\u00e9",
    "e\u0301",
    "\u4e2d",
    "\u0000",
    "q" * 30,
]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["wordpiece", "bytes", "segments"])
def test_texts_that_are_cut_before_have_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, name: str, side: str
) -> None:
    monkeypatch.setattr(batching, "_SPARE_TOKENS", 120)
    monkeypatch.setattr(batching, "_CHARACTERS_PER_CHUNK", 20_000)
    tokenizer = small_tokenizers()[name]
    tokenizer.truncation_side = side
    random = np.random.default_rng(0)
    texts = [
        "".join(random.choice(ALPHABET, size=size, p=random.dirichlet([0.3] * len(ALPHABET))))
        for size in (3, 1000, 4000)
        for _ in range(4)
    ]
    # No token for a long time, one word, and a word that is cut after less than its whole.
    limit = batching._CHARACTERS_PER_TOKEN * (24 + 1 + 120)
    texts += [" " * 9000 + "fox", "q" * 9000, "the fox" + " " * (limit - 90) + "j" + "ups" * 999]
    short = ["the dog"] * len(texts)
    for split in (TextSplit(texts), TextSplit(texts, short), TextSplit(short, texts)):
        encoded = encode(split, tokenizer, 24)
        second = [None] * len(texts) if split.second is None else split.second
        num_longer = 0
        for row, pair in enumerate(zip(split.first, second, strict=True)):
            whole = tokenizer(*pair, truncation=True, max_length=24)["input_ids"]
            assert rows_of(encoded, row) == whole
            num_longer += len(tokenizer(*pair)["input_ids"]) > 24
        assert encoded.num_truncated == num_longer


def test_the_tokenizer_gets_little_of_a_long_text(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    tokenize = batching._tokenize

    def measured(split: TextSplit, rows: Sequence[int], *arguments: Any) -> Any:
        sizes.append(sum(len(split.first[row]) for row in rows))
        return tokenize(split, rows, *arguments)

    monkeypatch.setattr(batching, "_tokenize", measured)
    texts = ["w1 " * 1_000_000, *["w2 " * 3000] * 150]
    assert encode(TextSplit(texts), tokenizer, 32).num_truncated == 151
    assert max(sizes) <= 10**6


LENGTHS = np.random.default_rng(1).integers(3, 128, size=1003)


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 32, 1003, 2000])
def test_an_epoch_has_every_row_once(batch_size: int, shuffle: bool, group_by_length: bool) -> None:
    batches = epoch_batches(
        LENGTHS, batch_size, seed=0, epoch=0, shuffle=shuffle, group_by_length=group_by_length
    )
    assert sorted(np.concatenate(batches)) == list(range(1003))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


@pytest.mark.parametrize("group_by_length", [False, True])
def test_batches_depend_on_seed_and_epoch_alone(group_by_length: bool) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = epoch_batches(LENGTHS, 8, seed=seed, epoch=epoch, group_by_length=group_by_length)
        return np.concatenate(batches).tolist()

    # The global generator of NumPy has no influence.
    first = order(3, 1)
    np.random.seed(7)
    assert order(3, 1) == first
    assert len({tuple(order(*key)) for key in ((3, 1), (3, 2), (4, 1), (1, 3))}) == 4


def padded_tokens(batches: list[np.ndarray]) -> int:
    return sum(len(batch) * int(LENGTHS[batch].max()) for batch in batches)


def test_grouping_pads_little_and_starts_with_the_longest_batch() -> None:
    plain = epoch_batches(LENGTHS, 16, seed=0, epoch=0)
    grouped = epoch_batches(LENGTHS, 16, seed=0, epoch=0, group_by_length=True)
    assert padded_tokens(plain) > 1.5 * LENGTHS.sum()
    assert padded_tokens(grouped) < 1.1 * LENGTHS.sum()
    longest = [int(LENGTHS[batch].max()) for batch in grouped[:-1]]
    assert longest[0] == max(longest)
    # The lengths of the following batches are in no order.
    steps = np.sign(np.diff(longest[1:]))
    assert min((steps > 0).sum(), (steps < 0).sum()) > len(steps) // 4


def test_without_shuffling_rows_come_in_order_or_longest_first() -> None:
    batches = epoch_batches(LENGTHS, 10, seed=0, epoch=0, shuffle=False)
    assert np.concatenate(batches).tolist() == list(range(1003))
    batches = epoch_batches(LENGTHS, 10, seed=0, epoch=0, shuffle=False, group_by_length=True)
    assert (np.diff(LENGTHS[np.concatenate(batches)]) <= 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 8, "seed": -1}, "seed=-1"),
        ({"batch_size": 8, "epoch": -1}, "epoch=-1"),
        ({"batch_size": 8, "lengths": np.zeros(0, dtype=np.int64)}, "no rows to batch"),
    ],
)
def test_batches_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        epoch_batches(**{"lengths": LENGTHS, "seed": 0, "epoch": 0, **arguments})


def test_collate_equals_the_padding_of_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    split = random_pairs(50, longest=8)
    encoded = encode(split, tokenizer, 32)
    indices = np.array([49, 0, 7, 7, 23])
    batch = collate(encoded, indices, tokenizer.pad_token_id)
    assert split.second is not None and split.labels is not None
    expected = tokenizer(
        [split.first[row] for row in indices],
        [split.second[row] for row in indices],
        padding=True,
        return_tensors="pt",
    )
    assert set(batch) == {*expected, "labels"}
    for name, tensor in expected.items():
        assert batch[name].dtype == torch.int64
        assert torch.equal(batch[name], tensor)
    assert batch["labels"].tolist() == [split.labels[row] for row in indices]


def test_collate_pads_with_the_given_token_and_takes_any_sequence(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoded = encode(TextSplit(["w1 w2", "w3"]), tokenizer, 32)
    batch = collate(encoded, [1, 0], pad_token_id=99)
    assert batch["input_ids"].tolist() == [[2, 8, 3, 99], [2, 6, 7, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert "labels" not in batch


def test_evaluation_batches_hold_every_text_once_without_labels(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoded = encode(random_pairs(50, longest=8), tokenizer, 32)
    batches = list(evaluation_batches(encoded, 7, tokenizer.pad_token_id))
    assert len(batches) == 8
    rows = np.concatenate([indices for indices, _ in batches])
    assert sorted(rows) == list(range(50))
    assert (np.diff(encoded.lengths[rows]) <= 0).all()
    for indices, batch in batches:
        expected = collate(encoded, indices, tokenizer.pad_token_id)
        assert set(batch) == set(expected) - {"labels"}
        assert all(torch.equal(batch[name], expected[name]) for name in batch)
    parts = [
        list(evaluation_batches(encoded, 7, 0, part=slice(rank, None, 3))) for rank in (0, 1, 2)
    ]
    assert [len(part) for part in parts] == [3, 3, 2]
    assert parts[1][2][0].tolist() == batches[7][0].tolist()
