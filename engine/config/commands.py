"""Options of the commands that use a trained model."""

from __future__ import annotations

from dataclasses import dataclass, field

from .fields import option
from .sections import DataOptions


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
