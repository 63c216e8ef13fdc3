"""DeepSpeed's JSON file: what is filled in, and what is refused, before DeepSpeed is loaded."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine import TrainingConfig
from fusedacl.engine.backends.deepspeed.settings import (
    DeepSpeedSettings,
    complete,
    read_deepspeed_config,
)
from fusedacl.engine.backends.loss_scaling import DeepSpeedLossScaler, LossScaleOptions

# A configuration for Hugging Face's Trainer.
HUGGING_FACE = {
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000,
        "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none"},
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}  # fmt: skip


def settings(given: dict[str, Any], clips: bool = True, **options: Any) -> DeepSpeedSettings:
    config = TrainingConfig.create(task_name="quickstart", output_dir="unused", **options)
    return complete(given, config.resolved(), world_size=4, num_trained=3000, clips=clips)


def test_zero_3_is_not_compiled() -> None:
    with pytest.raises(ValueError, match="torch_compile: ZeRO 3 fetches weights before each"):
        settings({"zero_optimization": {"stage": 3}}, torch_compile_backend="aot_eager")
    assert settings({"zero_optimization": {"stage": 2}}, torch_compile=True).stage == 2


def test_the_options_fill_in_what_is_left_out_or_auto() -> None:
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "fp16": True}
    for given in ({}, HUGGING_FACE):
        made = settings(given, **options)
        assert made.config["train_batch_size"] == 64
        assert made.config["train_micro_batch_size_per_gpu"] == 8
        assert made.config["gradient_accumulation_steps"] == 2
        assert made.config["gradient_clipping"] == 1.0
        assert made.config["fp16"] == {"enabled": True, "loss_scale": 1.0}
        assert "bf16" not in made.config
        assert made.config["zero_optimization"]["reduce_bucket_size"] == 3000
    assert settings({}).stage == 2
    assert made.stage == 3
    wanted = LossScaleOptions(loss_scale_window=1000, hysteresis=2, min_loss_scale=1)
    assert made.loss_scale == wanted
    assert made.config["steps_per_print"] == 2000
    json.dumps(made.config)


def test_groups_that_fusedacl_clips_are_not_clipped_again() -> None:
    assert settings({}, clips=False).config["gradient_clipping"] == 0.0
    assert settings({}, max_grad_norm=0).config["gradient_clipping"] == 0.0


def offloading(stage: int = 2, **block: Any) -> dict[str, Any]:
    offload = {"device": "cpu", **block}
    return {"zero_optimization": {"stage": stage, "offload_optimizer": offload}}


def test_optimizer_offload() -> None:
    made = settings(offloading(pin_memory=False))
    assert made.offloads
    offload = {"device": "cpu", "pin_memory": False}
    assert made.config["zero_optimization"]["offload_optimizer"] == offload
    # Else DeepSpeed demands an optimizer of its own, which wants a compiler.
    assert made.config["zero_force_ds_cpu_optimizer"] is False
    assert not settings(offloading(device="none")).offloads
    with pytest.raises(ValueError, match="apex_fused_adam runs on a GPU only"):
        settings(offloading(), optimizer="apex_fused_adam")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gradient_cliping": 1.0}, "'gradient_cliping'.*Did you mean 'gradient_clipping'"),
        ({"amp": {"enabled": True}}, "'amp' is not supported: apex amp is gone"),
        ({"train_batch_size": 32}, "train_batch_size is 32, but 128 by .*4 processes"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but 1.0 by max_grad"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps is True, but 1"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, but False by the option"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but False by the option"),
        ({"fp16": {"hysteresi": 2}}, "fp16.hysteresi.*Did you mean 'hysteresis'"),
        ({"fp16": {"hysteresis": 0}}, "fp16.hysteresis=0 must be at least 1"),
        ({"fp16": {"loss_scale": "big"}}, "fp16.loss_scale='big' must be a number"),
        ({"fp16": {"loss_scale": None}}, "fp16.loss_scale=None must be a number"),
        ({"fp16": {"hysteresis": [2]}}, r"fp16.hysteresis=\[2\] must be a number"),
        ({"fp16": {"loss_scale": True}}, "fp16.loss_scale=True must be a number"),
        ({"zero_optimization": {"stage": 4}}, "stage=4 must be 0 to 3"),
        ({"zero_optimization": {"stage": True}}, "stage=True must be 0 to 3"),
        ({"zero_optimization": 2}, "zero_optimization must be an object"),
        ({"zero_optimization": {"overlap_com": True}}, "Did you mean 'overlap_comm'"),
        (offloading(device="nvme"), "device='nvme' is not supported.*Use cpu"),
        (offloading(0), "needs ZeRO 1 to 3"),
        (offloading(ratio=0.5), "ratio=0.5 is not supported"),
        (offloading(pin_memry=True), "pin_memry.*Did you mean 'pin_memory'"),
        ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload is not supported: write"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param is not supp"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type='Lamb': fusedacl trains with AdamW"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "lr is 1.0, but 2e-05 by"),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, "by adam_beta1 and adam_beta2"),
        ({"scheduler": {"type": "WarmupLR"}}, "the schedule is fusedacl's"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": "auto"}}, "the schedule is fusedacl's"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": None}}, "the schedule is fusedacl's"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype='bf16'"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(given)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    assert read_deepspeed_config(path) == {"zero_optimization": {"stage": 1}}
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "holds list, not an object"),
        ('{"fp16": {}, "fp16": {}}', "'fp16' is given twice"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_deepspeed_config(path)
    with pytest.raises(ValueError, match="No such file"):
        read_deepspeed_config(tmp_path / "none.json")


def test_apex_in_half_precision_needs_zero() -> None:
    with pytest.raises(ValueError, match=r"optimizer=apex_fused_adam: .*Use adamw, or ZeRO 1 to 3"):
        settings({"zero_optimization": {"stage": 0}}, fp16=True, optimizer="apex_fused_adam")
    settings({"zero_optimization": {"stage": 0}}, optimizer="apex_fused_adam")
    settings({"zero_optimization": {"stage": 1}}, fp16=True, optimizer="apex_fused_adam")


def scales(options: LossScaleOptions, overflows: str) -> list[float]:
    """The scale after each step; x overflows."""
    scaler, made = DeepSpeedLossScaler(True, options), []
    for letter in overflows:
        scaler.update(overflow=letter == "x")
        made.append(scaler.scale)
    return made


def test_loss_scale() -> None:
    dynamic = LossScaleOptions(initial_scale_power=4, loss_scale_window=2)
    assert scales(dynamic, "x..x") == [8, 8, 16, 8]
    patient = LossScaleOptions(initial_scale_power=4, loss_scale_window=9, hysteresis=2)
    assert scales(patient, "x.xx") == [16, 16, 8, 4]
    forgiving = replace(patient, consecutive_hysteresis=True)
    assert scales(forgiving, "x.x.xx") == [16, 16, 16, 16, 16, 8]
    assert scales(LossScaleOptions(loss_scale=32.0), "x.x") == [32, 32, 32]
    least = LossScaleOptions(initial_scale_power=1, min_loss_scale=1.0)
    assert scales(least, "x") == [1]
    with pytest.raises(FloatingPointError, match="smallest loss scale, 1 "):
        scales(least, "xx")
    fixed = LossScaleOptions(loss_scale=32.0)
    assert scales(fixed, "x" * 49 + "." + "x" * 49) == [32] * 99
    with pytest.raises(FloatingPointError, match="50 steps in a row .* loss_scale=32 of deepsp"):
        scales(fixed, "x" * 50)


def test_loss_scale_continues() -> None:
    options = LossScaleOptions(initial_scale_power=4, loss_scale_window=3, hysteresis=2)
    whole, first, second = (DeepSpeedLossScaler(True, options) for _ in range(3))
    for step in "x..":
        whole.update(step == "x")
        first.update(step == "x")
    second.load_state_dict(first.state_dict())
    for step in ".xx":
        whole.update(step == "x")
        second.update(step == "x")
    assert second.state_dict() == whole.state_dict()
    assert second.scale == 16
