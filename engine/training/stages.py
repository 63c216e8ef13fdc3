"""Training strategies: which exits are trained when, and what else moves with them (paper 3.3).

single       backbone and last exit
joint        backbone and all exits, the sum of their losses (eq. 6)
two_stage    single, then the other exits on the frozen backbone, the last exit their teacher
alternating  joint, but the last exit alone in odd epochs (eq. 7, 8)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from ..config.training import TrainingConfig
from ..model.multi_exit import MultiExitForSequenceClassification, MultiExitOutput
from ..objectives.losses import ExitLosses, Teacher, exit_losses

SHARED = "backbone"


@dataclass(frozen=True)
class Stage:
    """A part of a run with one set of trained parameters and one learning-rate schedule.

    name: for logs; exits: positions in `exit_layers` of the exits that are trained.
    trains_backbone: whether the backbone is; if not, its forward pass builds no graph and runs in
        evaluation mode, once for all exits.
    has_teacher: whether the last exit, frozen, is the exits' teacher.
    alternates: whether the last of the exits is alone in odd epochs (1 = first).
    """

    name: str
    exits: tuple[int, ...]
    num_epochs: float
    learning_rate: float
    trains_backbone: bool = True
    has_teacher: bool = False
    alternates: bool = False

    def exits_in_epoch(self, epoch: int) -> tuple[int, ...]:
        """The exits whose losses count in an epoch of the stage (1 = first)."""
        return self.exits[-1:] if self.alternates and epoch % 2 == 1 else self.exits


def plan_stages(config: TrainingConfig, num_exits: int, has_stage1: bool = False) -> list[Stage]:
    """The stages of a run over a model with that many exits; `has_stage1`: the first is done."""
    options = config.optimization
    every, last = tuple(range(num_exits)), (num_exits - 1,)
    epochs, learning_rate = options.num_train_epochs, options.learning_rate
    if options.strategy == "joint":
        return [Stage("joint", every, epochs, learning_rate)]
    if options.strategy == "alternating":
        return [Stage("alternating", every, epochs, learning_rate, alternates=True)]
    single = Stage("single", last, epochs, learning_rate)
    if options.strategy == "single":
        return [single]
    second = Stage(
        "exits",
        every[:-1],
        epochs if options.stage2_epochs is None else options.stage2_epochs,
        learning_rate if options.stage2_learning_rate is None else options.stage2_learning_rate,
        trains_backbone=False,
        has_teacher=True,
    )
    return [second] if has_stage1 else [single, second]


def check_exits(strategy: str, exit_layers: Sequence[int], num_layers: int) -> None:
    """Refuse exits with which a strategy of several exits has no meaning.

    Raises:
        ValueError: no exit on the last layer, or none before it.
    """
    layers = ",".join(map(str, exit_layers))
    if strategy == "single":
        return
    if exit_layers[-1] != num_layers:
        raise ValueError(
            f"exit_layers={layers}: strategy={strategy} needs an exit on the last layer too, "
            f"{num_layers} (num_hidden_layers makes the backbone shorter)."
        )
    if len(exit_layers) == 1:
        raise ValueError(
            f"exit_layers={layers}: strategy={strategy} needs at least one exit before the last "
            "layer; strategy=single trains the last one alone."
        )


def prepare(model: MultiExitForSequenceClassification, stage: Stage) -> dict[str, list[Parameter]]:
    """Set what is trained and the modes of all modules; returns the trained parameters in groups.

    One group an exit, named after its layer ("exit 3"), and one for the backbone that they share:
    the angle check decides for each. A single exit trained with the backbone is one model, hence
    one group.
    """
    trained = [model.exits[position] for position in stage.exits]
    model.requires_grad_(False).eval()
    for module in (*trained, *([model.backbone] if stage.trains_backbone else [])):
        module.requires_grad_(True).train()
    if stage.trains_backbone and len(trained) == 1:
        return {"model": [p for p in model.parameters() if p.requires_grad]}
    groups = {
        f"exit {model.exit_layers[position]}": list(model.exits[position].parameters())
        for position in stage.exits
    }
    if stage.trains_backbone:
        groups[SHARED] = list(model.backbone.parameters())
    return groups


def needed_exits(
    model: MultiExitForSequenceClassification, stage: Stage, positions: Sequence[int]
) -> list[int]:
    """The exits whose layers' states a batch needs: those that are trained, then the teacher."""
    return [*positions, len(model.exits) - 1] if stage.has_teacher else list(positions)


def stage_states(
    model: MultiExitForSequenceClassification,
    stage: Stage,
    positions: Sequence[int],
    batch: dict[str, Tensor],
) -> list[Tensor]:
    """Hidden states [N, T, H] of `needed_exits`, from one pass through the backbone."""
    with torch.set_grad_enabled(stage.trains_backbone):
        return model.exit_states(**batch, positions=needed_exits(model, stage, positions))


def stage_outputs(
    model: MultiExitForSequenceClassification,
    stage: Stage,
    positions: Sequence[int],
    states: Sequence[Tensor],
    attention_mask: Tensor,
) -> tuple[MultiExitOutput, Teacher | None]:
    """Outputs of the exits at `positions`, and of their teacher, from what `stage_states` gave."""
    teacher = None
    if stage.has_teacher:
        with torch.no_grad():
            frozen = model.classify(states[-1:], attention_mask, positions=[-1])
            teacher = Teacher(
                frozen.exit_embeddings[0], model.label_embeddings_of([-1])[0], frozen.logits
            )
        states = states[:-1]
    return model.classify(states, attention_mask, positions=positions), teacher


def stage_losses(
    model: MultiExitForSequenceClassification,
    stage: Stage,
    positions: Sequence[int],
    states: Sequence[Tensor],
    attention_mask: Tensor,
    config: TrainingConfig,
    labels: Tensor,
) -> tuple[MultiExitOutput, ExitLosses]:
    """`stage_outputs` and the losses of the exits at `positions`."""
    output, teacher = stage_outputs(model, stage, positions, states, attention_mask)
    losses = exit_losses(
        config.objective, output, model.label_embeddings_of(positions), labels, teacher
    )
    return output, losses
