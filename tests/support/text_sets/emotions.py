"""A generated set like GoEmotions: a text has the labels that its words say, any number of them."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

# Label -> the word that says it.
EMOTIONS = {"anger": "bad", "joy": "good", "love": "cat", "surprise": "dog"}
NAMES = list(EMOTIONS)
# Words that the vocabulary of `tiny_bert` has.
_OTHERS = (
    "a",
    "the",
    "red",
    "blue",
    "green",
    "old",
    "new",
    "big",
    "small",
    "bird",
    "house",
    "runs",
)


def emotion_rows(number: int, seed: int) -> list[dict[str, Any]]:
    """Sentences with none to three of the words of `EMOTIONS`, and the labels that they say."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        labels = sorted(draw.sample(NAMES, draw.choice((0, 1, 1, 2, 2, 3))))
        words = [*(EMOTIONS[name] for name in labels), *draw.choices(_OTHERS, k=2)]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "labels": labels})
    return rows


TRAIN, DEV = emotion_rows(160, seed=1), emotion_rows(80, seed=2)


def as_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a column of zeros and ones for each label."""
    return [
        {"text": row["text"], **{name: int(name in row["labels"]) for name in NAMES}}
        for row in rows
    ]


def write_table(path: Path, rows: list[dict[str, Any]], separator: str = "|") -> str:
    """Write the rows in the format of the file's extension; csv joins lists by the separator."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                cells = {k: separator.join(v) if isinstance(v, list) else v for k, v in row.items()}
                writer.writerow(cells)
    return str(path)
