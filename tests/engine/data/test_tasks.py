import json
from pathlib import Path

import pytest
from fusedacl.engine.data.tasks import GLUE_TASKS, check_not_excluded, task_metrics


def test_metrics_are_those_of_the_paper() -> None:
    assert task_metrics("cola") == ("matthews_correlation",)
    assert task_metrics("mrpc") == task_metrics("qqp") == ("f1", "accuracy")
    for name in ("mnli", "qnli", "rte", "sst2"):
        assert task_metrics(name) == ("accuracy",)
    assert task_metrics("trec6") == task_metrics(None) == ("accuracy", "macro_f1")


@pytest.mark.parametrize(
    ("name", "word"), [("stsb", "regression"), ("STS-B", "regression"), ("wnli", "opposite")]
)
def test_excluded_tasks_are_refused_with_the_reason(name: str, word: str) -> None:
    with pytest.raises(ValueError, match=rf"task_name='{name}' is excluded.*{word}.*mrpc"):
        check_not_excluded(name)


def test_other_tasks_are_not_excluded() -> None:
    for name in (*GLUE_TASKS, "trec6"):
        check_not_excluded(name)


@pytest.mark.real_data
@pytest.mark.parametrize("name", sorted(GLUE_TASKS))
def test_class_names_are_in_the_order_of_the_real_sets(real_data: Path, name: str) -> None:
    folder = real_data / name
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    names = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    assert list(GLUE_TASKS[name].label_names) == names
