"""Groups of options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import option


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
