"""The configuration of `fusedacl train`, and which of its options contradict each other."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .fields import build
from .gate_scope import parse_scope
from .run_options import RunOptions, named_services
from .sections import (
    LEARNED_TEMPERATURES,
    ModelOptions,
    ObjectiveOptions,
    OptimizationOptions,
    TrainingDataOptions,
    check_pooling,
)
from .spellings import SPELLINGS as OTHER_SPELLINGS

_SECOND_STAGE = (
    *("cross_layer", "distill_weight", "stage1_model", "feature_cache"),
    *("stage2_epochs", "stage2_learning_rate"),
)
# Option -> the one without which it has no effect.
_NEEDED = {
    "samples_per_class": "sampler=balanced",
    "test_file": "do_predict",
    "max_predict_samples": "do_predict",
    "early_stopping_threshold": "early_stopping_patience",
    "hub_model_id": "push_to_hub",
    "hub_private_repo": "push_to_hub",
}


@dataclass(frozen=True)
class TrainingConfig:
    """All options of `fusedacl train`; `TrainingConfig.create(task_name="rte", …)` makes one."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: TrainingDataOptions = field(default_factory=TrainingDataOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    run: RunOptions = field(default_factory=RunOptions)

    SPELLINGS = OTHER_SPELLINGS

    @classmethod
    def create(cls, **options: Any) -> TrainingConfig:
        """Make a configuration from option names as on the command line.

        Raises:
            ValueError: an unknown option, a wrong type, or a value out of range.
        """
        return build(cls, options)

    @property
    def gated(self) -> bool:
        """True if the angle check (ACL-Grad) is on."""
        if self.objective.gate is None:
            return self.objective.objective == "acl"
        return self.objective.gate == "angle"

    def resolved(self) -> TrainingConfig:
        """Check the options against each other and fill in those that follow from others.

        Raises:
            ValueError: options contradict each other or are missing.
        """
        model, objective, optimization, run = (
            self.model, self.objective, self.optimization, self.run
        )  # fmt: skip
        if optimization.fp16 and optimization.bf16:
            raise ValueError("fp16 and bf16 are both on: choose one.")
        if run.output_dir is None:
            raise ValueError("output_dir is missing: name the directory that the run may fill.")
        if model.model_name_or_path is not None and optimization.stage1_model is not None:
            raise ValueError(
                "model_name_or_path and stage1_model are both given: the backbone is the "
                "stage1_model's, so leave model_name_or_path out."
            )
        has_model = model.model_name_or_path is not None or optimization.stage1_model is not None
        if not has_model and self.data.task_name != "quickstart":
            raise ValueError(
                "model_name_or_path is missing: a Hugging Face encoder (bert-base-uncased) or a "
                "local directory."
            )
        if objective.objective == "ce" and objective.gate == "angle":
            raise ValueError("gate=angle needs a contrastive loss: objective=acl or scl, not ce.")
        if model.exit_head == "mha" and model.exit_width % model.exit_attention_heads:
            raise ValueError(
                f"exit_width={model.exit_width} is not a multiple of "
                f"exit_attention_heads={model.exit_attention_heads}."
            )
        check_pooling(model.exit_head, model.exit_pooling)
        self._check_strategy()
        self._check_contrastive_batch()
        self._check_scope()
        self._check_memory()
        self._check_temperature()
        self._check_needed()
        self._check_batches()
        self._check_encoder()
        _ = self.schedule_arguments, named_services(run.report_to)
        if optimization.max_steps == 0:
            raise ValueError("max_steps=0 trains nothing: use -1 for whole epochs, or at least 1.")
        if run.profile_trace and run.profile == 0:
            raise ValueError("profile_trace needs steps to trace: set profile, such as 10.")
        self._check_best()
        if run.overwrite_output_dir and run.resume_from_checkpoint:
            raise ValueError(
                "overwrite_output_dir would delete the checkpoint of resume_from_checkpoint: leave "
                "one of them out."
            )
        gate = "angle" if self.gated else "none"
        resolved = dataclasses.replace(objective, gate=gate, cross_layer=self.contrasts_layers)
        optimization = dataclasses.replace(optimization, torch_compile=self.compiles)
        return dataclasses.replace(
            self, objective=resolved, optimization=optimization, data=self.data_with_seed()
        )

    @property
    def compiles(self) -> bool:
        """True if the encoder runs through torch.compile."""
        options = self.optimization
        named = (options.torch_compile_backend, options.torch_compile_mode)
        return options.torch_compile or named != (None, None)

    @property
    def schedule_arguments(self) -> dict[str, Any]:
        """`lr_scheduler_kwargs` as a dictionary.

        Raises:
            ValueError: they are no JSON object.
        """
        text = self.optimization.lr_scheduler_kwargs
        try:
            found = json.loads(text or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"lr_scheduler_kwargs={text!r} is not JSON: {error}.") from None
        if not isinstance(found, dict):
            raise ValueError(
                f"lr_scheduler_kwargs={text!r} is no JSON object: write names and values, such as "
                '{"num_cycles": 2}.'
            )
        return found

    def _check_needed(self) -> None:
        """Refuse options that need another one to have an effect."""
        options = {**vars(self.data), **vars(self.run)}
        default = {**vars(TrainingDataOptions()), **vars(RunOptions())}
        for name, needed in _NEEDED.items():
            other, _, value = needed.partition("=")
            is_there = options[other] == value if value else bool(options[other])
            if options[name] != default[name] and not is_there:
                raise ValueError(
                    f"{name}={options[name]} has no effect without {needed}: set that too, or "
                    "leave it out."
                )

    def _check_batches(self) -> None:
        """Refuse two orders of the texts, and a test file beside data that have splits."""
        data = self.data
        if data.sampler == "balanced" and data.group_by_length:
            raise ValueError(
                "sampler=balanced and group_by_length are two orders of the texts: keep one."
            )
        if data.test_file is not None and data.train_file is None:
            raise ValueError(
                f"test_file={data.test_file!r} belongs to train_file; other data have a test split "
                "of their own. Leave it out."
            )

    def _check_encoder(self) -> None:
        """Refuse options of the encoder that the others leave without effect or sense."""
        options, scope = self.optimization, self.objective.gate_scope
        if options.stage1_model is not None:
            for name in ("freeze_layers", "gradient_checkpointing"):
                value = getattr(options, name)
                if value not in (None, False):
                    raise ValueError(
                        f"{name}={value}: with stage1_model the encoder is not trained at all. "
                        "Leave it out."
                    )
            if self.model.model_revision is not None:
                raise ValueError(
                    "model_revision belongs to a model_name_or_path on the hub: leave it out."
                )
            # The cache is written before the run takes its output_dir, which must still be empty.
            cache, run = options.feature_cache, Path(str(self.run.output_dir)).resolve()
            if cache is not None and Path(cache).resolve().is_relative_to(run):
                raise ValueError(
                    f"feature_cache={cache!r} lies in output_dir={self.run.output_dir!r}: with "
                    "stage1_model name a directory outside it."
                )
        if self.compiles and parse_scope(scope):
            raise ValueError(
                f"gate_scope={scope} cuts the encoder between layers, which torch_compile would "
                "join. Use gate_scope=all or head, or leave torch_compile out."
            )

    def data_with_seed(self) -> TrainingDataOptions:
        """The data options, with the seed of the subsets that they draw.

        Raises:
            ValueError: options of the subsets contradict each other.
        """
        data = self.data
        held_out = data.validation_split_percentage
        if held_out is not None and data.validation_file is not None:
            raise ValueError(
                f"validation_split_percentage={held_out} and validation_file are both given: "
                "evaluate on one of them."
            )
        if data.max_train_samples_per_class is not None and data.max_train_samples is not None:
            raise ValueError(
                f"max_train_samples_per_class={data.max_train_samples_per_class} and "
                f"max_train_samples={data.max_train_samples} are both given: keep one."
            )
        if data.max_train_samples_per_class is None and held_out is None:
            if data.subset_seed is not None:
                raise ValueError(
                    f"subset_seed={data.subset_seed} draws nothing: set "
                    "max_train_samples_per_class or validation_split_percentage, or leave it out."
                )
            return data
        if data.subset_seed is not None:
            return data
        return dataclasses.replace(data, subset_seed=self.optimization.seed)

    def _check_best(self) -> None:
        """Refuse options by which the best checkpoint would lack its score or not be saved."""
        run = self.run
        choosing = [
            name
            for name in ("load_best_model_at_end", "early_stopping_patience")
            if getattr(run, name)
        ]
        if not choosing:
            for name in ("metric_for_best_model", "greater_is_better"):
                if getattr(run, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(run, name)} chooses the best model: set "
                        "load_best_model_at_end too (or early_stopping_patience), or leave it out."
                    )
            return
        if run.eval_steps == 0:
            raise ValueError(
                f"{choosing[0]} needs evaluations, and eval_steps=0 has none before the end: leave "
                "eval_steps out (each epoch), or set it."
            )
        if not run.load_best_model_at_end:
            return
        if run.save_steps == 0:
            raise ValueError(
                "load_best_model_at_end needs checkpoints to choose from, and save_steps=0 saves "
                "none: leave save_steps out (each epoch), or set it."
            )
        every = {"eval_steps": run.eval_steps, "save_steps": run.save_steps}
        if (run.eval_steps is None) != (run.save_steps is None):
            unset = next(name for name, value in every.items() if value is None)
            given = next(name for name, value in every.items() if value is not None)
            raise ValueError(
                f"load_best_model_at_end: {given}={every[given]}, but {unset} is unset, which "
                f"means each epoch. A checkpoint needs its scores: set {unset}={every[given]} "
                "too, or leave both out."
            )
        if run.eval_steps and run.save_steps and run.save_steps % run.eval_steps:
            raise ValueError(
                f"load_best_model_at_end: save_steps={run.save_steps} is not a multiple of "
                f"eval_steps={run.eval_steps}, so checkpoints would lack their scores."
            )

    @property
    def contrasts_layers(self) -> bool:
        """True if the second stage's contrastive batch contains the teacher's rows (ACL-CL)."""
        if self.objective.cross_layer is None:
            return self.optimization.strategy == "two_stage" and self.objective.objective == "acl"
        return self.objective.cross_layer

    @property
    def without_effect(self) -> list[str]:
        """Options, as "name=value", that were set and that the other options leave unused.

        They are allowed, so that runs to be compared can share all options but a few.
        """
        options = self.optimization
        unused = [] if self.gated else ["max_angle"]
        if self.objective.objective == "ce":
            unused += ["aux_weight", "temperature", "contrastive_reduction", "denominator"]
            unused += ["temperature_learning_rate", "memory_size", "memory_warmup_steps"]
            unused += ["positives"]
        if options.warmup_steps is not None:
            unused += ["warmup_ratio"]
        if options.lr_scheduler_type == "constant":
            unused += ["warmup_ratio", "warmup_steps", "lr_scheduler_kwargs"]
        if named_services(self.run.report_to) == []:
            unused += ["run_name", "project"]
        values, default = (
            {**vars(c.objective), **vars(c.optimization), **vars(c.run)}
            for c in (self, TrainingConfig())
        )
        return [
            f"{name}={values[name]}"
            for name in dict.fromkeys(unused)
            if values[name] != default[name]
        ]

    @property
    def chunks_together(self) -> int:
        """Number of forward passes whose samples form one contrastive batch."""
        options = self.optimization
        size = options.contrastive_batch_size or options.per_device_train_batch_size
        return size // options.per_device_train_batch_size

    def _check_contrastive_batch(self) -> None:
        options = self.optimization
        size, chunk = options.contrastive_batch_size, options.per_device_train_batch_size
        if size is None:
            return
        of_step = chunk * options.gradient_accumulation_steps
        if self.objective.objective == "ce":
            raise ValueError(
                f"contrastive_batch_size={size}: objective=ce contrasts nothing; leave it out."
            )
        if size % chunk or of_step % size:
            raise ValueError(
                f"contrastive_batch_size={size} must be a multiple of per_device_train_batch_size="
                f"{chunk} and a whole part of an optimizer step's {of_step} samples (times "
                f"gradient_accumulation_steps={options.gradient_accumulation_steps}). Use "
                f"contrastive_batch_size={chunk * -(-size // chunk)} with "
                f"gradient_accumulation_steps={-(-size // chunk)} for one such batch a step."
            )

    def _check_strategy(self) -> None:
        """Refuse options that have no effect with the strategy or the objective."""
        strategy = self.optimization.strategy
        if strategy != "two_stage":
            options = {**vars(self.objective), **vars(self.optimization)}
            for name in _SECOND_STAGE:
                value = options[name]
                if value not in (None, False, 0):
                    raise ValueError(
                        f"{name}={value} belongs to the second stage of strategy=two_stage; "
                        f"strategy={strategy} has none. Use two_stage, or leave {name} out."
                    )
        objective, default = self.objective, ObjectiveOptions()
        changes_distillation = objective.distill_temperature != default.distill_temperature
        if changes_distillation and objective.distill_weight == 0:
            raise ValueError(
                f"distill_temperature={objective.distill_temperature:g} has no effect without "
                "distillation: set distill_weight (with strategy=two_stage), or leave it out."
            )
        is_ungated_acl = objective.objective == "acl" and not self.gated
        if is_ungated_acl and objective.max_angle != default.max_angle:
            raise ValueError(
                f"max_angle={objective.max_angle:g} has no effect with gate=none: use gate=angle, "
                "or leave it out."
            )
        if objective.cross_layer and objective.objective != "acl":
            raise ValueError(
                f"cross_layer needs objective=acl: with {objective.objective} there are no label "
                "embeddings in the contrastive batch."
            )
        if self.optimization.stage1_model is not None and self.model.num_hidden_layers is not None:
            raise ValueError("num_hidden_layers has no effect on a stage1_model: leave it out.")
        if strategy == "single" and self.model.exit_layers is not None:
            raise ValueError(
                f"exit_layers={self.model.exit_layers!r}: strategy=single trains the last layer's "
                "exit only. Use joint, two_stage or alternating, or num_hidden_layers for a "
                "shorter backbone."
            )

    def _check_scope(self) -> None:
        """Refuse a gate_scope that the other options leave without meaning."""
        objective, options = self.objective, self.optimization
        scope = objective.gate_scope
        if parse_scope(scope) is None:
            if objective.gate_agreement_steps:
                raise ValueError(
                    f"gate_agreement_steps={objective.gate_agreement_steps}: gate_scope=all is the "
                    "exact decision itself. Use gate_scope=top:2 or head, or leave it out."
                )
            return
        if not self.gated:
            raise ValueError(
                f"gate_scope={scope} has no effect without the angle check: use objective=acl (or "
                "scl) with gate=angle, or leave gate_scope out."
            )
        if options.strategy in ("joint", "alternating"):
            raise ValueError(
                f"gate_scope={scope}: strategy={options.strategy} trains several exits, and each "
                "exit and the backbone takes a decision of its own: there is no single one to take "
                "at a cut. Use gate_scope=all."
            )
        if options.stage1_model is not None:
            raise ValueError(
                f"gate_scope={scope} belongs to the first stage, which stage1_model replaces; the "
                "second trains exits alone, with the exact decision. Leave gate_scope out."
            )
        if options.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gate_scope={scope} decides within a forward pass, but with "
                f"gradient_accumulation_steps={options.gradient_accumulation_steps} (which "
                "contrastive_batch_size needs too) an optimizer step has several. Use "
                "gate_scope=all, or a larger per_device_train_batch_size."
            )

    def _check_memory(self) -> None:
        """Refuse a memory that no contrastive batch would read."""
        size, warmup = self.objective.memory_size, self.objective.memory_warmup_steps
        if self.objective.objective == "ce":
            return
        if size == 0:
            if warmup:
                raise ValueError(
                    f"memory_warmup_steps={warmup} has no effect without memory_size: set that "
                    "too, or leave it out."
                )
            return
        options = self.optimization
        if options.strategy in ("joint", "alternating"):
            raise ValueError(
                f"memory_size={size}: a memory holds representations of one exit, and "
                f"strategy={options.strategy} trains several. Use strategy=single (or two_stage, "
                "for its first stage), or leave memory_size out."
            )
        if options.stage1_model is not None:
            raise ValueError(
                f"memory_size={size} belongs to the first stage, which stage1_model replaces; the "
                "second trains several exits. Leave memory_size out."
            )

    def _check_temperature(self) -> None:
        """Refuse to learn a temperature that begins out of bounds."""
        objective, (lowest, highest) = self.objective, LEARNED_TEMPERATURES
        rate, temperature = objective.temperature_learning_rate, objective.temperature
        if rate > 0 and objective.objective != "ce" and not lowest <= temperature <= highest:
            raise ValueError(
                f"temperature={temperature:g}: with temperature_learning_rate={rate:g} it begins "
                f"between {lowest:g} and {highest:g}, its bounds. Choose one of these, or leave "
                "temperature_learning_rate out."
            )
