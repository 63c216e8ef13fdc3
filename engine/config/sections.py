"""Groups of options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .fields import option

# PyTorch's seeds have 64 bits; this leaves room for the offset that each process adds.
MAX_SEED = 2**63 - 1
# Bounds of a learned temperature; below 1/70, sums of exponentials may overflow float32.
LEARNED_TEMPERATURES = (0.02, 5.0)
# The schedules of transformers' SchedulerType that depend on the step alone.
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
)  # fmt: skip
EXIT_POOLINGS = ("first", "mean")
# Names of transformers for one label per text, and for any number.
SINGLE_LABEL, MULTI_LABEL = "single_label_classification", "multi_label_classification"


def device_option() -> Any:
    return option(
        "auto", "device to run on; auto: a GPU if there is one", choices=("auto", "cpu", "cuda")
    )


def disable_tqdm_option() -> Any:
    return option(False, "show no progress bar")


def text_column_option() -> Any:
    return option(
        None,
        "column of the text, or of the first text of a pair. Unset: that of the trained model, else"
        " found by its name",
    )


def text_pair_column_option() -> Any:
    return option(None, "column of the second text of a pair; needs --text_column")


def check_pooling(exit_head: str, exit_pooling: str) -> None:
    """Refuse an unknown pooling, and the mean over the tokens for exits that attend to them.

    Raises:
        ValueError: naming the option.
    """
    if exit_pooling not in EXIT_POOLINGS:
        raise ValueError(f"exit_pooling={exit_pooling!r} is none of {', '.join(EXIT_POOLINGS)}.")
    if exit_head != "linear" and exit_pooling != "first":
        raise ValueError(
            f"exit_pooling={exit_pooling} is for linear exits: set exit_head=linear, or leave it "
            "out."
        )


@dataclass(frozen=True)
class ModelOptions:
    model_name_or_path: str | None = option(
        None,
        "Hugging Face encoder to fine-tune: name on the hub, local directory, or output_dir of a"
        " fusedacl run",
    )
    num_hidden_layers: int | None = option(
        None, "keep only the first layers of the encoder; unset: all", at_least=1
    )
    exit_layers: str | None = option(
        None,
        "layers that get an exit, 1 being the first: all, or a list such as 2,4,6. Unset: the last"
        " layer for --strategy single, all layers otherwise",
    )
    exit_head: str = option(
        "mha",
        "classifier of an exit. mha: self-attention over the tokens; linear: one linear layer",
        choices=("mha", "linear"),
    )
    exit_pooling: str = option(
        "first",
        "state that a linear exit reads. first: the first token's, as in the paper; mean: the mean"
        " over the tokens, for encoders that were pretrained with it",
        choices=EXIT_POOLINGS,
    )
    exit_width: int = option(64, "width d_e of the mha head's representation", at_least=1)
    exit_attention_heads: int = option(4, "attention heads of the mha head", at_least=1)
    model_revision: str | None = option(
        None, "branch, tag or commit of --model_name_or_path on the hub; unset: main"
    )
    tokenizer_name: str | None = option(
        None, "tokenizer: name on the hub, or local directory; unset: that of the encoder"
    )
    attn_implementation: str | None = option(
        None,
        "attention of the encoder while it is trained: eager, sdpa, flash_attention_2 or another"
        " that transformers knows; unset: what transformers chooses",
    )
    dropout: float | None = option(
        None,
        "dropout probability of encoder and exits; unset: the encoder's own, and 0.1 in exits",
        at_least=0,
        at_most=0.99,
    )


@dataclass(frozen=True)
class DataOptions:
    """Options of a labelled data set; `data.dataset.load_splits` reads what they name."""

    task_name: str | None = option(
        None, "GLUE task, folder of --data_dir, or 'quickstart' (the built-in data set)"
    )
    data_dir: str | None = option(
        None, "directory with <task_name>/{train,validation,test}.parquet|jsonl|csv"
    )
    dataset_name: str | None = option(
        None, "text-classification data set: name on the hub, or local directory in hub layout"
    )
    dataset_config_name: str | None = option(None, "configuration (subset) of --dataset_name")
    validation_file: str | None = option(None, "validation file: csv, tsv, jsonl or parquet")
    text_column: str | None = text_column_option()
    text_pair_column: str | None = text_pair_column_option()
    label_column: str | None = option(
        None,
        "column of the labels, or columns of zeros and ones, one for each label, separated by"
        " commas; unset: 'label' or 'labels'",
    )
    label_separator: str | None = option(
        None,
        "what joins several labels in a cell of text, such as '|'. Unset: that of the trained"
        " model, else a cell is one label, or a list",
    )
    max_seq_length: int | None = option(
        None,
        "maximum tokens per text or pair; longer ones are truncated. Unset: 128 in training (with"
        " --stage1_model its length), otherwise the length used in training",
        at_least=3,
    )
    max_eval_samples: int | None = option(
        None, "evaluate on the first samples of the split only", at_least=1
    )


@dataclass(frozen=True)
class EvaluationDataOptions(DataOptions):
    split: str | None = option(
        None, "split to evaluate on, such as test; unset: validation, or test where there is none"
    )


@dataclass(frozen=True)
class TrainingDataOptions(DataOptions):
    train_file: str | None = option(None, "training file: csv, tsv, jsonl or parquet")
    problem_type: str | None = option(
        None,
        "whether a text has one label or any number. Unset: any number where --label_column names"
        " several columns, --label_separator is set or a cell is a list, else one",
        choices=(SINGLE_LABEL, MULTI_LABEL),
    )
    max_train_samples: int | None = option(
        None, "train on the first samples of the split only", at_least=1
    )
    max_train_samples_per_class: int | None = option(
        None,
        "train on at most this many texts of each class, drawn with --subset_seed",
        at_least=1,
    )
    validation_split_percentage: int | None = option(
        None,
        "hold out this percentage of the texts of each class, drawn with --subset_seed, and"
        " evaluate on them; the data's own validation split is not read",
        at_least=1,
        at_most=99,
    )
    subset_seed: int | None = option(
        None,
        "seed of --max_train_samples_per_class and --validation_split_percentage; unset: --seed",
        at_least=0,
        at_most=MAX_SEED,
    )
    do_predict: bool = option(
        False,
        "after training, also write labels and probabilities of the test split, and its metrics if"
        " it is labelled",
    )
    test_file: str | None = option(
        None, "test file of --do_predict beside --train_file: csv, tsv, jsonl or parquet"
    )
    max_predict_samples: int | None = option(
        None, "predict the first samples of the test split only", at_least=1
    )
    group_by_length: bool = option(
        False, "batch texts of similar length together: less padding, but less random batches"
    )
    sampler: str = option(
        "random",
        "order of the training texts. random: shuffled; balanced: each contrastive batch has"
        " --samples_per_class texts of each of its classes, until too few classes are left",
        choices=("random", "balanced"),
    )
    samples_per_class: int | None = option(
        None,
        "with --sampler balanced: texts of each class in a contrastive batch. Unset: the smallest"
        " number, at least 2, for which there are enough classes to fill the batch",
        at_least=2,
    )


@dataclass(frozen=True)
class ObjectiveOptions:
    objective: str = option(
        "acl",
        "loss. ce: cross-entropy; scl: cross-entropy and supervised contrastive loss; acl: the same"
        " with the label embeddings in the contrastive loss",
        choices=("ce", "scl", "acl"),
    )
    gate: str | None = option(
        None,
        "angle: drop the contrastive gradient when its angle to the cross-entropy gradient exceeds"
        " --max_angle; none: always add it. Unset: angle for acl, none for ce and scl",
        choices=("angle", "none"),
    )
    max_angle: float = option(
        90.0, "largest angle, in degrees, at which the gate keeps the gradient", at_least=0,
        at_most=180,
    )  # fmt: skip
    gate_scope: str = option(
        "all",
        "gradients that the gate's angle is measured on. all: of all trained parameters (exact;"
        " needs a second backward pass); top:K: of the last K layers and the exit; head: of a"
        " linear map to what both losses read (almost free, but the decision is approximate)."
        " top:K and head run two backward passes down to that point and one from there on; they"
        " need a single trained exit (--strategy single, or the first stage of two_stage)",
    )
    gate_agreement_steps: int = option(
        0,
        "with --gate_scope top:K or head: every this many optimizer steps, also compute the exact"
        " decision and log whether both agree (two more backward passes); 0: never",
        at_least=0,
    )
    aux_weight: float = option(
        0.02,
        "lambda, weight of the contrastive loss; cross-entropy has the weight 1 - lambda",
        at_least=0,
        at_most=1,
    )
    cross_layer: bool | None = option(
        None,
        "ACL-CL: add the last exit's representations and label embeddings to the contrastive batch"
        " of the other exits. Unset: true for acl in the second stage of --strategy two_stage",
    )
    distill_weight: float = option(
        0.0,
        "weight of the distillation from the last exit in the second stage of two_stage; the"
        " cross-entropy of an exit has the weight 1 - distill_weight",
        at_least=0,
        at_most=1,
    )
    distill_temperature: float = option(
        2.0, "temperature of both softmaxes in the distillation loss", above=0
    )
    label_smoothing_factor: float = option(
        0.0,
        "label smoothing of the cross-entropy in training: this share of a label is spread over all"
        " classes",
        at_least=0,
        at_most=1,
    )
    class_weights: str | None = option(
        None,
        "weights of the classes in the cross-entropy, and of the anchors in the contrastive loss."
        " balanced: a class counts as much as any other; or a JSON or YAML file, class: weight (or"
        " a JSON list). Scaled to a mean of 1 over the training texts; unset: every text counts"
        " alike",
    )
    temperature: float = option(0.5, "tau, temperature of the contrastive softmax", above=0)
    temperature_learning_rate: float = option(
        0.0,
        "learning rate of log(1 / tau), constant over the run: --temperature is then the initial"
        f" value of tau, which is kept between {LEARNED_TEMPERATURES[0]:g} and"
        f" {LEARNED_TEMPERATURES[1]:g}. 0: tau is constant",
        at_least=0,
    )
    memory_size: int = option(
        0,
        "number of earlier samples (of each process, its latest) that a contrastive batch is also"
        " compared with, without a gradient through them; where the last exit alone is trained. 0:"
        " none",
        at_least=0,
    )
    memory_warmup_steps: int = option(
        0,
        "optimizer steps of a stage in which the memory is filled but not read, while the"
        " representations still move fast",
        at_least=0,
    )
    contrastive_reduction: str = option(
        "mean",
        "reduction of the contrastive loss over the anchors; the paper uses the sum",
        choices=("mean", "sum"),
    )
    denominator: str = option(
        "all",
        "rows in the denominator of the contrastive softmax. all: every row; others: all but the"
        " anchor; negatives: rows of other classes",
        choices=("all", "others", "negatives"),
    )
    positives: str = option(
        "overlap",
        "texts that the contrastive loss draws together where a text may have several labels."
        " overlap: those that share labels, weighted by how many; each: every label of a text is"
        " an anchor of its own, as in MulSupCon",
        choices=("overlap", "each"),
    )
    impl: str = option(
        "auto",
        "implementation of the contrastive loss and of the gradients' angle; auto: chosen for the"
        " device and the batch",
        choices=("auto", "reference", "tiled", "triton"),
    )


@dataclass(frozen=True)
class OptimizationOptions:
    strategy: str = option(
        "single",
        "order of training. single: encoder and last exit only; joint: all exits at once;"
        " two_stage: single, then the other exits on the frozen encoder; alternating: the last exit"
        " alone in odd epochs, all exits in even ones",
        choices=("single", "joint", "two_stage", "alternating"),
    )
    stage1_model: str | None = option(
        None,
        "two_stage: output_dir of a run that has trained encoder and last exit; it replaces the"
        " first stage. A plain Hugging Face classifier is refused: use --model_name_or_path for it",
    )
    stage2_epochs: float | None = option(
        None, "two_stage: epochs of the second stage; unset: --num_train_epochs", above=0
    )
    stage2_learning_rate: float | None = option(
        None, "two_stage: peak learning rate of the second stage; unset: --learning_rate", above=0
    )
    feature_cache: str | None = option(
        None,
        "two_stage: directory for the frozen encoder's hidden states (float16; the size is logged),"
        " so that the epochs of the second stage need not run the encoder",
    )
    per_device_train_batch_size: int = option(
        32, "samples per forward pass in training, per process", at_least=1
    )
    per_device_eval_batch_size: int = option(
        64, "samples per forward pass in evaluation", at_least=1
    )
    negatives: str = option(
        "local",
        "samples in a contrastive batch. local: those of one process; global: those of all",
        choices=("local", "global"),
    )
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step", at_least=1)
    contrastive_batch_size: int | None = option(
        None,
        "samples in a contrastive batch: a multiple of per_device_train_batch_size that divides the"
        " samples of an optimizer step. Costs one more forward pass, but hardly any memory. Unset:"
        " the samples of one forward pass",
        at_least=1,
    )
    learning_rate: float = option(2e-5, "peak learning rate of AdamW", above=0)
    lr_scheduler_type: str = option(
        "linear",
        "course of the learning rate after the warm-up, by its name in transformers; linear: down"
        " to 0",
        choices=SCHEDULES,
    )
    lr_scheduler_kwargs: str | None = option(
        None, "further arguments of that schedule, as JSON, such as '{\"num_cycles\": 2}'"
    )
    num_train_epochs: float = option(3.0, "passes over the training set", above=0)
    max_steps: int = option(
        -1, "optimizer steps of each stage; a number above 0 overrides the epochs", at_least=-1
    )
    warmup_ratio: float = option(
        0.1, "fraction of the steps in which the learning rate rises to its peak", at_least=0,
        at_most=1,
    )  # fmt: skip
    warmup_steps: int | None = option(
        None,
        "optimizer steps of each stage in which the learning rate rises, in place of"
        " --warmup_ratio; below 1: such a ratio",
        at_least=1,
    )
    weight_decay: float = option(
        0.01, "weight decay of AdamW; biases and norms have none", at_least=0
    )
    adam_beta1: float = option(
        0.9, "decay of AdamW's mean of gradients", at_least=0, at_most=0.999999
    )
    adam_beta2: float = option(
        0.999, "decay of AdamW's mean of squared gradients", at_least=0, at_most=0.999999
    )
    adam_epsilon: float = option(1e-8, "added to AdamW's denominator", above=0)
    max_grad_norm: float = option(
        1.0, "norm to which the gradient is clipped; 0: no clipping", at_least=0
    )
    optimizer: str = option(
        "adamw",
        "adamw: PyTorch's fused AdamW; apex_fused_adam: NVIDIA apex's, which must be installed",
        choices=("adamw", "apex_fused_adam"),
    )
    freeze_layers: int | None = option(
        None,
        "freeze the embeddings and this many of the encoder's first layers. 0: the embeddings"
        " alone; unset: freeze nothing",
        at_least=0,
    )
    gradient_checkpointing: bool = option(
        False, "store only the states between layers, and recompute the rest in backward passes"
    )
    torch_compile: bool = option(False, "run the encoder through torch.compile")
    torch_compile_backend: str | None = option(None, "backend of torch.compile; unset: inductor")
    torch_compile_mode: str | None = option(
        None, "mode of torch.compile, such as reduce-overhead; unset: default"
    )
    fp16: bool = option(False, "mixed precision in float16 with dynamic loss scaling")
    bf16: bool = option(False, "mixed precision in bfloat16")
    tf32: bool | None = option(
        None, "whether float32 products on a GPU are taken in TF32; unset: as PyTorch is set"
    )
    deepspeed_config: str | None = option(
        None,
        'DeepSpeed\'s JSON file; values that are "auto" are filled in from these options. Runs of'
        " several processes use DeepSpeed with or without this file",
    )
    seed: int = option(
        42, "seed of weights, order of the data and dropout", at_least=0, at_most=MAX_SEED
    )
