"""Options of the commands that use a trained model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .fields import option
from .sections import (
    MAX_SEED,
    DataOptions,
    EvaluationDataOptions,
    device_option,
    disable_tqdm_option,
    text_column_option,
    text_pair_column_option,
)


@dataclass(frozen=True)
class InferenceOptions:
    model_name_or_path: str | None = option(
        None, "trained model: output_dir of a run, or one of its checkpoints"
    )
    per_device_eval_batch_size: int = option(64, "samples per forward pass", at_least=1)
    bf16: bool = option(False, "mixed precision in bfloat16")
    device: str = device_option()
    disable_tqdm: bool = disable_tqdm_option()


def label_threshold_option() -> Any:
    return option(
        None,
        "probability above which a label applies, for models that give a text several; unset: 0.5",
        above=0,
        at_most=0.999999,
    )


@dataclass(frozen=True)
class EvaluationOutputOptions:
    label_threshold: float | None = label_threshold_option()
    output_file: str | None = option(None, "JSON file to write the metrics to as well")


@dataclass(frozen=True)
class EvaluationConfig:
    """All options of `fusedacl evaluate`."""

    model: InferenceOptions = field(default_factory=InferenceOptions)
    data: EvaluationDataOptions = field(default_factory=EvaluationDataOptions)
    output: EvaluationOutputOptions = field(default_factory=EvaluationOutputOptions)


@dataclass(frozen=True)
class PredictionOptions:
    input_file: str | None = option(None, "texts to label: csv, tsv, jsonl or parquet")
    output_file: str | None = option(
        None,
        "file for labels and probabilities: csv or jsonl. In csv a ' is put before a label that a"
        " spreadsheet would run as a formula (=, +, -, @, tab or line break first; not numbers)."
        " Several labels per text are a list in jsonl, and joined by | in csv",
    )
    label_threshold: float | None = label_threshold_option()
    text_column: str | None = text_column_option()
    text_pair_column: str | None = text_pair_column_option()
    max_seq_length: int | None = option(
        None, "maximum tokens per text or pair; unset: the length used in training", at_least=3
    )
    policy: str | None = option(
        None,
        "early-exit policy: stored (the one that `fusedacl exits` chose), or one with its"
        " parameters, such as entropy:threshold=0.3; unset: no early exit",
    )
    repack: bool = option(
        False, "early exit: combine the remaining texts of several batches into full batches"
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
        "early-exit policies to sweep, separated by commas; `learned` is possible too and fits an"
        " additional layer on the evaluation split",
    )
    policy: str | None = option(
        None,
        "one of the policies: calibrate it for the target and store it in the model directory,"
        " which may not be a checkpoint of a run (a copy of one may)",
    )
    metric: str | None = option(
        None, "metric of the task to sweep for; unset: the task's main metric"
    )
    max_quality_loss: float | None = option(
        None,
        "target: largest relative loss of the metric compared with the full model; 0.01 if no"
        " target is given",
        at_least=0,
        at_most=1,
    )
    confidence: float | None = option(
        None,
        "bound max_quality_loss on new texts with this confidence, such as 0.95: more than 0, less"
        " than 1; unset: no guarantee",
        above=0,
    )
    risk: str = option(
        "lost_answers",
        "with --confidence, what max_quality_loss bounds. lost_answers: of the texts that the full"
        " model answers right, the share that early exit answers wrong (for the metric accuracy);"
        " changed_answers: the share of texts that early exit answers otherwise (any metric)",
        choices=("lost_answers", "changed_answers"),
    )
    max_mean_layer: float | None = option(
        None, "target: largest mean number of layers per text", at_least=1
    )
    max_flops_share: float | None = option(
        None, "target: largest fraction of the full model's operations", above=0, at_most=1
    )
    num_thresholds: int = option(33, "thresholds to try per policy", at_least=3)
    measure: bool = option(
        False,
        "time the setting of each policy that meets the target against the full model, at batch"
        " sizes 1 and 32; with --output_dir, up to six settings along its curve including that one",
    )
    measured_samples: int = option(200, "texts to time, spread evenly over the split", at_least=1)
    output_dir: str | None = option(None, "directory for exits.json, tables and figure")


@dataclass(frozen=True)
class ExitsConfig:
    """All options of `fusedacl exits`."""

    model: InferenceOptions = field(default_factory=InferenceOptions)
    data: DataOptions = field(default_factory=DataOptions)
    exits: ExitsOptions = field(default_factory=ExitsOptions)


@dataclass(frozen=True)
class ExportedModelOptions:
    model_name_or_path: str | None = option(
        None, "trained model: output_dir of a run, or one of its checkpoints"
    )
    per_device_eval_batch_size: int = option(64, "samples per forward pass", at_least=1)
    disable_tqdm: bool = disable_tqdm_option()


@dataclass(frozen=True)
class ExportOptions:
    format: str = option("onnx", "file format", choices=("onnx",))
    policy: str = option(
        "stored",
        "early-exit policy: stored (the one that `fusedacl exits` chose), or one with its"
        " parameters, such as entropy:threshold=0.3",
    )
    quantize: str = option(
        "none",
        "int8: weights in int8; needs a labelled data set, on which the score is measured",
        choices=("none", "int8"),
    )
    measure: bool = option(
        False,
        "time the graphs and PyTorch's early exit in turns, at batch sizes 1 and 32, on up to 200"
        " texts of a labelled data set",
    )
    output_dir: str | None = option(None, "new directory for the graphs and the tokenizer")


@dataclass(frozen=True)
class ExportConfig:
    """All options of `fusedacl export`."""

    model: ExportedModelOptions = field(default_factory=ExportedModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    export: ExportOptions = field(default_factory=ExportOptions)


@dataclass(frozen=True)
class MovedDataOptions:
    """New places of a run's data; an option that is unset keeps the run's own."""

    data_dir: str | None = option(None, "directory with <task_name>/…; unset: that of the run")
    train_file: str | None = option(None, "training file; unset: that of the run")
    validation_file: str | None = option(None, "validation file; unset: that of the run")


@dataclass(frozen=True)
class AngleDataOptions(MovedDataOptions):
    max_train_samples: int | None = option(
        None, "use the first training samples only; unset: as in the run", at_least=1
    )


@dataclass(frozen=True)
class DeviceOptions:
    device: str = device_option()
    disable_tqdm: bool = disable_tqdm_option()


@dataclass(frozen=True)
class ReportOptions:
    output_dir: str | None = option(None, "directory for tables, figures and page")
    labels: str | None = option(
        None, "names of the runs in tables and figures, separated by commas; unset: their methods"
    )


@dataclass(frozen=True)
class AngleOptions(ReportOptions):
    contrastive: str | None = option(
        None,
        "contrastive loss whose gradient is compared with that of cross-entropy. Unset: acl for"
        " runs with objective acl, scl for all others",
        choices=("scl", "acl"),
    )
    exit_layer: str | None = option(
        None, "layer of the exit whose losses are used, or all; unset: the last"
    )
    num_batches: int | None = option(
        None, "number of training batches; unset: those of one epoch, at most 200", at_least=1
    )
    per_device_train_batch_size: int | None = option(
        None,
        "samples per batch; unset: the run's contrastive_batch_size if it has one, else its"
        " per_device_train_batch_size",
        at_least=1,
    )
    seed: int | None = option(
        None,
        "seed of the order of the batches; unset: that of the run",
        at_least=0,
        at_most=MAX_SEED,
    )


@dataclass(frozen=True)
class AngleConfig:
    """All options of `fusedacl angles`, except the runs."""

    angles: AngleOptions = field(default_factory=AngleOptions)
    data: AngleDataOptions = field(default_factory=AngleDataOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)


@dataclass(frozen=True)
class TSNEOptions(ReportOptions):
    exit_layers: str | None = option(
        None, "layers of the exits to show: all, or a list such as 1,6; unset: first, middle, last"
    )
    max_samples: int = option(
        1000, "number of texts of the evaluation split, drawn at random", at_least=2
    )
    perplexity: float = option(
        30.0, "perplexity of t-SNE: effective number of neighbours of a point", above=0
    )
    # scikit-learn takes 32 bits.
    seed: int = option(42, "seed of the drawn texts and of t-SNE", at_least=0, at_most=2**32 - 1)
    per_device_eval_batch_size: int = option(64, "samples per forward pass", at_least=1)


@dataclass(frozen=True)
class TSNEConfig:
    """All options of `fusedacl tsne`, except the runs."""

    tsne: TSNEOptions = field(default_factory=TSNEOptions)
    data: MovedDataOptions = field(default_factory=MovedDataOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)
