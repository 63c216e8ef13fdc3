"""Labelled texts from any source, encoded, in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config.sections import DataOptions
    from .dataset import TextData


def load_splits(
    options: DataOptions | None = None,
    *,
    label_names: Sequence[str] | None = None,
    **arguments: Any,
) -> TextData:
    """Read the splits of a data set, as `dataset.load_splits` does.

    options: the data options. None: made from those of `arguments` that are names of data options,
    as in `load_splits(train_file="train.csv", needs_train=True)`; the others go to
    `dataset.load_splits`. label_names: classes of a trained model without a record of its data.

    Raises:
        TypeError: options are given in both ways, or one has an unknown name.
        ValueError, ConnectionError: as `dataset.load_splits`.
    """
    # Imported here, because the readers take time that the batches alone do not need.
    from ..config.sections import TrainingDataOptions
    from . import dataset, record

    names = {field.name for field in dataclasses.fields(TrainingDataOptions)}
    chosen = {name: arguments.pop(name) for name in names & arguments.keys()}
    if options is None:
        options = TrainingDataOptions(**chosen)
    elif chosen:
        raise TypeError(f"options are given: set {', '.join(sorted(chosen))} there.")
    if label_names is not None:
        arguments["model"] = record.DataRecord(list(label_names))
    return dataset.load_splits(options, **arguments)
