"""Options of transformers' TrainingArguments and run_glue.py, as `fusedacl train` understands them.

Both generations of them: what transformers 4 called `evaluation_strategy` and transformers 5
`eval_strategy` are read alike. The table in docs/training.md is made of `TRAINING_ARGUMENTS`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("fusedacl")


@dataclass(frozen=True)
class Spelling:
    """An option of other programs.

    here: what it is, or why there is no such thing, for the table and for messages.
    name: our option of the same meaning and the same values.
    values: its values in lower case -> our options; a name instead: that option has to be given.
    """

    here: str
    name: str | None = None
    values: Mapping[str, dict[str, Any] | str] = field(default_factory=dict)


def _renamed(name: str) -> Spelling:
    return Spelling(f"`{name}`", name)


def _absent(here: str, *values: str) -> Spelling:
    """An option that is not there; those of its values that say what happens anyway are taken."""
    return Spelling(here, values={value: {} for value in values})


def _when(option: str) -> Spelling:
    here = f"`{option}`: a number of steps, 0 for never; unset: each epoch"
    never = {option: 0}
    # YAML reads a bare no as false.
    return Spelling(
        here, values={"no": never, _NO: never, "epoch": {option: None}, "steps": option}
    )


_BATCHES = "batches are built from memory, without workers"
_DDP = "several processes train under DeepSpeed"
_EVAL = "evaluation keeps logits and labels only, in the precision of the run"
_FSDP = "`deepspeed_config`: ZeRO 1 to 3 shard the same things"
_LIGER = "its kernels are for decoders"
_TRACKIO = "set trackio's own environment variables"
_YES, _NO, _UNSET = "true", "false", "none"

# Those that are options of `fusedacl train` under the same name are not listed.
TRAINING_ARGUMENTS: dict[str, Spelling] = {
    "optim": Spelling(
        "`optimizer`: AdamW, PyTorch's fused one or apex's",
        values={
            "adamw_torch": {"optimizer": "adamw"},
            "adamw_torch_fused": {"optimizer": "adamw"},
            "adamw_hf": {"optimizer": "adamw"},
            "adamw_apex_fused": {"optimizer": "apex_fused_adam"},
        },
    ),
    "optim_args": _absent("belongs to optimizers other than AdamW", _UNSET),
    "optim_target_modules": _absent("belongs to GaLore and APOLLO", _UNSET),
    "average_tokens_across_devices": _absent(
        "every text counts alike, whichever process has it", _YES
    ),
    "bf16_full_eval": _absent(_EVAL, _NO),
    "fp16_full_eval": _absent(_EVAL, _NO),
    "activation_checkpointing": _renamed("gradient_checkpointing"),
    "activation_checkpointing_kwargs": _absent(
        "`gradient_checkpointing` is non-reentrant, on every layer", _UNSET
    ),
    "gradient_checkpointing_kwargs": _absent(
        "`gradient_checkpointing` is non-reentrant, on every layer", _UNSET
    ),
    "use_liger_kernel": _absent(_LIGER, _NO),
    "liger_kernel_config": _absent(_LIGER, _UNSET),
    "use_cache": _absent("encoders have no such cache", _NO),
    "neftune_noise_alpha": _absent("made for instruction tuning; use `dropout`", _UNSET),
    "torch_empty_cache_steps": _absent("`profile` shows where memory goes", _UNSET),
    "auto_find_batch_size": _absent(
        "the batch is part of the contrastive loss; `contrastive_batch_size` keeps it in less"
        " memory",
        _NO,
    ),
    "logging_strategy": _absent("use `logging_steps`", "steps"),
    "logging_first_step": _absent("use `logging_steps`", _NO),
    "log_on_each_node": _absent("process 0 writes the only log", _NO),
    "logging_nan_inf_filter": _absent("a loss that is not finite ends the run", _NO),
    "include_num_input_tokens_seen": _absent("metrics.jsonl counts texts", "no", _NO),
    "log_level": _absent("Python's logging: logger `fusedacl`", "passive", "info"),
    "log_level_replica": _absent("other processes log warnings only", "warning", "passive"),
    "trackio_space_id": _absent(_TRACKIO, _UNSET),
    "trackio_bucket_id": _absent(_TRACKIO, _UNSET),
    "trackio_static_space_id": _absent(_TRACKIO, _UNSET),
    "eval_strategy": _when("eval_steps"),
    "eval_delay": _absent("use `eval_steps`", "0", "0.0"),
    "prediction_loss_only": _absent("`fusedacl evaluate` gives all metrics", _NO),
    "eval_on_start": _absent("`fusedacl evaluate`, on a trained model", _NO),
    "eval_do_concat_batches": _absent(_EVAL, _YES),
    "eval_use_gather_object": _absent(_EVAL, _NO),
    "eval_accumulation_steps": _absent(_EVAL, _UNSET),
    "include_for_metrics": _absent(_EVAL, "", "[]"),
    "batch_eval_metrics": _absent(_EVAL, _NO),
    "save_only_model": _absent("`save_steps` 0 keeps the final model alone", _NO),
    "save_strategy": _when("save_steps"),
    "save_on_each_node": _absent("`output_dir` lies on a file system that all share", _NO),
    "enable_jit_checkpoint": _absent("SIGTERM always saves and stops", _YES),
    "hub_token": _absent("a secret: set HF_TOKEN, or `hf auth login`", _UNSET),
    "hub_strategy": _absent("the final model is pushed, once", "end"),
    "hub_always_push": _absent("the final model is pushed, once", _NO),
    "hub_revision": _absent("the main branch is pushed to", _UNSET, "main"),
    "ignore_data_skip": _absent("a resumed run continues its epoch where it was", _NO),
    "restore_callback_states_from_checkpoint": _absent(
        "a resumed run has all of its state, that of early stopping too", _YES
    ),
    "full_determinism": _absent("on a CPU runs repeat bit for bit anyway", _NO),
    "data_seed": _absent("`seed` decides the order of the data too", _UNSET),
    "use_cpu": Spelling("`device` cpu", values={_YES: {"device": "cpu"}, _NO: {}}),
    "accelerator_config": _absent(_DDP, _UNSET),
    "parallelism_config": _absent(_DDP, _UNSET),
    "dataloader_drop_last": _absent("each text is read once an epoch", _NO),
    "dataloader_num_workers": _absent(_BATCHES, "0"),
    "dataloader_pin_memory": _absent(_BATCHES, _YES),
    "dataloader_persistent_workers": _absent(_BATCHES, _NO),
    "dataloader_prefetch_factor": _absent(_BATCHES, _UNSET),
    "dataloader_multiprocessing_context": _absent(_BATCHES, _UNSET),
    "dataloader_in_order": _absent(_BATCHES, _YES),
    "remove_unused_columns": _absent("texts and labels alone are read", _YES),
    "label_names": _absent("use `label_column`", _UNSET),
    "train_sampling_strategy": Spelling(
        "`group_by_length`, `sampler`",
        values={"random": {}, "group_by_length": {"group_by_length": True}},
    ),
    "length_column_name": _absent("lengths are counted in tokens", "length"),
    "ddp_find_unused_parameters": _absent(_DDP, _UNSET),
    "ddp_bucket_cap_mb": _absent(_DDP, _UNSET),
    "ddp_broadcast_buffers": _absent(_DDP, _UNSET),
    "ddp_static_graph": _absent(_DDP, _UNSET),
    "ddp_backend": _absent("gloo on CPUs, nccl on GPUs", _UNSET),
    "fsdp": _absent(_FSDP, _UNSET, _NO, ""),
    "fsdp_config": _absent(_FSDP, _UNSET),
    "deepspeed": _renamed("deepspeed_config"),
    "debug": _absent("values that are not finite are always named", ""),
    "skip_memory_metrics": _absent("use `profile`", _YES),
    "do_train": _absent("what `fusedacl train` does", _YES),
    "do_eval": _absent("done where there is a labelled split", _YES),
    "local_rank": Spelling("set by the launcher"),
}
# Options of transformers 4, of run_glue.py and of scripts like it.
_OTHERS: dict[str, Spelling] = {
    "evaluation_strategy": TRAINING_ARGUMENTS["eval_strategy"],
    "no_cuda": TRAINING_ARGUMENTS["use_cpu"],
    "num_warmup_steps": _renamed("warmup_steps"),
    "logging_dir": _absent("logs lie in `output_dir`", _UNSET),
    "label_column_name": _renamed("label_column"),
    "text_column_names": _absent("use `text_column`, `text_pair_column`", _UNSET),
    "max_length": _renamed("max_seq_length"),
    "pad_to_max_length": _absent("a batch is padded to its longest text", _NO),
    "use_fast_tokenizer": _absent("the fast tokenizer is taken where there is one", _YES),
    "overwrite_cache": _absent("texts are tokenized anew in each run", _YES, _NO),
    "config_name": _absent("the configuration is that of `model_name_or_path`", _UNSET),
    "cache_dir": _absent("set HF_HOME", _UNSET),
    "trust_remote_code": _absent("code of the hub is not run", _NO),
    "ignore_mismatched_sizes": _absent("exits are always new", _YES, _NO),
}
SPELLINGS: dict[str, Spelling] = {**TRAINING_ARGUMENTS, **_OTHERS}


def translated(given: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options under our names, from options under any known name; what is changed is logged once.

    beside: options that are given elsewhere too: those of the file, or of the command line.

    Raises:
        ValueError: an option that this engine does not have, or one that is given under two names
            with two values.
    """
    values = {name: value for name, value in given.items() if name not in SPELLINGS}
    for other in [name for name in given if name in SPELLINGS]:
        for name, value in _ours(other, given[other], {**(beside or {}), **given}).items():
            if values.get(name) is not None and _text(values[name]) != _text(value):
                raise ValueError(
                    f"{other}={given[other]} and {name}={values[name]} are given together and say "
                    "different things: keep one."
                )
            values[name] = value
    if isinstance(values.get("report_to"), list | tuple):
        values["report_to"] = ",".join(values["report_to"]) or "none"
    return _one_warmup(values)


def _ours(other: str, value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    spelling, text = SPELLINGS[other], _text(value)
    if other == "local_rank":
        return {}
    if spelling.name is not None:
        _say(f"{other} is {spelling.name} here.")
        return {spelling.name: value}
    if text not in spelling.values:
        known = ", ".join(word or "''" for word in spelling.values)
        raise ValueError(
            f"{other}={value} is not supported here: {spelling.here}."
            + (f" {other} may be {known}, or left out." if known else "")
        )
    made = spelling.values[text]
    if isinstance(made, str):
        if given.get(made) is None:
            raise ValueError(f"{other}={value}: set {made} to a number of steps.")
        return {}
    if made:
        words = ", ".join(f"{k}={'unset' if v is None else v}" for k, v in made.items())
        _say(f"{other}={value} is {words} here.")
    return made


def _one_warmup(values: dict[str, Any]) -> dict[str, Any]:
    """`warmup_steps` as a number of steps, or as the share that `warmup_ratio` is.

    transformers 4 has both, and takes the ratio where the steps are 0; transformers 5 writes a
    share as `warmup_steps` below 1.
    """
    if "warmup_steps" not in values and "warmup_ratio" in values:
        return {**values, "warmup_steps": None}
    try:
        steps = float(values.get("warmup_steps") or 0)
    except (TypeError, ValueError):
        return values  # told by the check of its type
    if values.get("warmup_steps") is None or not 0 <= steps < 1:
        return values
    rest = {**values, "warmup_steps": None}
    if steps == 0 and "warmup_ratio" in rest:
        _say(f"warmup_steps=0 beside warmup_ratio={rest['warmup_ratio']}: the ratio is meant.")
        return rest
    if _text(rest.get("warmup_ratio", steps)) != _text(steps):
        raise ValueError(
            f"warmup_steps={values['warmup_steps']} and warmup_ratio={rest['warmup_ratio']} are "
            "two shares of the steps: keep one."
        )
    if steps:
        _say(f"warmup_steps={values['warmup_steps']} is warmup_ratio={steps:g} here.")
    return {**rest, "warmup_ratio": steps}


def _text(value: Any) -> str:
    return str(value).lower()


@functools.cache
def _say(words: str) -> None:
    logger.info(words)
