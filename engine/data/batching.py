"""Tokenised texts in flat arrays, the batches of an epoch, and padded batches as tensors."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from .balance import BalancedBatches
from .columns import TextSplit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("fusedacl")

_TEXTS_PER_CHUNK = 1000
# A tokenizer needs some 300 bytes per character while it works.
_CHARACTERS_PER_CHUNK = 10**6
# A very long text is cut before it is tokenised, this many tokens beyond those that are kept, so
# that what the cut itself changes (the pieces of a divided word) is never among the kept ones.
_SPARE_TOKENS = 1000
_CHARACTERS_PER_TOKEN = 16
# A tokenizer without a limit reports 10^30.
_NO_LIMIT = 10**6
_BATCHES_PER_MEGABATCH = 50


@dataclass(frozen=True)
class EncodedSplit:
    """N tokenised texts (or pairs of texts), T tokens in all.

    `tokens` [T] int32; text i is tokens[offsets[i]:offsets[i + 1]]; `token_types` [T] int8, None if
    the model has none; `labels` [N] int64, or [N, K] bool where a text may have several;
    `num_truncated` texts were longer than `max_length`.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    token_types: np.ndarray | None
    labels: torch.Tensor | None
    num_truncated: int
    max_length: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each text, special tokens included: [N] int64."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "EncodedSplit":
        """The texts with these row indices, in the order given."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return EncodedSplit(
            self.tokens[tokens],
            offsets,
            None if self.token_types is None else self.token_types[tokens],
            None if self.labels is None else self.labels[torch.from_numpy(rows)],
            self.num_truncated,
            self.max_length,
        )


def encode(
    split: TextSplit,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    model_limit: int | None = None,
) -> EncodedSplit:
    """Tokenise a split without padding; of a pair that is too long, the longer text is cut first.

    `max_length`: maximum number of tokens per text, special tokens included (max_seq_length on the
    command line). `model_limit`: number of positions of the model, for tokenizers that do not know.

    Raises:
        ValueError: max_length exceeds the model's limit or leaves no room for text; a text has no
            token at all.
    """
    is_pair = split.second is not None
    check_max_length(tokenizer, max_length, model_limit, is_pair)
    has_token_types = "token_type_ids" in tokenizer.model_input_names
    tokens, token_types, lengths = [], [], []
    num_truncated = 0
    split = replace(
        split,
        first=_without_far_ends(split.first, tokenizer, max_length),
        second=None
        if split.second is None
        else _without_far_ends(split.second, tokenizer, max_length),
    )
    for rows in _chunks(split):
        encoded = _tokenize(split, rows, tokenizer, max_length)
        num_tokens = np.fromiter(map(len, encoded["input_ids"]), dtype=np.int64, count=len(rows))
        tokens.append(_flat(encoded["input_ids"], np.int32, num_tokens.sum()))
        if has_token_types:
            token_types.append(_flat(encoded["token_type_ids"], np.int8, num_tokens.sum()))
        lengths.append(num_tokens)
        # A text of max_length tokens was truncated if it is longer with room for one more.
        full = [rows[index] for index in np.flatnonzero(num_tokens == max_length)]
        if full:
            longer = _tokenize(split, full, tokenizer, max_length + 1)["input_ids"]
            num_truncated += sum(len(text) > max_length for text in longer)
    all_lengths = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
    if not all_lengths.all():
        row = int(np.argmin(all_lengths)) + 1
        raise ValueError(f"The text of data row {row} has no token: correct it or remove it.")
    return EncodedSplit(
        tokens=np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(all_lengths)]).astype(np.int64),
        token_types=np.concatenate(token_types) if token_types else None,
        labels=_label_tensor(split),
        num_truncated=num_truncated,
        max_length=max_length,
    )


def _label_tensor(split: TextSplit) -> torch.Tensor | None:
    if split.labels is None or split.num_labels is None:
        return None if split.labels is None else torch.tensor(split.labels, dtype=torch.int64)
    labels = np.zeros((len(split), split.num_labels), dtype=bool)
    rows = np.repeat(np.arange(len(split)), [len(found) for found in split.labels])
    labels[rows, list(chain.from_iterable(split.labels))] = True
    return torch.from_numpy(labels)


def log_truncation(name: str, encoded: EncodedSplit) -> None:
    """Log how many texts of a split are longer than the model reads."""
    if encoded.num_truncated:
        logger.info(
            "%s: %d of %d texts are longer than max_seq_length=%d and lose their ends.",
            name,
            encoded.num_truncated,
            len(encoded),
            encoded.max_length,
        )


def epoch_batches(
    lengths: np.ndarray,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    group_by_length: bool = False,
    balanced: BalancedBatches | None = None,
) -> list[np.ndarray]:
    """Row indices of each batch of an epoch; they depend on the arguments only.

    `group_by_length` sorts by length within random groups of 50 batches, which reduces padding; the
    batches are then shuffled, except that the longest one comes first, so that running out of
    memory happens at once. Without `shuffle`, rows are in order, or all sorted by length, longest
    first. `balanced` gives the order of the rows instead. The incomplete batch, if any, is last.

    Raises:
        ValueError: no rows, batch_size < 1, a negative seed or epoch.
    """
    num_rows = len(lengths)
    if num_rows == 0:
        raise ValueError("lengths is empty: there are no rows to batch.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: a batch needs at least 1 row.")
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed={seed}, epoch={epoch}: neither may be negative.")
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(num_rows) if shuffle else np.arange(num_rows)
    if balanced is not None:
        order = balanced.order(seed=seed, epoch=epoch)
    if group_by_length:
        order = _sorted_in_groups(
            order, lengths, batch_size * _BATCHES_PER_MEGABATCH if shuffle else num_rows
        )
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if group_by_length and shuffle:
        num_complete = len(order) // batch_size
        complete, incomplete = batches[:num_complete], batches[num_complete:]
        random.shuffle(complete)
        if complete:
            longest = max(range(num_complete), key=lambda index: lengths[complete[index]].max())
            complete.insert(0, complete.pop(longest))
        batches = complete + incomplete
    return batches


def evaluation_batches(
    encoded: EncodedSplit,
    batch_size: int,
    pad_token_id: int,
    *,
    device: torch.device | str = "cpu",
    part: slice = slice(None),
    progress: str | None = None,
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """Row indices [B] and padded inputs, without labels, of each batch of a split.

    Texts are sorted by length, which reduces padding; the longest come first, so that running out
    of memory happens at once.

    `part`: the batches that are wanted. `progress`: title of a progress bar, which terminals show;
    None shows none.
    """
    batches = epoch_batches(
        encoded.lengths, batch_size, seed=0, epoch=0, shuffle=False, group_by_length=True
    )
    disable = True if progress is None else None
    for indices in tqdm(batches[part], desc=progress, leave=False, disable=disable):
        batch = collate(encoded, indices, pad_token_id)
        batch.pop("labels", None)
        yield indices, {name: value.to(device) for name, value in batch.items()}


def collate(
    encoded: EncodedSplit, indices: np.ndarray | Sequence[int], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """The batch of some rows, padded on the right to its longest row: [B, L] int64.

    Keys: input_ids, attention_mask; token_type_ids and labels if the split has them.
    """
    indices = np.asarray(indices, dtype=np.int64)
    starts = encoded.offsets[indices]
    lengths = encoded.offsets[indices + 1] - starts
    width = int(lengths.max())
    filled = np.arange(width) < lengths[:, None]  # [B, L]
    # Positions of the filled cells, row by row, in the flat arrays.
    row_shifts = starts - np.concatenate([[0], np.cumsum(lengths[:-1])])
    positions = np.arange(lengths.sum()) + np.repeat(row_shifts, lengths)
    input_ids = np.full(filled.shape, pad_token_id, dtype=np.int64)
    input_ids[filled] = encoded.tokens[positions]
    batch = {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(filled.astype(np.int64)),
    }
    if encoded.token_types is not None:
        token_type_ids = np.zeros(filled.shape, dtype=np.int64)
        token_type_ids[filled] = encoded.token_types[positions]
        batch["token_type_ids"] = torch.from_numpy(token_type_ids)
    if encoded.labels is not None:
        batch["labels"] = encoded.labels[torch.from_numpy(indices)]
    return batch


def check_max_length(
    tokenizer: "PreTrainedTokenizerBase", max_length: int, model_limit: int | None, is_pair: bool
) -> None:
    """Refuse a length that the model cannot read, or in which no text fits.

    Raises:
        ValueError: naming the length that would do.
    """
    limits = [tokenizer.model_max_length, model_limit]
    known = [limit for limit in limits if limit is not None and limit < _NO_LIMIT]
    if known and max_length > min(known):
        raise ValueError(
            f"max_seq_length={max_length} is beyond the model, which reads at most {min(known)} "
            f"tokens; use {min(known)} or less."
        )
    least = tokenizer.num_special_tokens_to_add(pair=is_pair) + (2 if is_pair else 1)
    if max_length < least:
        raise ValueError(
            f"max_seq_length={max_length} leaves no room for text beside the special tokens: use "
            f"{least} or more."
        )


def _without_far_ends(
    texts: list[str], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> list[str]:
    """The texts, of which very long ones lose the end that truncation would cut anyway.

    So 10 MB on one line need no memory for millions of tokens. The part of a text that is kept has
    far more tokens than `max_length`; it grows until it does.
    """
    num_tokens = max_length + 1 + _SPARE_TOKENS
    limit = _CHARACTERS_PER_TOKEN * num_tokens
    long = [row for row, text in enumerate(texts) if len(text) > limit]
    if not long:
        return texts
    texts = list(texts)
    keeps_start = tokenizer.truncation_side == "right"
    for row in long:
        text, length = texts[row], limit
        while length < len(text):
            part = text[:length] if keeps_start else text[-length:]
            found = _tokenize(TextSplit([part]), [0], tokenizer, num_tokens)["input_ids"]
            if len(found[0]) == num_tokens:
                texts[row] = part
                break
            length *= 4
    return texts


def _chunks(split: TextSplit) -> Iterator[range]:
    """Ranges of rows that are tokenised together."""
    start = num_characters = 0
    for row, text in enumerate(split.first):
        size = len(text) + (0 if split.second is None else len(split.second[row]))
        num_characters += size
        is_full = num_characters > _CHARACTERS_PER_CHUNK or row - start == _TEXTS_PER_CHUNK
        if is_full and row > start:
            yield range(start, row)
            start, num_characters = row, size
    if start < len(split):
        yield range(start, len(split))


def _tokenize(
    split: TextSplit, rows: Sequence[int], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> Any:
    first = [split.first[row] for row in rows]
    second = None if split.second is None else [split.second[row] for row in rows]
    return tokenizer(
        first,
        second,
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
    )


def _flat(rows: list[list[int]], dtype: type, count: int) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype=dtype, count=count)


def _sorted_in_groups(order: np.ndarray, lengths: np.ndarray, group_size: int) -> np.ndarray:
    """`order` with every `group_size` rows sorted by length, longest first; a stable sort."""
    groups = [order[start : start + group_size] for start in range(0, len(order), group_size)]
    return np.concatenate([group[np.argsort(-lengths[group], kind="stable")] for group in groups])
