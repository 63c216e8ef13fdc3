"""DeepSpeed's JSON configuration: read, completed from the options, and checked against them.

A value in the JSON must agree with the option of `fusedacl train` for the same thing; "auto", or no
entry, takes the option's value. Keys that DeepSpeed would ignore, or that would break the two
gradients of ACL-Grad, are refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...config.training import TrainingConfig
from ...runtime.files import unique_keys
from ...runtime.text import did_you_mean
from ..loss_scaling import LossScaleOptions

AUTO = "auto"
DEFAULT_STAGE = 2
LARGEST_BUCKET = 50_000_000
SHIPPED = Path(__file__).with_name("presets")

_OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "fp16", "bf16", "zero_optimization", "optimizer", "scheduler",
    "data_types",
)  # fmt: skip
_PASSED_ON = (
    "steps_per_print", "wall_clock_breakdown", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "dump_state", "comms_logger", "memory_breakdown", "log_level",
    "zero_allow_untested_optimizer",
)  # fmt: skip
_REFUSED = {
    "amp": "apex amp is gone from apex: use fp16 or bf16.",
    "torch_autocast": "use fp16 or bf16.",
    "managed_gradient_accumulation": "fusedacl accumulates; leave it out.",
    "sparse_gradients": "the angle is taken over dense gradients; leave it out.",
    "csv_monitor": "use report_to, and metrics.jsonl.",
    "tensorboard": "use report_to=tensorboard.",
    "wandb": "use report_to=wandb.",
    "activation_checkpointing": "use gradient_checkpointing.",
}
_ZERO = (
    "stage", "reduce_scatter", "reduce_bucket_size", "allgather_bucket_size",
    "allgather_partitions", "overlap_comm", "contiguous_gradients", "sub_group_size",
    "use_multi_rank_bucket_allreduce", "ignore_unused_parameters", "memory_efficient_linear",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
    "stage3_gather_16bit_weights_on_model_save",
)  # fmt: skip
_OFFLOAD = ("device", "pin_memory", "fast_init", "buffer_count", "ratio")
_NOT_OFFLOADED = {
    "offload_param": "encoders fit into a GPU; offload_optimizer saves far more.",
    "cpu_offload": 'write "offload_optimizer": {"device": "cpu"}.',
    "cpu_offload_params": "encoders fit into a GPU.",
    "cpu_offload_use_pin_memory": "set pin_memory of offload_optimizer.",
}


@dataclass(frozen=True)
class DeepSpeedSettings:
    """Settings of a run under DeepSpeed.

    config: argument of `deepspeed.initialize`. loss_scale: options of fusedacl's own loss scaling,
    which replaces DeepSpeed's.
    """

    config: dict[str, Any]
    loss_scale: LossScaleOptions

    @property
    def stage(self) -> int:
        return int(self.config["zero_optimization"]["stage"])

    @property
    def offloads(self) -> bool:
        """True if the optimizer and its masters lie in host memory."""
        return "offload_optimizer" in self.config["zero_optimization"]


def read_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file, or in the preset of that name that comes with the package.

    Raises:
        ValueError: there is no such file, it is not JSON, or a key is in it twice.
    """
    file = Path(path)
    if not file.exists() and str(path) in shipped():
        file = SHIPPED / f"{path}.json"
    try:
        text = file.read_bytes()
    except OSError as error:
        raise ValueError(
            f"deepspeed_config={path}: {error.strerror or error}. Name a JSON file, or one of "
            f"{', '.join(shipped())}, which come with the package."
        ) from None
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except ValueError as error:
        raise ValueError(f"deepspeed_config={path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"deepspeed_config={path} holds {type(value).__name__}, not an object.")
    return value


def shipped() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(file.stem for file in SHIPPED.glob("*.json"))


def complete(
    given: Mapping[str, Any],
    config: TrainingConfig,
    *,
    world_size: int,
    num_trained: int,
    clips: bool = True,
) -> DeepSpeedSettings:
    """The settings of a run of that many processes.

    Args:
        given: the user's JSON object. If it is empty, all comes from the options, with ZeRO 2 for
            several processes.
        num_trained: number of trained weights, for the sizes of buffers.
        clips: whether DeepSpeed clips to max_grad_norm; otherwise fusedacl clips each group.

    Raises:
        ValueError: an unknown key, one that contradicts an option, or one that cannot work.
    """
    options = config.optimization
    for key, reason in _REFUSED.items():
        if key in given:
            raise ValueError(f"deepspeed_config: {key!r} is not supported: {reason}")
    _check_keys(given, (*_OURS, *_PASSED_ON))
    micro, steps = options.per_device_train_batch_size, options.gradient_accumulation_steps
    made = {key: given[key] for key in _PASSED_ON if given.get(key, AUTO) != AUTO}
    for key, value, option in (
        ("train_micro_batch_size_per_gpu", micro, "per_device_train_batch_size"),
        ("gradient_accumulation_steps", steps, "gradient_accumulation_steps"),
        ("train_batch_size", micro * steps * world_size, f"the options and {world_size} processes"),
        ("gradient_clipping", options.max_grad_norm, "max_grad_norm"),
    ):
        made[key] = _agreed(given, key, value, option)
    # DeepSpeed's default is 1.0.
    made["gradient_clipping"] = float(options.max_grad_norm if clips else 0.0)
    loss_scale = _precision(given, config, made)
    # With one process there is nothing to partition: ZeRO would only copy.
    default = DEFAULT_STAGE if world_size > 1 else 0
    made["zero_optimization"] = _zero(given, num_trained, default)
    if made["zero_optimization"]["stage"] == 3 and config.compiles:
        raise ValueError(
            "torch_compile: ZeRO 3 fetches weights before each module, which breaks the graph into "
            "pieces that are compiled for minutes. Use ZeRO 0 to 2, or leave torch_compile out."
        )
    is_half = options.fp16 or options.bf16
    if is_half and options.optimizer != "adamw" and made["zero_optimization"]["stage"] == 0:
        raise ValueError(
            f"optimizer={options.optimizer}: in half precision without ZeRO, DeepSpeed keeps the "
            "gradients of this optimizer where fusedacl cannot reach them. Use adamw, or ZeRO 1 to "
            "3 (zero_optimization.stage of deepspeed_config)."
        )
    if "offload_optimizer" in made["zero_optimization"]:
        _check_offload(made["zero_optimization"], config)
        # DeepSpeed's own AdamW for the host needs a compiler; PyTorch's fused one does not.
        made["zero_force_ds_cpu_optimizer"] = False
    _check_optimizer(given, config)
    sums = _block(given, "data_types", ("grad_accum_dtype",)).get("grad_accum_dtype")
    if sums not in (None, AUTO, "fp32"):
        raise ValueError(
            f"deepspeed_config: data_types.grad_accum_dtype={sums!r}: fusedacl sums the gradients "
            "of micro-batches in float32. Leave it out."
        )
    return DeepSpeedSettings(made, loss_scale)


def _agreed(given: Mapping[str, Any], key: str, value: Any, option: str, place: str = "") -> Any:
    """`value`, unless the JSON says something else."""
    found = given.get(key, AUTO)
    if found != AUTO and (isinstance(found, bool) != isinstance(value, bool) or found != value):
        raise ValueError(
            f"deepspeed_config: {place}{key} is {found!r}, but {value!r} by {option}. Change one, "
            'or write "auto" in the JSON.'
        )
    return value


def _block(given: Mapping[str, Any], name: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    block = given.get(name, {})
    if not isinstance(block, Mapping):
        raise ValueError(f"deepspeed_config: {name} must be an object, not {block!r}.")
    _check_keys(block, known, f"{name}.")
    return block


def _check_keys(block: Mapping[str, Any], known: tuple[str, ...], place: str = "") -> None:
    for key in block:
        if key not in known:
            raise ValueError(
                f"deepspeed_config: unknown or unsupported key '{place}{key}'."
                f"{did_you_mean(key, known)}"
            )


def _precision(
    given: Mapping[str, Any], config: TrainingConfig, made: dict[str, Any]
) -> LossScaleOptions:
    names = tuple(field.name for field in fields(LossScaleOptions))
    fp16 = _block(given, "fp16", ("enabled", *names))
    bf16 = _block(given, "bf16", ("enabled",))
    options = config.optimization
    for block, name, on in ((fp16, "fp16", options.fp16), (bf16, "bf16", options.bf16)):
        if name in given:
            _agreed({"enabled": False, **block}, "enabled", on, f"the option {name}", f"{name}.")
        if on:
            made[name] = {"enabled": True}
    if options.fp16:
        # fusedacl scales the losses and decides which steps to skip, alike for every stage.
        made["fp16"]["loss_scale"] = 1.0
    values = {key: fp16[key] for key in names if fp16.get(key, AUTO) != AUTO}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ValueError(f"deepspeed_config: fp16.{key}={value!r} must be a number, 0 or more.")
    for key in ("loss_scale_window", "hysteresis"):
        if values.get(key, 1) < 1:
            raise ValueError(f"deepspeed_config: fp16.{key}={values[key]!r} must be at least 1.")
    return LossScaleOptions(**values)


def _zero(given: Mapping[str, Any], num_trained: int, default_stage: int) -> dict[str, Any]:
    place = "deepspeed_config: zero_optimization"
    block = _block(given, "zero_optimization", (*_ZERO, "offload_optimizer", *_NOT_OFFLOADED))
    for key, reason in _NOT_OFFLOADED.items():
        if block.get(key) and block[key] != {"device": "none"}:
            raise ValueError(f"{place}.{key} is not supported: {reason}")
    made = {key: block[key] for key in _ZERO if block.get(key, AUTO) != AUTO}
    stage = made.setdefault("stage", default_stage)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"{place}.stage={stage!r} must be 0 to 3.")
    # DeepSpeed's default of 500 million elements is larger than encoders are.
    made.setdefault("reduce_bucket_size", max(1, min(num_trained, LARGEST_BUCKET)))
    offload = _block(block, "offload_optimizer", _OFFLOAD)
    if offload.get("device", "none") != "none":
        made["offload_optimizer"] = {k: v for k, v in offload.items() if v != AUTO}
    return made


def _check_offload(zero: Mapping[str, Any], config: TrainingConfig) -> None:
    place = "deepspeed_config: zero_optimization.offload_optimizer"
    block = zero["offload_optimizer"]
    if block["device"] != "cpu":
        raise ValueError(
            f"{place}.device={block['device']!r} is not supported: the second gradient would have "
            "to wait for the disk. Use cpu."
        )
    if block.get("ratio", 1.0) != 1.0:
        raise ValueError(f"{place}.ratio={block['ratio']!r} is not supported. Leave it out.")
    if zero["stage"] == 0:
        raise ValueError(f"{place} needs ZeRO 1 to 3; zero_optimization.stage is 0.")
    if config.optimization.optimizer != "adamw":
        raise ValueError(
            f"{place}: optimizer={config.optimization.optimizer} runs on a GPU only. Use adamw."
        )


def _check_optimizer(given: Mapping[str, Any], config: TrainingConfig) -> None:
    if "optimizer" in given:
        block = _block(given, "optimizer", ("type", "params"))
        if str(block.get("type", AUTO)).lower() not in ("adamw", AUTO):
            raise ValueError(
                f"deepspeed_config: optimizer.type={block['type']!r}: fusedacl trains with AdamW. "
                "Leave the optimizer out; the option optimizer says which AdamW."
            )
        known = ("lr", "weight_decay", "betas", "eps", "torch_adam", "adam_w_mode")
        params = _block(block, "params", known)
        options = config.optimization
        for key, value, option in (
            ("lr", options.learning_rate, "learning_rate"),
            ("weight_decay", options.weight_decay, "weight_decay"),
            ("betas", [options.adam_beta1, options.adam_beta2], "adam_beta1 and adam_beta2"),
            ("eps", options.adam_epsilon, "adam_epsilon"),
            ("adam_w_mode", True, "AdamW of fusedacl"),
        ):
            _agreed(params, key, value, option, "optimizer.params.")
    if "scheduler" in given:
        block = _block(given, "scheduler", ("type", "params"))
        params = block.get("params", {})
        is_left = isinstance(params, Mapping) and all(v == AUTO for v in params.values())
        if block.get("type") != "WarmupDecayLR" or not is_left:
            raise ValueError(
                "deepspeed_config: the schedule is fusedacl's: lr_scheduler_type, warmup_ratio. "
                'Leave "scheduler" out (or WarmupDecayLR with every parameter "auto").'
            )
