"""Options that texts with several labels exclude, and those that only they have."""

from typing import Any

import pytest
from fusedacl.engine import TrainingConfig
from fusedacl.engine.config.label_options import check_label_options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory_size": 8}, "memory_size=8 keeps one label per text"),
        ({"class_weights": "balanced"}, "class_weights='balanced' weighs texts by their class"),
        ({"sampler": "balanced", "objective": "ce"}, "sampler=balanced fills batches"),
    ],
)
def test_options_that_several_labels_exclude(options: dict[str, Any], words: str) -> None:
    config = TrainingConfig.create(**options)
    check_label_options(config, several=False)
    with pytest.raises(ValueError, match=words):
        check_label_options(config, several=True)


def test_options_that_several_labels_leave() -> None:
    config = TrainingConfig.create(negatives="global", positives="each")
    check_label_options(config, several=True)
    with pytest.raises(ValueError, match="positives=each is for texts with several labels"):
        check_label_options(config, several=False)
