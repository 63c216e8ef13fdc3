"""The tasks known by name: GLUE's text columns, class names and metrics."""

from dataclasses import dataclass

GLUE_REPOSITORY = "nyu-mll/glue"
QUICKSTART = "quickstart"
# Metrics of a task that has none of its own.
DEFAULT_METRICS = ("accuracy", "macro_f1")
# Metrics where a text may have several labels.
SEVERAL_LABELS_METRICS = ("micro_f1", "macro_f1", "average_precision", "exact_match")


@dataclass(frozen=True)
class GlueTask:
    """A GLUE task: text columns, class names as in `nyu-mll/glue`, metrics, the main one first.

    f1_class: the positive class of the metric f1.
    """

    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    f1_class: str | None = None


_SENTENCES = ("sentence1", "sentence2")
GLUE_TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "mnli": GlueTask(("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "mrpc": GlueTask(
        _SENTENCES, ("not_equivalent", "equivalent"), ("f1", "accuracy"), "equivalent"
    ),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment")),
    "qqp": GlueTask(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("f1", "accuracy"),
        "duplicate",
    ),
    "rte": GlueTask(_SENTENCES, ("entailment", "not_entailment")),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
}
_EXCLUDED_TASKS = {
    "stsb": "it is a regression task (similarity scores from 0 to 5), and the contrastive "
    "objectives need classes",
    "wnli": "its validation pairs repeat training sentences under the opposite label, so that its "
    "scores say nothing; the paper leaves it out too",
}


def task_key(task_name: str) -> str:
    """The task's name in lower case; that of a GLUE task also without '-', as in SST-2."""
    key = task_name.lower()
    plain = key.replace("-", "")
    return plain if plain in GLUE_TASKS else key


def check_not_excluded(task_name: str) -> None:
    """Refuse the two GLUE tasks that the method does not cover.

    Raises:
        ValueError: `task_name` is one of them; the message gives the reason.
    """
    reason = _EXCLUDED_TASKS.get(task_name.lower().replace("-", ""))
    if reason is not None:
        raise ValueError(
            f"task_name={task_name!r} is excluded: {reason}. Choose one of {', '.join(GLUE_TASKS)}."
        )


def task_metrics(task_name: str | None) -> tuple[str, ...]:
    """Return the names of a task's metrics, the main one first."""
    task = GLUE_TASKS.get(task_name) if task_name is not None else None
    return task.metrics if task is not None else DEFAULT_METRICS
