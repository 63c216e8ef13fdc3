"""The profile of a run of two processes: the first one's, with what they exchange."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from rank_pool import Ranks
from training_cases import trained


def test_the_first_process_profiles_its_exchanges(
    two_ranks: Ranks, tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    zero = tmp_path / "ds.json"
    # Stage 2 exchanges gradients in the backward passes.
    zero.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    options = {
        "task_name": "opinions", "data_dir": str(tiny_data), "model_name_or_path": str(tiny_bert),
        "max_seq_length": 16, "per_device_train_batch_size": 8, "max_steps": 5, "dropout": 0.0,
        "logging_steps": 1, "save_steps": 0, "device": "cpu", "disable_tqdm": True,
        "negatives": "global", "deepspeed_config": str(zero),
    }  # fmt: skip
    profiled, plain = tmp_path / "profiled", tmp_path / "plain"
    two_ranks.run(trained, {**options, "output_dir": str(profiled), "profile": 2})
    two_ranks.run(trained, {**options, "output_dir": str(plain)})
    profile = json.loads((profiled / "profile.json").read_text())
    assert profile["num_steps"] == 2
    shares = profile["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert {name for name, share in shares.items() if share > 0} == set(shares)
    weights = [(run / "model.safetensors").read_bytes() for run in (profiled, plain)]
    assert weights[0] == weights[1]
