"""Options of other programs: what they are here, and that none of them is unknown."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine import TrainingConfig
from fusedacl.engine.config import spellings
from fusedacl.engine.config.fields import flatten, given, parse, write_yaml
from fusedacl.engine.config.spellings import SPELLINGS, TRAINING_ARGUMENTS
from transformers import TrainingArguments

PAGE = Path(__file__).parents[3] / "docs" / "training.md"
COMPLETE = {"task_name": "quickstart", "output_dir": "out"}
DEFAULTS = flatten(TrainingConfig.create(**COMPLETE))


def changed(**options: Any) -> dict[str, Any]:
    """The options that differ from the defaults."""
    made = flatten(TrainingConfig.create(**{**COMPLETE, **options}))
    return {name: value for name, value in made.items() if value != DEFAULTS[name]}


def test_the_table_has_every_option_of_transformers() -> None:
    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    assert set(TRAINING_ARGUMENTS) <= set(names)
    rows = []
    for name in sorted(names):
        assert (name in TRAINING_ARGUMENTS) != (name in DEFAULTS), name
        is_ours = name in DEFAULTS
        rows.append(f"| `{name}` | {'the same' if is_ours else TRAINING_ARGUMENTS[name].here} |")
    table = "\n".join(["| TrainingArguments | `fusedacl train` |", "| --- | --- |", *rows])
    assert table in PAGE.read_text(), f"copy this table into {PAGE.name}:\n{table}"


def test_other_programs_names_lead_to_ours() -> None:
    named = {name for spelling in SPELLINGS.values() for name in [spelling.name] if name}
    for spelling in SPELLINGS.values():
        for made in spelling.values.values():
            named |= {made} if isinstance(made, str) else set(made)
    assert named <= DEFAULTS.keys()
    assert not SPELLINGS.keys() & DEFAULTS.keys()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"optim": "adamw_torch"}, {}),
        ({"optim": "adamw_apex_fused"}, {"optimizer": "apex_fused_adam"}),
        ({"deepspeed": "zero2_bf16"}, {"deepspeed_config": "zero2_bf16"}),
        ({"train_sampling_strategy": "group_by_length"}, {"group_by_length": True}),
        ({"train_sampling_strategy": "random", "do_train": True, "local_rank": 3}, {}),
        ({"activation_checkpointing": "True"}, {"gradient_checkpointing": True}),
        ({"use_cpu": True}, {"device": "cpu"}),
        ({"no_cuda": "true", "device": "cpu"}, {"device": "cpu"}),
        ({"eval_strategy": "no", "save_strategy": "no"}, {"eval_steps": 0, "save_steps": 0}),
        # YAML reads a bare no as false.
        ({"eval_strategy": False, "save_strategy": False}, {"eval_steps": 0, "save_steps": 0}),
        ({"evaluation_strategy": "steps", "eval_steps": 5}, {"eval_steps": 5}),
        ({"save_strategy": "epoch"}, {}),
        ({"report_to": ["wandb", "mlflow"]}, {"report_to": "wandb,mlflow"}),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, {"lr_scheduler_kwargs": '{"num_cycles": 2}'}),
        ({"warmup_steps": 50}, {"warmup_steps": 50}),
        (
            {"num_warmup_steps": "50", "warmup_ratio": 0.2},
            {"warmup_steps": 50, "warmup_ratio": 0.2},
        ),
        ({"warmup_steps": 0.06}, {"warmup_ratio": 0.06}),
        ({"warmup_steps": 0}, {"warmup_ratio": 0.0}),
        ({"warmup_steps": 0, "warmup_ratio": 0.3}, {"warmup_ratio": 0.3}),
        ({"warmup_steps": 0.3, "warmup_ratio": "0.3"}, {"warmup_ratio": 0.3}),
    ],
)
def test_read_as(options: dict[str, Any], expected: dict[str, Any]) -> None:
    assert changed(**options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "adafactor"}, "optim=adafactor is not supported here: `optimizer`: AdamW"),
        ({"fsdp": "full_shard"}, "ZeRO 1 to 3 shard the same things"),
        ({"dataloader_num_workers": 4}, "dataloader_num_workers may be 0, or left out"),
        ({"hub_token": "hf_x"}, "set HF_TOKEN"),
        ({"deepspeed": "a.json", "deepspeed_config": "b.json"}, "given together and say different"),
        ({"use_cpu": True, "device": "cuda"}, "use_cpu=True and device=cuda"),
        ({"eval_strategy": "steps"}, "set eval_steps to a number of steps"),
        ({"eval_strategy": "epoch", "eval_steps": 5}, "eval_strategy=epoch and eval_steps=5"),
        ({"warmup_steps": 0.1, "warmup_ratio": 0.2}, "two shares of the steps: keep one"),
        ({"warmup_steps": "few"}, "warmup_steps: expected int, got 'few'"),
        ({"warmup_steps": -5}, "warmup_steps=-5 is out of range"),
        ({"optimz": "adamw"}, "Did you mean 'optim"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        changed(**options)
    assert message in str(error.value)


def test_the_command_line_takes_them_and_names_the_nearest() -> None:
    words = ["--optim", "adamw_torch", "--do_train", "--warmup_steps", "0.06"]
    assert given(TrainingConfig, words) == {
        "optim": "adamw_torch", "do_train": True, "warmup_steps": "0.06"
    }  # fmt: skip
    with pytest.raises(ValueError, match="Did you mean 'train_sampling_strategy'"):
        given(TrainingConfig, ["--train_sampling_stratgy", "random"])


def test_a_flag_wins_over_a_file_under_whatever_name(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    write_yaml(TrainingConfig.create(**COMPLETE, warmup_steps=50, eval_steps=7), file)

    def read(*words: str) -> dict[str, Any]:
        return flatten(parse(TrainingConfig, "train", "", [str(file), *words]))

    assert read()["warmup_steps"] == 50
    assert read("--deepspeed", "cpu_gloo")["deepspeed_config"] == "cpu_gloo"
    for word in ("--warmup_ratio", "--warmup_steps"):
        found = read(word, "0.3")
        assert (found["warmup_ratio"], found["warmup_steps"]) == (0.3, None)
    assert read("--eval_strategy", "epoch")["eval_steps"] is None
    assert read("--eval_strategy", "steps")["eval_steps"] == 7
    file.write_text("task_name: quickstart\noutput_dir: out\neval_strategy: steps\n")
    assert read("--eval_steps", "100")["eval_steps"] == 100


def test_what_is_meant_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    spellings._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="fusedacl"):
        for _ in range(2):
            changed(deepspeed="cpu_gloo", warmup_steps=0.06)
    assert caplog.messages == [
        "deepspeed is deepspeed_config here.", "warmup_steps=0.06 is warmup_ratio=0.06 here."
    ]  # fmt: skip
