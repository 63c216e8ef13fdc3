"""Sources of data sets: the hub, a local directory, two files, the quickstart set.

Opening a source reads no rows; the rows of a split are read on request.
"""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..runtime.files import kind_of_file
from ..runtime.text import did_you_mean
from .files.tables import COMPRESSED, EXTENSIONS, check_file_exists, read_table, split_extension
from .files.text_files import read_utf8
from .quickstart import LABEL_NAMES, quickstart_splits
from .record import Classes, label_columns
from .tasks import (
    GLUE_REPOSITORY,
    GLUE_TASKS,
    QUICKSTART,
    GlueTask,
    check_not_excluded,
    task_key,
    task_metrics,
)

SPLIT_NAMES = ("train", "validation", "test", "validation_matched", "validation_mismatched")
# Names of the same splits in other collections.
_OTHER_SPLIT_NAMES = {
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
    "training": "train",
    "testing": "test",
}


def usual_split_name(name: str) -> str:
    """Return 'validation' for 'dev' and the like; another name as it is."""
    return _OTHER_SPLIT_NAMES.get(name, name)


@dataclass(frozen=True)
class SplitSource:
    """A split that is read on request; `notes` tell how, once it has been read."""

    name: str
    read: Callable[[], pa.Table]
    notes: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        """Name of the split in messages, with the notes."""
        return " ".join([self.name, *(f"({note})" for note in self.notes)])


@dataclass(frozen=True)
class DataSource:
    """The splits of a data set, what is known before a row is read, and notes on choices."""

    name: str
    splits: dict[str, SplitSource]
    classes: Classes | None = None
    task_name: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The text columns of a GLUE task, of other data sets none."""
        glue = GLUE_TASKS.get(self.task_name or "")
        return () if glue is None else glue.text_columns

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, the main one first."""
        return task_metrics(self.task_name)

    def f1_class(self, label_names: Sequence[str]) -> tuple[str | None, str | None]:
        """The positive class of the metric f1, and a note where the task does not say it."""
        glue = GLUE_TASKS.get(self.task_name or "")
        if glue is None or glue.f1_class is None:
            return None, None
        if glue.f1_class in label_names:
            return glue.f1_class, None
        return label_names[1], (
            f"{self.name}: the positive class of f1 is the second, {label_names[1]!r}, as none is "
            f"called {glue.f1_class!r}"
        )


def open_files(
    train_file: str | None, validation_file: str | None, test_file: str | None = None
) -> DataSource:
    """Open a training, a validation and a test file; each may be None."""
    given = {
        "train": ("train_file", train_file),
        "validation": ("validation_file", validation_file),
        "test": ("test_file", test_file),
    }
    splits = {}
    for split, (argument, path) in given.items():
        if path is not None:
            check_file_exists(Path(path), argument)
            splits[split] = _file_split(f"{argument}={path!r}", path, argument)
    name, _ = split_extension(Path(train_file or validation_file or ""))
    return DataSource(name, splits)


def _file_split(name: str, path: str | Path, argument: str) -> SplitSource:
    notes: list[str] = []
    return SplitSource(name, partial(read_table, path, argument, notes), notes)


def open_directory(data_dir: str, task_name: str) -> DataSource:
    """Open the files `<data_dir>/<task_name>/<split>.<extension>`, and `labels.json` if it exists.

    Raises:
        ValueError: no such directory or task, a misnamed split file (the nearest name is offered),
            two files for one split, a damaged labels.json, or not as many classes as in GLUE.
    """
    check_not_excluded(task_name)
    directory = Path(data_dir)
    if not directory.is_dir():
        kind = kind_of_file(directory)
        if kind is not None:
            raise ValueError(f"data_dir={data_dir!r} is {kind}; name a directory.")
        siblings = directory.absolute().parent
        names = [e.name for e in siblings.iterdir() if e.is_dir()] if siblings.is_dir() else []
        hint = did_you_mean(directory.name, names) if names else ""
        raise ValueError(f"data_dir={data_dir!r}: no such directory.{hint}")
    tasks = sorted(entry.name for entry in directory.iterdir() if entry.is_dir())
    key = task_key(task_name)
    same = [task for task in tasks if task_key(task) == key]
    if task_name not in tasks and same:
        task_name = same[-1]  # in lower case, where there are several
    if task_name not in tasks:
        hint = did_you_mean(task_name.lower(), tasks) if tasks else " It holds no folder at all."
        raise ValueError(
            f"task_name={task_name!r}: data_dir={data_dir!r} has no folder of that name.{hint}"
        )
    folder = directory / task_name
    splits = _split_files(folder)
    glue = GLUE_TASKS.get(key)
    classes = _labels_json(folder / "labels.json")
    if glue is not None:
        classes = _checked_against_glue(classes, glue, key)
    return DataSource(
        task_name,
        {split: _file_split(str(path), path, f"{split} split") for split, path in splits.items()},
        classes,
        key if glue is not None else task_name,
    )


def open_hub(
    dataset_name: str,
    dataset_config_name: str | None,
    task_name: str | None = None,
    label_column: str | None = None,
    recorded: str | None = None,
) -> DataSource:
    """Open a data set of the hub, or of a local directory in hub layout, with `datasets`.

    label_column: name of the label column; None: that `recorded` with a model where it is there,
    else 'label' or 'labels'.

    Raises:
        ValueError: no such data set or configuration, damaged files.
        ConnectionError: the hub is out of reach and the data set is not in the local cache.
    """
    # Messages name the option that the user set.
    argument = f"dataset_name={dataset_name!r}"
    if task_name is not None:
        argument = f"task_name={task_name!r} (from {dataset_name})"
    loaded = _load_dataset(dataset_name, dataset_config_name, argument)
    name = task_name or dataset_config_name or Path(dataset_name).name
    classes = None
    splits: dict[str, SplitSource] = {}
    notes = []
    for split, dataset in loaded.items():
        where = f"split {split!r} of {dataset_name}"
        usual = usual_split_name(split)
        if usual in loaded or usual in splits:
            usual = split
        if usual != split:
            notes.append(f"{where}: read as the {usual} split")
        splits[usual] = SplitSource(where, partial(_rows_of, dataset, where))
        # The column that is read: one beside it may have other names.
        read = label_columns(dataset.features, label_column, recorded)
        feature = dataset.features.get(read[0]) if len(read) == 1 else None
        # Only features of type datasets.ClassLabel, and lists of them, have names.
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if names and classes is None:
            classes = Classes(list(names), dataset_name, by_index=True)
    return DataSource(name, splits, classes, task_name, tuple(notes))


def open_task(task_name: str) -> DataSource:
    """Open a GLUE task from the hub, or the built-in quickstart set.

    Raises:
        ValueError: an unknown task (the nearest name is offered), or an excluded one.
        ConnectionError: as `open_hub`.
    """
    check_not_excluded(task_name)
    task = task_key(task_name)
    if task == QUICKSTART:
        return _open_quickstart()
    if task not in GLUE_TASKS:
        raise ValueError(
            f"task_name={task_name!r} is not a task known by name."
            f"{did_you_mean(task, [*GLUE_TASKS, QUICKSTART])} A data set of your own: "
            "--data_dir DIR with a folder of that name, --dataset_name, or --train_file."
        )
    return open_hub(GLUE_REPOSITORY, task, task)


def _open_quickstart() -> DataSource:
    rows = quickstart_splits()
    return DataSource(
        QUICKSTART,
        {
            split: SplitSource(f"{QUICKSTART} {split}", partial(pa.Table.from_pylist, split_rows))
            for split, split_rows in rows.items()
        },
        Classes(list(LABEL_NAMES), QUICKSTART, by_index=True),
    )


def _split_files(folder: Path) -> dict[str, Path]:
    files = {f: split_extension(f)[0] for f in sorted(folder.iterdir()) if split_extension(f)[1]}
    splits: dict[str, Path] = {}
    for file, name in files.items():
        if name not in SPLIT_NAMES:
            continue
        check_file_exists(file, f"{name} split")
        if name in splits:
            raise ValueError(
                f"{folder} has two files for the split {name!r}: {splits[name].name} and "
                f"{file.name}; keep one."
            )
        splits[name] = file
    for file, name in files.items():
        near = difflib.get_close_matches(name, SPLIT_NAMES, n=1, cutoff=0.85)
        meant = _OTHER_SPLIT_NAMES.get(name) or (near[0] if near else None)
        # Other files beside a complete set (oos_validation, train_small) are ignored.
        if meant is not None and not any(split.startswith(meant) for split in splits):
            raise ValueError(
                f"{file}: {name!r} is not a split name. Did you mean {meant!r}? Rename the "
                f"file to {meant}{file.name.removeprefix(name)}."
            )
    if not splits:
        raise ValueError(
            f"{folder} holds no split; put {'|'.join(SPLIT_NAMES[:3])} there, each as "
            f"{', '.join(EXTENSIONS)} (text formats also with {COMPRESSED}). Its files are: "
            f"{', '.join(sorted(file.name for file in folder.iterdir())) or 'none':.500}."
        )
    return splits


def _labels_json(path: Path) -> Classes | None:
    if not (path.exists() or path.is_symlink()):
        return None
    check_file_exists(path, "labels.json")
    try:
        names = json.loads(read_utf8(path, str(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); write a list of class names.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{path}: expected a list of class names such as ["no", "yes"].')
    return Classes(names, str(path), by_index=None)


def _checked_against_glue(classes: Classes | None, glue: GlueTask, task_name: str) -> Classes:
    if classes is None:
        return Classes(list(glue.label_names), f"GLUE's {task_name}", by_index=True)
    if len(classes.names) != len(glue.label_names):
        raise ValueError(
            f"{classes.origin} lists {len(classes.names)} classes, GLUE's {task_name} has "
            f"{len(glue.label_names)}: {', '.join(glue.label_names)}. Give the folder another name "
            "if it is another task."
        )
    return classes


def _load_dataset(
    dataset_name: str, dataset_config_name: str | None, argument: str
) -> dict[str, Any]:
    # Imported here because it takes most of a second, and local files do not need it.
    import datasets

    looks_local = dataset_name.startswith((".", "/", "~")) or dataset_name.count("/") > 1
    if looks_local and not Path(dataset_name).is_dir():
        raise ValueError(f"{argument}: no such directory; give a directory or a name on the hub.")
    try:
        loaded = datasets.load_dataset(dataset_name, dataset_config_name)
    except ConnectionError as error:
        raise ConnectionError(
            f"{argument} cannot be fetched: the Hugging Face hub is out of reach ({error}). Go "
            "online, or keep the files locally: --data_dir DIR with <task_name>/train.parquet and "
            "the like, or --dataset_name with a local directory."
        ) from error
    except FileNotFoundError as error:
        raise ValueError(f"{argument}: no such data set ({error}); check the name.") from error
    except (pa.ArrowException, UnicodeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"{argument}: a file cannot be read ({cause}); correct it, or copy it again."
        ) from error
    except RuntimeError as error:
        # Such as "Dataset scripts are no longer supported, but found x.py".
        raise ValueError(
            f"{argument}: `datasets` cannot read it ({error}); name a Parquet version of it (the "
            "hub may have one), or keep the files locally: --data_dir DIR with "
            "<task_name>/train.parquet and the like."
        ) from error
    except ValueError as error:
        # Such as "BuilderConfig 'x' not found. Available: ['a', 'b']".
        reason, *available = re.split("[Aa]vailable", str(error), maxsplit=1)
        known = re.findall(r"'([^']+)'", available[0]) if available else []
        hint = did_you_mean(dataset_config_name or "", known) if known else ""
        raise ValueError(
            f"{argument}, dataset_config_name={dataset_config_name!r}: "
            f"{reason.splitlines()[0].strip()}{hint}"
        ) from error
    return dict(loaded)


def _rows_of(dataset: Any, where: str) -> pa.Table:
    table = dataset.with_format("arrow")[:]
    if table.num_rows == 0:
        raise ValueError(f"{where} holds no rows.")
    return table
