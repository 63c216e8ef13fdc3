"""Training and early exit on the GPU, compared with the CPU."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine import MultiExitForSequenceClassification
from fusedacl.engine.cli.main import main
from fusedacl.engine.data.batching import encode
from fusedacl.engine.data.columns import TextSplit
from fusedacl.engine.model.early_exit import early_exit
from fusedacl.engine.model.saved import load_tokenizer
from tiny_runs import options_of, records, run

DEVICE = "cuda"
OPTIONS: dict[str, Any] = {
    "learning_rate": 1e-3, "dropout": 0.0, "save_steps": 0, "exit_layers": "1,3,4",
    "num_train_epochs": 2, "logging_steps": 1,
}  # fmt: skip


def losses(directory: Path) -> list[float]:
    return [record["loss"] for record in records(directory, "train")]


@pytest.mark.parametrize("strategy", ["single", "joint", "alternating", "two_stage"])
def test_the_first_losses_are_those_of_the_cpu(
    deep_bert: Path, tiny_data: Path, tmp_path: Path, strategy: str
) -> None:
    """Later losses may differ: AdamW turns rounding of gradients near zero into whole steps."""
    found = []
    for number, device in enumerate(("cpu", DEVICE)):
        directory = tmp_path / str(number)
        options = options_of(deep_bert, tiny_data, directory, **OPTIONS)
        if strategy == "single":
            options.pop("exit_layers")
        run(options, strategy=strategy, device=device)
        found.append(losses(directory))
    on_cpu, on_gpu = found
    assert len(on_cpu) == len(on_gpu)
    assert on_gpu[:2] == pytest.approx(on_cpu[:2], rel=1e-3)
    assert all(map(math.isfinite, on_gpu))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_second_stage_from_cached_features(
    deep_bert: Path, tiny_data: Path, tmp_path: Path, precision: str
) -> None:
    options = options_of(deep_bert, tiny_data, tmp_path / "plain", **OPTIONS)
    options |= {"strategy": "two_stage", "device": DEVICE}
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")
    options |= {} if precision == "fp32" else {precision: True}
    first = run(options)
    changes = {"output_dir": str(tmp_path / "cached"), "feature_cache": str(tmp_path / "cache")}
    cached = run(options, **changes)
    assert first["num_steps"] == cached["num_steps"]
    # The cache keeps states in float16.
    plain, from_cache = losses(tmp_path / "plain"), losses(tmp_path / "cached")
    second_stage = len(plain) // 2
    assert from_cache[second_stage] == pytest.approx(plain[second_stage], rel=2e-2)


@pytest.fixture(scope="module")
def trained(deep_bert: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch finds no CUDA device")
    directory = tmp_path_factory.mktemp("trained")
    run(options_of(deep_bert, tiny_data, directory, **OPTIONS), strategy="joint", device=DEVICE)
    return directory


@pytest.mark.parametrize(
    ("policy", "parameters"),
    [("max_probability", {"threshold": 0.55}), ("entropy", {"threshold": 0.6}),
     ("patience", {"patience": 2}), ("voting", {"votes": 2}), ("fixed_layer", {"layer": 3})],
)  # fmt: skip
def test_early_exit_answers_do_not_depend_on_the_batch(
    trained: Path, tiny_data: Path, policy: str, parameters: dict[str, Any]
) -> None:
    model = MultiExitForSequenceClassification.from_pretrained(trained).eval()
    rows = (tiny_data / "opinions" / "validation.jsonl").read_text().splitlines()
    texts = TextSplit([json.loads(row)["sentence"] for row in rows])
    encoded = encode(texts, load_tokenizer(str(trained)), 16)
    answers = []
    for device, size in itertools.product(("cpu", DEVICE), (1, 7, len(rows))):
        found = early_exit(model.to(device), encoded, policy, batch_size=size, **parameters)
        answers.append((found.predictions.cpu(), found.exit_layers.cpu()))
    for found in answers[1:]:
        assert all(map(torch.equal, found, answers[0]))


def test_policies_are_timed_on_the_gpu(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    status = main(
        [
            "exits", "--model_name_or_path", str(trained), "--task_name", "opinions",
            "--data_dir", str(tiny_data), "--device", DEVICE, "--policies", "max_probability",
            "--measure", "--measured_samples", "8", "--output_dir", str(tmp_path / "exits"),
            "--disable_tqdm",
        ]
    )  # fmt: skip
    assert status == 0
    found = json.loads((tmp_path / "exits" / "exits.json").read_text())
    timed = found["policies"]["max_probability"]["timed"]
    assert timed
    for setting in timed:
        assert {speed["batch_size"] for speed in setting["measured"]} == {1, 32}
