"""The DeepSpeed files that come with the package fit the options that they are meant for."""

from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine import TrainingConfig
from fusedacl.engine.backends.deepspeed.settings import SHIPPED as PRESETS
from fusedacl.engine.backends.deepspeed.settings import complete, read_deepspeed_config

SHIPPED = sorted(PRESETS.glob("*.json"))
OPTIONS: dict[str, dict[str, Any]] = {
    "cpu_gloo": {},
    "v100_16gb_fp16": {"fp16": True},
    "zero2_bf16": {"bf16": True},
    "zero3_offload": {"bf16": True},
}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_is_completed_from_its_options(file: Path) -> None:
    options = TrainingConfig.create(
        task_name="quickstart", output_dir="x", per_device_train_batch_size=4,
        gradient_accumulation_steps=3, **OPTIONS[file.stem],
    )  # fmt: skip
    made = complete(read_deepspeed_config(file), options, world_size=2, num_trained=1000)
    assert made.config["train_batch_size"] == 24
    assert made.config.get("fp16", {}).get("enabled", False) is options.optimization.fp16
    assert made.config.get("bf16", {}).get("enabled", False) is options.optimization.bf16
    assert made.stage == {"zero2_bf16": 2, "zero3_offload": 3}.get(file.stem, 1)
    assert made.offloads == (file.stem == "zero3_offload")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_is_found_by_its_name(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed_config(file.stem) == read_deepspeed_config(file)
    # A file of the user's comes first.
    Path(file.stem).write_text('{"steps_per_print": 7}')
    assert read_deepspeed_config(file.stem) == {"steps_per_print": 7}


def test_a_file_for_another_precision_is_refused() -> None:
    options = TrainingConfig.create(task_name="quickstart", output_dir="x")
    file = next(file for file in SHIPPED if file.stem == "zero2_bf16")
    with pytest.raises(ValueError, match="bf16"):
        complete(read_deepspeed_config(file), options, world_size=2, num_trained=1000)
