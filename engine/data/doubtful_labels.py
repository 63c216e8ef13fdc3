"""Labels that are probably not the classes that they look like."""

import pyarrow as pa
import pyarrow.compute

from .columns import is_integer_name, quoted, refuse_rows

# Words that pandas and spreadsheets write for a missing value; never the name of a class.
_MISSING = ("nan", "<na>", "nat", "#n/a", "#na")
# Words that are sometimes a class and sometimes a missing value.
_PERHAPS_MISSING = ("none", "null", "n/a", "na", "missing")
# Smallest share of rows with several labels in a cell that is reported.
_SEVERAL_LABELS_SHARE = 0.05


def doubtful_names(values: pa.Array, names: list[str], where: str) -> list[str]:
    """Notes on class names that look like missing values, numbers, or several labels in one.

    Raises:
        ValueError: a label is a word that pandas or a spreadsheet writes for a missing value.
    """
    lowered = pa.compute.utf8_lower(values)
    refuse_rows(
        pa.compute.is_in(lowered, pa.array(_MISSING)),
        "label is a word for a missing value",
        where,
        values,
    )
    notes = []
    missing = [name for name in names if name.lower() in _PERHAPS_MISSING]
    if missing:
        notes.append(
            f"{where}: {quoted(missing)} becomes a class; if it stands for a missing label, take "
            "these rows out"
        )
    numbers = [name for name in names if is_integer_name(name)]
    if numbers:
        others = quoted([name for name in names if name not in numbers][:3])
        notes.append(f"{where}: {quoted(numbers[:3])} beside {others}: labels are read as names")
    by_lower: dict[str, list[str]] = {}
    for name in names:
        by_lower.setdefault(name.lower(), []).append(name)
    alike = next((group for group in by_lower.values() if len(group) > 1), None)
    if alike is not None:
        notes.append(f"{where}: {quoted(alike)} are different classes; write them alike if not")
    return notes + _several_labels(values, where)


def _several_labels(values: pa.Array, where: str) -> list[str]:
    """A note if many cells hold several labels, such as 'joy|pride'."""
    counts = {
        item["values"]: item["counts"] for item in pa.compute.value_counts(values).to_pylist()
    }
    for separator in "|;,":
        joined = {
            name: [part.strip() for part in name.split(separator)]
            for name in counts
            if separator in name
        }
        parts = {part for split in joined.values() for part in split}
        share = sum(counts[name] for name in joined) / len(values)
        # In a class name such as 'food, drink' the parts do not occur in other names.
        shared = sum(any(part in counts for part in split) for split in joined.values())
        if share >= _SEVERAL_LABELS_SHARE and (shared or len(parts) < len(joined)):
            example = max(joined, key=lambda name: counts[name])
            return [
                f"{where}: {share:.0%} of the labels look like several in one ({example!r}); each "
                f"combination becomes a class of its own (label_separator={separator!r}: several "
                "labels per text)"
            ]
    return []
