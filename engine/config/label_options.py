"""Options that depend on whether a text may have several labels, which the data says."""

from .sections import ObjectiveOptions
from .training import TrainingConfig


def check_label_options(config: TrainingConfig, *, several: bool) -> None:
    """Refuse options that do not fit the data; several: whether a text may have several labels.

    Raises:
        ValueError: naming the option.
    """
    objective = config.objective
    if not several:
        if objective.positives != ObjectiveOptions().positives:
            raise ValueError(
                f"positives={objective.positives} is for texts with several labels, and these "
                "have one each: leave it out."
            )
        return
    found = "the texts may have several labels"
    if config.data.sampler == "balanced":
        raise ValueError(
            f"sampler=balanced fills batches class by class, and {found}: use sampler=random "
            "with a larger per_device_train_batch_size or contrastive_batch_size."
        )
    if objective.class_weights is not None:
        raise ValueError(
            f"class_weights={objective.class_weights!r} weighs texts by their class, and "
            f"{found}: leave it out."
        )
    if objective.objective != "ce" and objective.memory_size:
        raise ValueError(
            f"memory_size={objective.memory_size} keeps one label per text, and {found}: leave it "
            "out, with a larger contrastive_batch_size."
        )
