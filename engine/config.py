"""The configuration of each command: frozen dataclasses, flat in YAML and on the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .gate_scope import check_scope
from .options import build, option


@dataclass(frozen=True)
class ModelOptions:
    model_name_or_path: str | None = option(
        None, "Hugging Face encoder to fine-tune: hub name or local directory (a fusedacl run too)"
    )
    num_hidden_layers: int | None = option(
        None, "keep the encoder's first layers only; none keeps all", at_least=1
    )
    exit_layers: str | None = option(
        None,
        "layers with an exit, 1 = first: all, or a list such as 2,4,6. Unset: the last layer for"
        " --strategy single, else all",
    )
    exit_head: str = option(
        "mha", "head that classifies a layer's output", choices=("mha", "linear")
    )
    exit_width: int = option(64, "width d_e of the mha head's representation", at_least=1)
    exit_attention_heads: int = option(4, "attention heads of the mha head", at_least=1)
    dropout: float | None = option(
        None,
        "dropout probability of backbone and head; none keeps the model's",
        at_least=0,
        at_most=0.99,
    )


@dataclass(frozen=True)
class DataOptions:
    task_name: str | None = option(
        None, "GLUE task, a folder of --data_dir, or 'quickstart' (the embedded data set)"
    )
    data_dir: str | None = option(
        None, "directory with <task_name>/{train,validation,test}.parquet|jsonl|csv"
    )
    dataset_name: str | None = option(
        None, "text-classification data set: hub name, or a local directory in hub layout"
    )
    dataset_config_name: str | None = option(None, "configuration (subset) of --dataset_name")
    validation_file: str | None = option(None, "validation file: csv, tsv, jsonl or parquet")
    max_seq_length: int | None = option(
        None,
        "tokens per text (pair), longer ones are truncated; by default 128 in training, else what"
        " the model was trained with",
        at_least=3,
    )
    max_eval_samples: int | None = option(None, "evaluate on the first samples only", at_least=1)


@dataclass(frozen=True)
class TrainingDataOptions(DataOptions):
    train_file: str | None = option(None, "training file: csv, tsv, jsonl or parquet")
    max_train_samples: int | None = option(None, "train on the first samples only", at_least=1)
    group_by_length: bool = option(
        False, "batch texts of similar length together: less padding, less random batches"
    )


@dataclass(frozen=True)
class ObjectiveOptions:
    objective: str = option(
        "acl",
        "ce: cross-entropy; scl: plus supervised contrastive loss; acl: label embeddings in it too",
        choices=("ce", "scl", "acl"),
    )
    gate: str | None = option(
        None,
        "angle: drop the contrastive gradient when its angle to the cross-entropy gradient exceeds"
        " --max_angle; none: always add it. Unset: angle for acl, none for ce and scl",
        choices=("angle", "none"),
    )
    max_angle: float = option(
        90.0, "largest angle kept by the gate, degrees", at_least=0, at_most=180
    )
    gate_scope: str = option(
        "all",
        "what the gate's angle is over. all: all trained parameters (exact, a second backward"
        " pass); top:K: the last K layers and the exit; head: the representation that both losses"
        " read (nearly free, and only roughly the exact decision). The last two, for backbone and"
        " one exit (--strategy single, first stage of two_stage; its second one is exact),"
        " back-propagate down to there twice, from there once",
    )
    gate_agreement_steps: int = option(
        0,
        "with another --gate_scope than all: find the exact decision too, every so many optimizer"
        " steps, and log whether it is the same (two more passes); 0: never",
        at_least=0,
    )
    aux_weight: float = option(
        0.02,
        "lambda, weight of the contrastive loss; cross-entropy has 1 - lambda",
        at_least=0,
        at_most=1,
    )
    cross_layer: bool | None = option(
        None,
        "ACL-CL: an exit's contrastive batch holds the teacher's rows too. Unset: on for acl in the"
        " second stage of --strategy two_stage",
    )
    distill_weight: float = option(
        0.0,
        "weight of the distillation from the last exit in the second stage; the exit's"
        " cross-entropy has 1 - it",
        at_least=0,
        at_most=1,
    )
    distill_temperature: float = option(2.0, "temperature of both softmaxes in it", above=0)
    temperature: float = option(0.5, "tau, temperature of the contrastive softmax", above=0)
    contrastive_reduction: str = option(
        "mean", "mean over anchors, or their sum (the paper)", choices=("mean", "sum")
    )
    denominator: str = option(
        "all",
        "rows in the softmax denominator: all, others (not the anchor), negatives (other classes)",
        choices=("all", "others", "negatives"),
    )
    impl: str = option(
        "auto",
        "implementation of the contrastive loss and the gradient check",
        choices=("auto", "reference", "tiled", "triton"),
    )


@dataclass(frozen=True)
class OptimizationOptions:
    strategy: str = option(
        "single",
        "single: backbone and last exit; joint: all exits at once; two_stage: single, then the"
        " others on the frozen backbone; alternating: joint, in odd epochs the last exit alone",
        choices=("single", "joint", "two_stage", "alternating"),
    )
    stage1_model: str | None = option(
        None,
        "two_stage: directory of a run of fusedacl train that trained backbone and last exit"
        " already, in place of the first stage; a plain Hugging Face classifier is not taken: train"
        " its encoder by --model_name_or_path",
    )
    stage2_epochs: float | None = option(
        None, "two_stage: epochs of the second stage; unset: --num_train_epochs", above=0
    )
    stage2_learning_rate: float | None = option(
        None, "two_stage: peak learning rate of the second stage; unset: --learning_rate", above=0
    )
    feature_cache: str | None = option(
        None,
        "two_stage: directory in which the backbone's states are kept for the second stage (half"
        " precision; the size is announced), so that its epochs do not run the backbone",
    )
    per_device_train_batch_size: int = option(32, "samples per forward pass", at_least=1)
    per_device_eval_batch_size: int = option(
        64, "samples per forward pass in evaluation", at_least=1
    )
    negatives: str = option(
        "local",
        "local: a process contrasts its own samples; global: those of all processes",
        choices=("local", "global"),
    )
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step", at_least=1)
    contrastive_batch_size: int | None = option(
        None,
        "samples that are contrasted with each other: a multiple of per_device_train_batch_size,"
        " that many times over in an optimizer step; for one more forward pass their number is not"
        " bound by memory. Unset: those of a forward pass",
        at_least=1,
    )
    learning_rate: float = option(2e-5, "peak learning rate of AdamW, linear to 0", above=0)
    num_train_epochs: float = option(3.0, "passes over the training set", above=0)
    max_steps: int = option(
        -1, "optimizer steps of each stage; more than 0 overrides the epochs", at_least=-1
    )
    warmup_ratio: float = option(
        0.1, "share of the steps with rising learning rate", at_least=0, at_most=1
    )
    weight_decay: float = option(0.01, "AdamW weight decay (none on biases and norms)", at_least=0)
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0: no clipping", at_least=0)
    optimizer: str = option(
        "adamw",
        "adamw: PyTorch's, fused; apex_fused_adam: NVIDIA apex's, which must be installed",
        choices=("adamw", "apex_fused_adam"),
    )
    fp16: bool = option(False, "mixed precision in float16 with dynamic loss scaling")
    bf16: bool = option(False, "mixed precision in bfloat16")
    deepspeed_config: str | None = option(
        None,
        'DeepSpeed\'s JSON file; what is "auto" in it is filled in from these options. A run of'
        " several processes uses DeepSpeed with or without it",
    )
    seed: int = option(42, "seed of weights, data order and dropout", at_least=0)


@dataclass(frozen=True)
class RunOptions:
    output_dir: str | None = option(None, "directory for everything the run leaves")
    overwrite_output_dir: bool = option(False, "empty --output_dir before the run")
    resume_from_checkpoint: str | None = option(
        None, "'latest', or a checkpoint directory of --output_dir to continue from"
    )
    logging_steps: int = option(10, "optimizer steps between lines of metrics.jsonl", at_least=1)
    eval_steps: int | None = option(
        None, "optimizer steps between evaluations; unset: each epoch", at_least=1
    )
    save_steps: int | None = option(
        None, "optimizer steps between checkpoints; unset: each epoch, 0: none", at_least=0
    )
    save_total_limit: int | None = option(
        2, "checkpoints to keep, the newest and the best one always; none keeps all", at_least=1
    )
    load_best_model_at_end: bool = option(
        False,
        "the final model is that of the checkpoint with the best score (the last exit's on the"
        " first evaluation split; of two_stage's second stage, the mean of its exits)",
    )
    metric_for_best_model: str | None = option(
        None, "with it: the score, a metric of the task or loss; unset: loss"
    )
    greater_is_better: bool | None = option(
        None, "with it: more of that score is better; unset: of all but loss"
    )
    profile: int = option(
        0,
        "profile so many optimizer steps, after 3 to warm up: where their time goes is printed and"
        " written to profile.json; 0: none",
        at_least=0,
        at_most=50,
    )
    profile_trace: bool = option(
        False, "with --profile: also write trace.json.gz, for Perfetto or chrome://tracing"
    )
    report_to: str = option("none", "also write to TensorBoard", choices=("none", "tensorboard"))
    device: str = option("auto", "auto: a GPU where there is one", choices=("auto", "cpu", "cuda"))
    ddp_timeout: float = option(
        600.0, "seconds that one of several processes waits for the others before it ends", above=0
    )
    disable_tqdm: bool = option(False, "no progress bar")


@dataclass(frozen=True)
class TrainingConfig:
    """All options of `fusedacl train`; `TrainingConfig.create(task_name="rte", …)` makes one."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: TrainingDataOptions = field(default_factory=TrainingDataOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    run: RunOptions = field(default_factory=RunOptions)

    @classmethod
    def create(cls, **options: Any) -> TrainingConfig:
        """A configuration from flat option names, as on the command line.

        Raises:
            ValueError: an unknown option, a wrong type, or a value out of range.
        """
        return build(cls, options)

    @property
    def gated(self) -> bool:
        """Whether the angle check (ACL-Grad) is on."""
        if self.objective.gate is None:
            return self.objective.objective == "acl"
        return self.objective.gate == "angle"

    def resolved(self) -> TrainingConfig:
        """The same configuration with contradictions refused and what is implied written out.

        Raises:
            ValueError: options that contradict each other or are missing, before any work.
        """
        if self.optimization.fp16 and self.optimization.bf16:
            raise ValueError("fp16 and bf16 are both on: choose one.")
        if self.run.output_dir is None:
            raise ValueError("output_dir is missing: name the directory that the run may fill.")
        if self.optimization.stage1_model is not None and self.model.model_name_or_path is not None:
            raise ValueError(
                "model_name_or_path and stage1_model are both given: the backbone is the "
                "stage1_model's, so leave model_name_or_path out."
            )
        if (
            self.model.model_name_or_path is None
            and self.optimization.stage1_model is None
            and self.data.task_name != "quickstart"
        ):
            raise ValueError(
                "model_name_or_path is missing: a Hugging Face encoder (bert-base-uncased) or a "
                "local directory."
            )
        if self.objective.objective == "ce" and self.objective.gate == "angle":
            raise ValueError("gate=angle needs a contrastive loss: objective=acl or scl, not ce.")
        if (
            self.model.exit_head == "mha"
            and self.model.exit_width % self.model.exit_attention_heads
        ):
            raise ValueError(
                f"exit_width={self.model.exit_width} is not a multiple of "
                f"exit_attention_heads={self.model.exit_attention_heads}."
            )
        self._check_strategy()
        self._check_contrastive_batch()
        check_scope(self)
        if self.optimization.max_steps == 0:
            raise ValueError("max_steps=0 trains nothing: use -1 for whole epochs, or at least 1.")
        if self.run.profile_trace and self.run.profile == 0:
            raise ValueError("profile_trace needs steps to trace: set profile, such as 10.")
        self._check_best()
        if self.run.overwrite_output_dir and self.run.resume_from_checkpoint:
            raise ValueError(
                "overwrite_output_dir would delete the checkpoint of resume_from_checkpoint."
            )
        gate = "angle" if self.gated else "none"
        objective = dataclasses.replace(
            self.objective, gate=gate, cross_layer=self.contrasts_layers
        )
        return dataclasses.replace(self, objective=objective)

    def _check_best(self) -> None:
        """Refuse what would leave the best model unknown or unsaved."""
        run = self.run
        if not run.load_best_model_at_end:
            for name in ("metric_for_best_model", "greater_is_better"):
                if getattr(run, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(run, name)} chooses the best model: set "
                        "load_best_model_at_end too, or leave it out."
                    )
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
        """Whether the second stage's contrastive batch holds the teacher's rows (ACL-CL)."""
        if self.objective.cross_layer is None:
            return self.optimization.strategy == "two_stage" and self.objective.objective == "acl"
        return self.objective.cross_layer

    @property
    def without_effect(self) -> list[str]:
        """Options, as "name=value", that were set and that the objective does not use.

        They are not refused: runs that are to be compared share them whatever their objective.
        """
        unused = [] if self.gated else ["max_angle"]
        if self.objective.objective == "ce":
            unused += ["aux_weight", "temperature", "contrastive_reduction", "denominator"]
        default = ObjectiveOptions()
        values = {name: getattr(self.objective, name) for name in unused}
        return [
            f"{name}={value}" for name, value in values.items() if value != getattr(default, name)
        ]

    @property
    def chunks_together(self) -> int:
        """Forward passes whose samples are one contrastive batch."""
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
        """Refuse options that the strategy or the objective would leave without effect."""
        strategy = self.optimization.strategy
        if strategy != "two_stage":
            for name, value, unset in (
                ("cross_layer", self.objective.cross_layer, (None, False)),
                ("distill_weight", self.objective.distill_weight, (0.0,)),
                ("stage1_model", self.optimization.stage1_model, (None,)),
                ("feature_cache", self.optimization.feature_cache, (None,)),
                ("stage2_epochs", self.optimization.stage2_epochs, (None,)),
                ("stage2_learning_rate", self.optimization.stage2_learning_rate, (None,)),
            ):
                if value not in unset:
                    raise ValueError(
                        f"{name}={value} belongs to the second stage of strategy=two_stage; "
                        f"strategy={strategy} has none."
                    )
        default = ObjectiveOptions()
        if (
            self.objective.distill_weight == 0
            and self.objective.distill_temperature != default.distill_temperature
        ):
            raise ValueError(
                f"distill_temperature={self.objective.distill_temperature:g} has no effect without "
                "distillation: set distill_weight (with strategy=two_stage), or leave it out."
            )
        if (
            self.objective.objective == "acl"
            and not self.gated
            and self.objective.max_angle != default.max_angle
        ):
            raise ValueError(
                f"max_angle={self.objective.max_angle:g} has no effect with gate=none: use "
                "gate=angle, or leave it out."
            )
        if self.objective.cross_layer and self.objective.objective != "acl":
            raise ValueError(
                f"cross_layer needs objective=acl: with {self.objective.objective} there are no "
                "label embeddings in the contrastive batch."
            )
        if self.optimization.stage1_model is not None and self.model.num_hidden_layers is not None:
            raise ValueError("num_hidden_layers has no effect on a stage1_model: leave it out.")
        if strategy == "single" and self.model.exit_layers is not None:
            raise ValueError(
                f"exit_layers={self.model.exit_layers!r}: strategy=single trains the last layer's "
                "exit only. Use joint, two_stage or alternating, or num_hidden_layers for a "
                "shorter backbone."
            )


@dataclass(frozen=True)
class InferenceOptions:
    model_name_or_path: str | None = option(
        None, "the trained model: a run's output_dir, or one of its checkpoints"
    )
    per_device_eval_batch_size: int = option(64, "samples per forward pass", at_least=1)
    bf16: bool = option(False, "mixed precision in bfloat16")
    device: str = option("auto", "auto: a GPU where there is one", choices=("auto", "cpu", "cuda"))
    disable_tqdm: bool = option(False, "no progress bar")


@dataclass(frozen=True)
class EvaluationOutputOptions:
    output_file: str | None = option(None, "also write the metrics to this JSON file")


@dataclass(frozen=True)
class EvaluationConfig:
    """All options of `fusedacl evaluate`."""

    model: InferenceOptions = field(default_factory=InferenceOptions)
    data: DataOptions = field(default_factory=DataOptions)
    output: EvaluationOutputOptions = field(default_factory=EvaluationOutputOptions)


@dataclass(frozen=True)
class PredictionOptions:
    input_file: str | None = option(None, "texts to label: csv, tsv, jsonl or parquet")
    output_file: str | None = option(None, "where labels and probabilities go: csv or jsonl")
    text_column: str | None = option(None, "column of the (first) text; by default found by name")
    text_pair_column: str | None = option(None, "column of the second text, with --text_column")
    max_seq_length: int | None = option(
        None, "tokens per text (pair); unset: what the model was trained with", at_least=3
    )
    policy: str | None = option(
        None,
        "early exit: stored (what `fusedacl exits` chose), or a policy such as"
        " entropy:threshold=0.3; unset: the full model",
    )
    repack: bool = option(
        False, "early exit: what is left of several batches goes on in full batches"
    )


@dataclass(frozen=True)
class PredictionConfig:
    """All options of `fusedacl predict`."""

    model: InferenceOptions = field(default_factory=InferenceOptions)
    prediction: PredictionOptions = field(default_factory=PredictionOptions)


@dataclass(frozen=True)
class ExitsOptions:
    policies: str = option(
        "max_probability,entropy,patience,patience_confidence,voting,fixed_layer",
        "early-exit policies to sweep, separated by commas; learned (a layer that is fitted on the"
        " evaluation split) too",
    )
    policy: str | None = option(
        None,
        "one of them: calibrate it for the target and store it with the model, which may not be a"
        " checkpoint of a run (a copy of one may)",
    )
    metric: str | None = option(None, "metric to sweep for; unset: the task's main one")
    max_quality_loss: float | None = option(
        None,
        "target: relative loss of the metric against the full model; 0.01 if no target is given",
        at_least=0,
        at_most=1,
    )
    max_mean_layer: float | None = option(None, "target: layers run per text", at_least=1)
    max_flops_share: float | None = option(
        None, "target: share of the full model's operations", above=0, at_most=1
    )
    num_thresholds: int = option(33, "thresholds to try per policy", at_least=3)
    measure: bool = option(
        False,
        "time each policy's setting for the target against the full model, batch 1 and 32; with"
        " output_dir up to six settings along its curve, that one among them",
    )
    measured_samples: int = option(200, "texts to time, spread over the split", at_least=1)
    output_dir: str | None = option(None, "directory for exits.json, tables and figure")


@dataclass(frozen=True)
class ExitsConfig:
    """All options of `fusedacl exits`."""

    model: InferenceOptions = field(default_factory=InferenceOptions)
    data: DataOptions = field(default_factory=DataOptions)
    exits: ExitsOptions = field(default_factory=ExitsOptions)


@dataclass(frozen=True)
class AngleOptions:
    output_dir: str | None = option(None, "directory for tables, figures and page")
    labels: str | None = option(
        None, "names of the runs in them, separated by commas; unset: their methods"
    )
    contrastive: str | None = option(
        None,
        "contrastive loss whose gradient is compared with that of cross-entropy. Unset: acl for"
        " runs with objective acl, else scl",
        choices=("scl", "acl"),
    )
    exit_layer: str | None = option(
        None, "layer of the exit whose losses are used, or all; unset: the last"
    )
    num_batches: int | None = option(
        None, "training batches; unset: those of one epoch, at most 200", at_least=1
    )
    per_device_train_batch_size: int | None = option(
        None,
        "samples per batch; unset: the run's, or its contrastive_batch_size where it has one",
        at_least=1,
    )
    seed: int | None = option(None, "seed of the batches' order; unset: the run's", at_least=0)


@dataclass(frozen=True)
class MovedDataOptions:
    """Where a run's data lie now; what is unset is as the run had it."""

    data_dir: str | None = option(None, "directory with <task_name>/…; unset: the run's")
    train_file: str | None = option(None, "training file; unset: the run's")
    validation_file: str | None = option(None, "validation file; unset: the run's")


@dataclass(frozen=True)
class AngleDataOptions(MovedDataOptions):
    max_train_samples: int | None = option(
        None, "the first training samples only; unset: as in the run", at_least=1
    )


@dataclass(frozen=True)
class DeviceOptions:
    device: str = option("auto", "auto: a GPU where there is one", choices=("auto", "cpu", "cuda"))
    disable_tqdm: bool = option(False, "no progress bar")


@dataclass(frozen=True)
class AngleConfig:
    """All options of `fusedacl angles`, but the runs."""

    angles: AngleOptions = field(default_factory=AngleOptions)
    data: AngleDataOptions = field(default_factory=AngleDataOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)


@dataclass(frozen=True)
class TSNEOptions:
    output_dir: str | None = option(None, "directory for tables, figures and page")
    labels: str | None = option(
        None, "names of the runs in them, separated by commas; unset: their methods"
    )
    exit_layers: str | None = option(
        None, "layers of the exits to show: all, or a list such as 1,6; unset: first, middle, last"
    )
    max_samples: int = option(1000, "texts of the evaluation split, drawn by --seed", at_least=2)
    perplexity: float = option(30.0, "neighbours that t-SNE gives a point, effectively", above=0)
    seed: int = option(42, "seed of the texts drawn and of t-SNE", at_least=0)
    per_device_eval_batch_size: int = option(64, "samples per forward pass", at_least=1)


@dataclass(frozen=True)
class TSNEConfig:
    """All options of `fusedacl tsne`, but the runs."""

    tsne: TSNEOptions = field(default_factory=TSNEOptions)
    data: MovedDataOptions = field(default_factory=MovedDataOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)
