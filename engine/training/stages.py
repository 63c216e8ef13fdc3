"""Training strategies (paper, section 3.3): the stages of a run, their exits and their steps.

single       backbone and last exit
joint        backbone and all exits, the sum of their losses (eq. 6)
two_stage    single, then the other exits on the frozen backbone, the last exit their teacher
alternating  joint, but the last exit alone in odd epochs (eq. 7, 8)
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PretrainedConfig

from ..backends.optimizers import check_schedule
from ..config.training import TrainingConfig
from ..data.record import DataRecord
from ..model.answers import has_several_labels
from ..model.encoder_layers import bottom_parameters
from ..model.multi_exit import MultiExitForSequenceClassification, MultiExitOutput, label_names
from ..objectives.losses import Teacher
from ..runtime import processes

SHARED = "backbone"

logger = logging.getLogger("fusedacl")


@dataclass(frozen=True)
class Stage:
    """A part of a run with one set of trained parameters and one learning-rate schedule.

    name: for logs.
    exits: positions in `exit_layers` of the exits that are trained.
    trains_backbone: whether the backbone is trained too; if not, its forward pass builds no graph
        and runs in evaluation mode, once for all exits.
    has_teacher: whether the last exit, frozen, teaches the trained ones.
    alternates: whether the last of the exits is trained alone in odd epochs (1 is the first).
    """

    name: str
    exits: tuple[int, ...]
    num_epochs: float
    learning_rate: float
    trains_backbone: bool = True
    has_teacher: bool = False
    alternates: bool = False

    def exits_in_epoch(self, epoch: int) -> tuple[int, ...]:
        """The exits whose losses count in an epoch of the stage (1 is the first)."""
        return self.exits[-1:] if self.alternates and epoch % 2 == 1 else self.exits

    def kept_exits(self, epoch: int, kept: Tensor) -> Tensor:
        """True for each exit of the epoch whose contrastive term was kept, [E]; [1] for all exits.

        kept: the gate's decisions [G] for the groups of `prepare`.
        """
        if len(kept) == 1:
            return kept
        first, stop = self.exits.index(self.exits_in_epoch(epoch)[0]), len(self.exits)
        return kept[first:stop]


def plan_stages(config: TrainingConfig, num_exits: int) -> list[Stage]:
    """The stages of a run over a model with that many exits."""
    options = config.optimization
    every, last = tuple(range(num_exits)), (num_exits - 1,)
    epochs, learning_rate = options.num_train_epochs, options.learning_rate
    if options.strategy == "joint":
        return [Stage("joint", every, epochs, learning_rate)]
    if options.strategy == "alternating":
        return [Stage("alternating", every, epochs, learning_rate, alternates=True)]
    single = [Stage("single", last, epochs, learning_rate)]
    if options.strategy == "single":
        return single
    second = Stage(
        "exits",
        every[:-1],
        epochs if options.stage2_epochs is None else options.stage2_epochs,
        learning_rate if options.stage2_learning_rate is None else options.stage2_learning_rate,
        trains_backbone=False,
        has_teacher=True,
    )
    return [*single, second]


def check_exits(strategy: str, exit_layers: Sequence[int], num_layers: int) -> None:
    """Refuse exits that a strategy cannot train.

    Raises:
        ValueError: a strategy of several exits lacks one on the last layer, or one before it.
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


def check_stage1_data(ours: DataRecord, trained: DataRecord, name: str) -> None:
    """Refuse a first stage that has read other columns; log if it has read other texts."""
    if (
        None not in (ours.text_columns, trained.text_columns)
        and ours.text_columns != trained.text_columns
    ):
        raise ValueError(
            f"stage1_model={name!r} was trained on the columns {trained.text_columns}, this run "
            f"reads {ours.text_columns}: name them with text_column (and text_pair_column)."
        )
    for difference in ours.differences(trained):
        logger.info(f"stage1_model={name!r} was trained on other data: {difference}.")


def _labels_per_text(config: PretrainedConfig) -> str:
    return "any number" if has_several_labels(config) else "one"


def take_last_exit(
    model: MultiExitForSequenceClassification,
    trained: MultiExitForSequenceClassification,
    name: str,
) -> None:
    """Copy the last exit of a trained model, which is to be the teacher of the other exits.

    Raises:
        ValueError: it has other classes, another kind of exit, or none on the last layer.
    """
    ours, theirs = model.config, trained.config
    first = (
        "the second stage needs a first one on the same data, with the same kind of exit on the "
        "last layer"
    )
    pairs = [
        ("classes", label_names(ours), label_names(theirs), first),
        ("labels per text", _labels_per_text(ours), _labels_per_text(theirs), first),
        ("exit_head", ours.exit_head, theirs.exit_head, first),
        ("exit_pooling", ours.exit_pooling, theirs.exit_pooling, first),
        ("last exit layer", model.exit_layers[-1], trained.exit_layers[-1], first),
    ]
    if ours.exit_head == "mha":
        mine, other = (
            f"{o.exit_width} with {o.exit_attention_heads} heads" for o in (ours, theirs)
        )
        pairs.append(
            ("exits of width", mine, other, "set exit_width and exit_attention_heads alike")
        )
    for what, mine, other, remedy in pairs:
        if mine != other:
            raise ValueError(
                f"stage1_model={name!r} has {what} {other}, this run {mine}: {remedy}."
            )
    model.exits[-1].load_state_dict(trained.exits[-1].state_dict())


@dataclass(frozen=True)
class StepPlan:
    """Optimizer steps of a run: the stage and the epoch of each, and the texts in it.

    ends: the step at which each stage ends.
    batch_size: texts of a micro-batch, those of all processes.
    """

    stages: Sequence[Stage]
    ends: Sequence[int]
    batch_size: int
    accumulation: int
    steps_per_epoch: int

    @property
    def num_steps(self) -> int:
        return self.ends[-1]

    def start(self, index: int) -> int:
        """The step after which a stage begins."""
        return self.ends[index - 1] if index else 0

    def epochs_before(self, index: int) -> int:
        """Epochs of the stages before one, those that were only begun included."""
        return math.ceil(self.start(index) / self.steps_per_epoch)

    def is_due(self, step: int, index: int, every: int | None) -> bool:
        """True if an evaluation or a checkpoint follows a step; every None: epoch, 0: never."""
        if every == 0:
            return False
        # The result of a stage is evaluated and saved before the next one begins.
        between_stages = step in self.ends[:-1]
        return between_stages or (step - self.start(index)) % (every or self.steps_per_epoch) == 0

    def ending(self, index: int, step: int) -> "StepPlan":
        """The plan with a stage that ends after `step`; the stages after it keep their lengths."""
        shift = step - self.ends[index]
        return replace(self, ends=[*self.ends[:index], *(end + shift for end in self.ends[index:])])

    def ended_early(self, planned: "StepPlan") -> dict[str, int]:
        """The last step of each stage that is shorter than in the plan of the run."""
        return {
            stage.name: end
            for index, (stage, end) in enumerate(zip(self.stages, self.ends, strict=True))
            if end - self.start(index) < planned.ends[index] - planned.start(index)
        }

    def epoch_share(self, step: int) -> float:
        """Epochs that are done after a step, as records have them."""
        return round(step / self.steps_per_epoch, 4)


def plan_steps(config: TrainingConfig, num_exits: int, num_texts: int) -> StepPlan:
    """The steps of a run over a model with that many exits and that many training texts.

    Raises:
        ValueError: there are fewer texts than processes, or too few steps for the strategy or for
            `memory_warmup_steps`, or the schedule of a stage is refused.
    """
    options, world_size = config.optimization, processes.world_size()
    if world_size > num_texts:
        raise ValueError(
            f"{world_size} processes for {num_texts} training texts: start at most one for each."
        )
    batch_size = options.per_device_train_batch_size * world_size
    num_batches = math.ceil(num_texts / batch_size)
    steps_per_epoch = math.ceil(num_batches / options.gradient_accumulation_steps)
    stages, ends = plan_stages(config, num_exits), [0]
    if options.stage1_model is not None:
        # The first one is done.
        stages = stages[1:]
    for stage in stages:
        steps = options.max_steps
        if steps < 0:
            steps = max(1, round(stage.num_epochs * steps_per_epoch))
        if stage.alternates and steps <= steps_per_epoch:
            raise ValueError(
                f"strategy=alternating trains the last exit alone in the first epoch: {steps} "
                f"steps, with {steps_per_epoch} per epoch, never reach the others. Use "
                "num_train_epochs of 2 or more."
            )
        try:
            check_schedule(config, stage.learning_rate, steps)
        except ValueError as error:
            where = f"stage {stage.name!r}: " if len(stages) > 1 else ""
            raise ValueError(f"{where}{error}") from None
        ends.append(ends[-1] + steps)
    objective = config.objective
    warmup = objective.memory_warmup_steps
    if objective.objective != "ce" and objective.memory_size and warmup >= ends[1]:
        raise ValueError(
            f"memory_warmup_steps={warmup}: the memory would never be read, because the stage has "
            f"{ends[1]} steps. Use fewer."
        )
    accumulation = options.gradient_accumulation_steps
    return StepPlan(stages, ends[1:], batch_size, accumulation, steps_per_epoch)


def prepare(
    model: MultiExitForSequenceClassification, stage: Stage, freeze_layers: int | None = None
) -> dict[str, list[Parameter]]:
    """Set what is trained and the modes of all modules; return the trained parameters in groups.

    There is one group per exit, named after its layer ("exit 3"), and one for the backbone that
    the exits share; the angle check decides for each. A single exit and the backbone trained with
    it are one model, hence one group.

    freeze_layers: leave the embeddings and so many layers as they are; None: train all.
    """
    trained = [model.exits[position] for position in stage.exits]
    model.requires_grad_(False).eval()
    for module in (*trained, *([model.backbone] if stage.trains_backbone else [])):
        module.requires_grad_(True).train()
    if stage.trains_backbone and freeze_layers is not None:
        for parameter in bottom_parameters(model.backbone, freeze_layers):
            parameter.requires_grad_(False)
    if stage.trains_backbone and len(trained) == 1:
        return {"model": [p for p in model.parameters() if p.requires_grad]}
    groups = {
        f"exit {model.exit_layers[position]}": list(model.exits[position].parameters())
        for position in stage.exits
    }
    if stage.trains_backbone:
        shared = [p for p in model.backbone.parameters() if p.requires_grad]
        groups |= {SHARED: shared} if shared else {}
    return groups


def needed_exits(
    model: MultiExitForSequenceClassification, stage: Stage, positions: Sequence[int]
) -> list[int]:
    """Exits whose layers a batch needs the states of: the trained ones, then the teacher."""
    return [*positions, len(model.exits) - 1] if stage.has_teacher else list(positions)


def stage_outputs(
    model: MultiExitForSequenceClassification,
    stage: Stage,
    positions: Sequence[int],
    batch: dict[str, Tensor],
    states: Sequence[Tensor] | None = None,
) -> tuple[MultiExitOutput, Teacher | None]:
    """Outputs of the exits at `positions`, and of their teacher.

    states: hidden states [N, T, H] of `needed_exits`; None: the backbone computes them.
    """
    if states is None:
        with torch.set_grad_enabled(stage.trains_backbone):
            states = model.exit_states(**batch, positions=needed_exits(model, stage, positions))
    mask, teacher = batch["attention_mask"], None
    if stage.has_teacher:
        with torch.no_grad():
            frozen = model.classify(states[-1:], mask, positions=[-1])
            teacher = Teacher(
                frozen.exit_embeddings[0], model.label_embeddings_of([-1])[0], frozen.logits
            )
        states = states[:-1]
    return model.classify(states, mask, positions=positions), teacher
