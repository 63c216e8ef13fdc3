"""Start-up of a training run: its data, tokenizer, model and plan, from the configuration.

Whatever can be refused before the first step is refused here, or by the constructor of `Trainer`.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from transformers import PreTrainedTokenizerBase

from ...kernels.contrastive.dispatch import Workload, choose
from ...kernels.contrastive.options import TENSOR_TEMPERATURE
from ..backends.deepspeed.settings import read_deepspeed_config
from ..backends.interface import Backend
from ..backends.local import LocalBackend
from ..config.gate_scope import parse_scope
from ..config.label_options import check_label_options
from ..config.sections import MULTI_LABEL
from ..config.training import TrainingConfig
from ..data.balance import (
    BalancedBatches,
    balanced_batches,
    class_weights,
    warn_of_single_texts,
)
from ..data.batching import EncodedSplit, encode, epoch_batches, log_truncation
from ..data.dataset import TextData, load_splits
from ..data.quickstart import minilm_path
from ..model.encoder import checkpoint_layers
from ..model.encoder_layers import bottom_parameters
from ..model.multi_exit import MultiExitForSequenceClassification, parse_layers
from ..model.saved import (
    DEFAULT_MAX_LENGTH,
    check_vocabulary,
    length_limit,
    load_tokenizer,
    load_trained,
    record_of,
)
from ..objectives.temperature import LearnedTemperature
from ..runtime import processes
from ..runtime.device import choose_device, choose_dtype
from ..runtime.lock import RunLock
from .feature_cache import FeatureCache, check_directory
from .forward.dropout import fast_dropout
from .logs.services import require_services
from .stages import (
    Stage,
    StepPlan,
    check_exits,
    check_stage1_data,
    needed_exits,
    plan_steps,
    take_last_exit,
)
from .storage.best_model import BestModel, EarlyStopping, check_scores
from .storage.hub import open_repository
from .storage.output_dir import check_output_dir

logger = logging.getLogger("fusedacl")


@dataclass
class RunParts:
    """The parts of a run before its first step.

    given: the options as the user wrote them; config: with those that they imply.
    lock: of the output directory, not taken yet.
    deepspeed_config: the JSON object; None: the local backend trains.
    base_model: name or path of the model that the run starts from.
    best: keeps the best step; None: not asked for.
    predicted: the encoded test splits that `do_predict` is for.
    repository: on the hub, of process 0; None: the model is not pushed.
    class_weights: one per class [K]; None: all texts count alike.
    balanced: the order of the texts with `sampler` balanced.
    temperature: learned by all stages; None: constant.
    """

    given: TrainingConfig
    config: TrainingConfig
    lock: RunLock
    device: torch.device
    dtype: torch.dtype
    deepspeed_config: dict[str, Any] | None
    data: TextData
    encoded: Mapping[str, EncodedSplit]
    tokenizer: PreTrainedTokenizerBase
    base_model: str
    model: MultiExitForSequenceClassification
    plan: StepPlan
    best: BestModel | None
    predicted: Mapping[str, EncodedSplit]
    repository: str | None
    class_weights: list[float] | None
    balanced: BalancedBatches | None
    temperature: LearnedTemperature | None

    def early_stopping(self, stage: Stage) -> EarlyStopping | None:
        """The early stopping of a stage that begins; None if that was not asked for."""
        options = self.config.run
        if options.early_stopping_patience is None:
            return None
        return EarlyStopping(options, self.data.metrics, self.model.exit_layers, stage.exits)

    @property
    def train_split(self) -> EncodedSplit:
        return self.encoded["train"]

    @property
    def shows_progress(self) -> bool:
        return not self.config.run.disable_tqdm and processes.rank() == 0


def build_run(given: TrainingConfig) -> RunParts:
    """Load and check what a run needs.

    Raises:
        ValueError: a mistake in the configuration or the data.
    """
    config = given.resolved()
    lock = RunLock(Path(str(config.run.output_dir)))
    # First, because the other errors about a run's directory suggest deleting it.
    lock.check_free()
    check_output_dir(config)
    require_services(config.run)
    device, dtype = _device_and_dtype(config)
    options = config.optimization
    deepspeed_config: dict[str, Any] | None = {} if uses_deepspeed(config) else None
    if options.deepspeed_config is not None:
        deepspeed_config = read_deepspeed_config(options.deepspeed_config)
    data = _load_data(config)
    torch.manual_seed(options.seed)
    named = (options.stage1_model, config.model.model_name_or_path)
    base_model = next((name for name in named if name is not None), None)
    if base_model is None:
        base_model = str(minilm_path())
    model = _new_model(config, base_model, data, device)
    from_stage1 = options.stage1_model is not None
    named_by = "stage1_model" if from_stage1 else "model_name_or_path"
    if config.model.tokenizer_name is None:
        tokenizer = load_tokenizer(base_model, named_by, config.model.model_revision)
    else:
        tokenizer = load_tokenizer(config.model.tokenizer_name, "tokenizer_name")
    check_vocabulary(model, tokenizer)
    encoded, predicted = _encode(config, data, model, tokenizer)
    plan = plan_steps(config, len(model.exit_layers), len(encoded["train"]))
    check_scores(config.run, data, plan)
    best = None
    if config.run.load_best_model_at_end:
        best = BestModel(config.run, data.metrics, model.exit_layers, plan.stages[-1].exits)
    weights = class_weights(
        config.objective.class_weights, data.label_names, data.splits["train"].labels or []
    )
    if options.feature_cache is not None and not _is_deleted_before(config):
        last = plan.stages[-1]
        exits = needed_exits(model, last, last.exits)
        check_directory(
            Path(options.feature_cache), model, encoded["train"], exits, dtype,
            replaces_weights=not from_stage1,
        )  # fmt: skip
    balanced = _balance(config, plan, encoded["train"])
    # The last check, because it may leave a new repository.
    repository = None
    if config.run.push_to_hub and processes.rank() == 0:
        repository = open_repository(config.run)
    return RunParts(
        given, config, lock, device, dtype, deepspeed_config, data, encoded, tokenizer, base_model,
        model, plan, best, predicted, repository, weights, balanced,
        LearnedTemperature.of(config.objective, options, device),
    )  # fmt: skip


def _is_deleted_before(config: TrainingConfig) -> bool:
    """True for a feature cache in the directory of an old run that this one deletes first."""
    cache, run = Path(str(config.optimization.feature_cache)), Path(str(config.run.output_dir))
    is_inside = cache.resolve().is_relative_to(run.resolve())
    return config.run.overwrite_output_dir and is_inside


def _balance(
    config: TrainingConfig, plan: StepPlan, encoded: EncodedSplit
) -> BalancedBatches | None:
    """The order of `sampler` balanced; warn if most texts have no positive in their batch.

    Raises:
        ValueError: a contrastive batch needs more classes than there are.
    """
    options, world_size = config.optimization, processes.world_size()
    together, chunk = config.chunks_together, options.per_device_train_batch_size
    # With global negatives the processes' batches are one.
    parts = 1 if options.negatives == "global" else world_size
    chunk *= world_size // parts
    assert encoded.labels is not None
    labels, balanced = encoded.labels.numpy(), None
    if config.data.sampler == "balanced":
        balanced = balanced_batches(labels, chunk * together, config.data.samples_per_class, parts)
        logger.info(
            f"sampler=balanced: {balanced.num_full} of "
            f"{math.ceil(len(labels) / balanced.size)} contrastive batches of an epoch have "
            f"{balanced.num_classes} classes x {balanced.per_class} texts, the rest what is left."
        )
    if config.objective.objective != "ce":
        batches = epoch_batches(
            encoded.lengths,
            plan.batch_size,
            seed=options.seed,
            epoch=0,
            group_by_length=config.data.group_by_length,
            balanced=balanced,
        )
        warn_of_single_texts(labels, batches, together, parts)
    return balanced


def uses_deepspeed(config: TrainingConfig) -> bool:
    """True if DeepSpeed was asked for, or a launcher has started this process."""
    return config.optimization.deepspeed_config is not None or processes.launched() is not None


def _device_and_dtype(config: TrainingConfig) -> tuple[torch.device, torch.dtype]:
    options = config.optimization
    if uses_deepspeed(config):
        device = processes.join(config.run.device, config.run.ddp_timeout)
    else:
        device = choose_device(config.run.device)
    dtype = choose_dtype(device, fp16=options.fp16, bf16=options.bf16)
    _check_impl(config, device, dtype)
    return device, dtype


def _check_impl(config: TrainingConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse an implementation that cannot run here, or not with the options."""
    objective, options = config.objective, config.optimization
    num_ranks, needs = 1, list[str]()
    if objective.objective != "ce":
        num_ranks = processes.world_size() if options.negatives == "global" else 1
        if objective.temperature_learning_rate:
            needs.append(TENSOR_TEMPERATURE)
        if objective.memory_size:
            needs.append("memory_embeddings")
        if objective.class_weights:
            needs.append("class_weights")
    workload = Workload(
        device, dtype, objective.temperature, options.per_device_train_batch_size,
        num_ranks=num_ranks, needs=tuple(needs),
    )  # fmt: skip
    choose(objective.impl, workload)


def _load_data(config: TrainingConfig) -> TextData:
    data = load_splits(config.data)
    check_label_options(config, several=data.several_labels)
    for note in data.notes:
        logger.info(note)
    if config.without_effect:
        words = ", ".join(config.without_effect)
        logger.info("these have no effect beside the other options: %s.", words)
    return data


def _new_model(
    config: TrainingConfig, name_or_path: str, data: TextData, device: torch.device
) -> MultiExitForSequenceClassification:
    options, strategy = config.model, config.optimization.strategy
    stage1 = config.optimization.stage1_model
    loading = {
        "revision": options.model_revision, "attn_implementation": options.attn_implementation
    }  # fmt: skip
    if options.model_revision is not None and Path(name_or_path).exists():
        raise ValueError(
            f"model_revision={options.model_revision!r}: {name_or_path!r} is a local directory, "
            "which has one version. Leave it out."
        )
    trained = None if stage1 is None else load_trained(stage1, "stage1_model")
    model = MultiExitForSequenceClassification.from_encoder(
        name_or_path,
        label_names=data.label_names,
        dropout=options.dropout,
        num_hidden_layers=options.num_hidden_layers,
        loading={name: value for name, value in loading.items() if value is not None},
        exit_layers=None if strategy == "single" else parse_layers(options.exit_layers),
        exit_head=options.exit_head,
        exit_pooling=options.exit_pooling,
        exit_width=options.exit_width,
        exit_attention_heads=options.exit_attention_heads,
        problem_type=MULTI_LABEL if data.several_labels else None,
    )
    if stage1 is not None and trained is not None:
        check_stage1_data(data.record, record_of(trained), stage1)
        take_last_exit(model, trained, stage1)
        # Until this run's record takes its place, with what the first stage has seen.
        model.config.data_record = trained.config.data_record
        model.config.max_seq_length = trained.config.max_seq_length
    check_exits(strategy, model.exit_layers, model.config.backbone_config.num_hidden_layers)
    nn.Module.to(model, device)
    _set_up_encoder(config, model)
    return model


def _set_up_encoder(config: TrainingConfig, model: MultiExitForSequenceClassification) -> None:
    """Freeze, checkpoint and compile the encoder as the options say.

    Raises:
        ValueError: it cannot be, or what `gate_scope` cuts off would not be trained.
    """
    options, scope = config.optimization, parse_scope(config.objective.gate_scope)
    encoder, num_layers = model.backbone, model.config.backbone_config.num_hidden_layers
    if options.freeze_layers is not None:
        bottom_parameters(encoder, options.freeze_layers)
        first_decisive = num_layers - (scope or 0)
        has_nothing_below = model.config.exit_head == "linear" or scope != 0
        if scope is not None and options.freeze_layers >= first_decisive and has_nothing_below:
            raise ValueError(
                f"freeze_layers={options.freeze_layers} leaves nothing to train below the cut of "
                f"gate_scope={config.objective.gate_scope}. Use gate_scope=all, or freeze fewer."
            )
    if options.gradient_checkpointing:
        checkpoint_layers(encoder, partial(fast_dropout, encoder.device, options.torch_compile))
    if options.torch_compile:
        if config.gated:
            # Otherwise the graph's buffers serve one backward pass alone.
            torch._functorch.config.donated_buffer = False
        try:
            encoder.compile(
                backend=options.torch_compile_backend or "inductor",
                mode=options.torch_compile_mode,
                # Texts have many lengths; a graph for each would be compiled for minutes.
                dynamic=True,
            )
        except RuntimeError as error:
            raise ValueError(f"torch_compile: {error}") from None


def _encode(
    config: TrainingConfig,
    data: TextData,
    model: MultiExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[dict[str, EncodedSplit], dict[str, EncodedSplit]]:
    """The splits of training and evaluation, and those of `do_predict`."""
    limit = length_limit(model, tokenizer)
    of_stage1 = model.config.max_seq_length
    max_length = config.data.max_seq_length or of_stage1 or min(DEFAULT_MAX_LENGTH, limit)
    if of_stage1 not in (None, max_length):
        logger.warning(
            f"max_seq_length={max_length}: the model of stage1_model was trained with {of_stage1}. "
            "Leave max_seq_length out to take that."
        )
    model.config.max_seq_length = max_length
    encoded, predicted = (
        {name: encode(split, tokenizer, max_length, model_limit=limit) for name, split in s.items()}
        for s in (data.splits, data.predicted)
    )
    for name, split in {**predicted, **encoded}.items():
        log_truncation(name, split)
    run = config.run
    chooses = run.load_best_model_at_end or run.early_stopping_patience is not None
    record = replace(
        data.record,
        token_types=encoded["train"].token_types is not None,
        # `check_scores` refuses a choice without such a split.
        chosen_on=next(iter(data.evaluation_splits), None) if chooses else None,
    )
    first = record_of(model)
    model.config.data_record = record.after(first).to_dict()
    return encoded, predicted


def open_features(parts: RunParts, stage: Stage) -> FeatureCache | None:
    """The feature cache, if it was asked for and the stage can use one."""
    options = parts.config.optimization
    if options.feature_cache is None or stage.trains_backbone:
        return None
    return FeatureCache(
        Path(options.feature_cache),
        parts.model,
        parts.train_split,
        needed_exits(parts.model, stage, stage.exits),
        batch_size=options.per_device_eval_batch_size,
        pad_token_id=parts.tokenizer.pad_token_id,
        dtype=parts.dtype,
        progress=parts.shows_progress,
        # The weights of a first stage that this run trains are known too late for a refusal.
        replaces_weights=options.stage1_model is None,
    )


def new_backend(
    parts: RunParts, stage: Stage, groups: Mapping[str, list[Parameter]], num_steps: int
) -> Backend:
    """The backend of a stage whose parameters are trained in these groups.

    Raises:
        ValueError: DeepSpeed refuses the model or the configuration, or `gate_scope` the encoder.
    """
    settings: dict[str, Any] = {
        "groups": groups,
        # On a frozen backbone the exits have nothing in common.
        "independent": not stage.trains_backbone,
        "learning_rate": stage.learning_rate,
        # Exits alone are small and close to the losses: the exact decision is cheap.
        "gate_scope": parts.config.objective.gate_scope if stage.trains_backbone else "all",
    }
    kind: type[Backend] = LocalBackend
    if parts.deepspeed_config is not None:
        from ..backends.deepspeed.backend import DeepSpeedBackend

        kind, settings["deepspeed_config"] = DeepSpeedBackend, parts.deepspeed_config
    return kind(parts.model, parts.config, num_steps, parts.device, **settings)
