"""The parts of a training run, put together before the first step."""

from __future__ import annotations

from ..config.training import TrainingConfig
from ..model.multi_exit import MultiExitForSequenceClassification, label_names
from ..runtime import processes


def take_last_exit(
    model: MultiExitForSequenceClassification,
    trained: MultiExitForSequenceClassification,
    name: str,
) -> None:
    """Copy the last exit of a trained model, which is to be the other exits' teacher.

    Raises:
        ValueError: it has other classes, another kind of exit, or none on the last layer.
    """
    ours, theirs = model.config, trained.config
    for what, mine, other in (
        ("classes", label_names(ours), label_names(theirs)),
        ("exit_head", ours.exit_head, theirs.exit_head),
        ("last exit layer", model.exit_layers[-1], trained.exit_layers[-1]),
    ):
        if mine != other:
            raise ValueError(
                f"stage1_model={name!r} has {what} {other}, this run {mine}: the second stage "
                "needs a first one on the same data, with the same kind of exit on the last layer."
            )
    if ours.exit_head == "mha" and (
        ours.exit_width != theirs.exit_width
        or ours.exit_attention_heads != theirs.exit_attention_heads
    ):
        raise ValueError(
            f"stage1_model={name!r} has exits of width {theirs.exit_width} with "
            f"{theirs.exit_attention_heads} heads, this run of {ours.exit_width} with "
            f"{ours.exit_attention_heads}: set exit_width and exit_attention_heads alike."
        )
    model.exits[-1].load_state_dict(trained.exits[-1].state_dict())


def uses_deepspeed(config: TrainingConfig) -> bool:
    """Whether the run is DeepSpeed's: asked for, or one process of those that were launched."""
    return config.optimization.deepspeed_config is not None or processes.launched() is not None
