"""The options of `ACLTrainer`: those of transformers' Trainer and those of our objective."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ..config.sections import ObjectiveOptions, OptimizationOptions
from ..config.training import TrainingConfig
from ..runtime.text import did_you_mean

# Name here -> what `fusedacl train` would be told; the model stands for the first stage's result.
STRATEGIES: dict[str, dict[str, str]] = {
    "single": {"strategy": "single"},
    "joint": {"strategy": "joint"},
    "second_stage": {"strategy": "two_stage", "stage1_model": "the model"},
}
_OPTIONS = {
    field.name: field
    for section in (ObjectiveOptions, OptimizationOptions)
    for field in dataclasses.fields(section)
}
# Options that need what only our own loop has: a second decision beside that of a scope, the counts
# of the classes, texts with several labels, and what is kept from batch to batch.
_LOOP_ONLY = (
    "gate_agreement_steps", "class_weights", "positives", "temperature_learning_rate",
    "memory_size", "memory_warmup_steps",
)  # fmt: skip
_OF_OBJECTIVE = [field.name for field in dataclasses.fields(ObjectiveOptions)]
_NAMES = [name for name in (*_OF_OBJECTIVE, "negatives") if name not in _LOOP_ONLY]


def _shared(name: str) -> Any:
    """The option of that name of `fusedacl train`, as HfArgumentParser reads fields."""
    option = _OPTIONS[name]
    metadata = {key: option.metadata[key] for key in ("help", "choices") if option.metadata[key]}
    return dataclasses.field(default=option.default, metadata=metadata)


@dataclass
class ACLTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the options of our objective.

    These have the names, defaults and meaning that they have on the command line of
    `fusedacl train` (docs/training.md).

    Raises:
        ValueError: a value out of range, or options that contradict each other.
    """

    objective: str = _shared("objective")
    gate: str | None = _shared("gate")
    max_angle: float = _shared("max_angle")
    gate_scope: str = _shared("gate_scope")
    aux_weight: float = _shared("aux_weight")
    cross_layer: bool | None = _shared("cross_layer")
    distill_weight: float = _shared("distill_weight")
    distill_temperature: float = _shared("distill_temperature")
    temperature: float = _shared("temperature")
    contrastive_reduction: str = _shared("contrastive_reduction")
    denominator: str = _shared("denominator")
    impl: str = _shared("impl")
    strategy: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "what is trained. single: the model with its last exit; joint: all exits at"
            " once; second_stage: the exits before the last, on the frozen encoder, the last exit"
            " their teacher. Unset: single for a model with one classifier, joint for more",
            "choices": tuple(STRATEGIES),
        },
    )
    negatives: str = _shared("negatives")

    def __post_init__(self) -> None:
        super().__post_init__()
        config = self.config_for(1 if self.strategy in (None, "single") else 2)
        # transformers 5 has renamed these options, and reads the new name alone.
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            if getattr(self, name, False) and config.gated:
                settings = dict(getattr(self, f"{name}_kwargs") or {})
                # Reentrant checkpointing cannot compute gradients of only some parameters.
                if settings.setdefault("use_reentrant", False) and self.gate_scope != "all":
                    raise ValueError(
                        f"{name}_kwargs: gate_scope={self.gate_scope} does not work with "
                        "use_reentrant=True. Use {'use_reentrant': False}, or gate_scope=all."
                    )
                setattr(self, f"{name}_kwargs", settings)
        if self.torch_compile and self.gate_scope == "head":
            raise ValueError(
                "gate_scope=head does not work with torch_compile, which joins the classifier and "
                "all below it. Use gate_scope=top:1 or all, or leave torch_compile out."
            )
        if "lomo" in str(self.optim).lower():
            raise ValueError(
                f"optim={self.optim} steps during the backward pass, before there is a decision: "
                "use another optimizer, such as adamw_torch."
            )

    def config_for(self, num_exits: int) -> TrainingConfig:
        """Our options for a model with that many exits, checked as `fusedacl train` checks them.

        Raises:
            ValueError: a value out of range, or options that contradict each other.
        """
        strategy = self.strategy or ("single" if num_exits == 1 else "joint")
        if strategy not in STRATEGIES:
            raise ValueError(
                f"strategy={strategy!r} is not a choice.{did_you_mean(strategy, STRATEGIES)}"
            )
        if strategy != "single" and num_exits == 1:
            raise ValueError(
                f"strategy={strategy} needs a model with several exits "
                "(MultiExitForSequenceClassification); this one has one classifier. Use single."
            )
        options: dict[str, Any] = {name: getattr(self, name) for name in _NAMES}
        options |= {"output_dir": "unused", **STRATEGIES[strategy]}
        if strategy != "second_stage":
            options["model_name_or_path"] = "the model"
        options["gradient_accumulation_steps"] = self.gradient_accumulation_steps
        return TrainingConfig.create(**options).resolved()
