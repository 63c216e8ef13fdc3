"""The performance page says what the result files say, slower things included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusedacl.benchmarks.measure import environment, quantiles
from fusedacl.benchmarks.report import page


def write_step(directory: Path, **medians_ms: float) -> None:
    times: dict[str, Any] = {
        name: quantiles([value / 1e3 * factor for factor in (0.9, 1.0, 1.1)])
        for name, value in medians_ms.items()
    }
    result = {
        "environment": environment(),
        "shape": {"batch": 32, "tokens": 48, "model": "MiniLM"},
        "times": times,
    }
    directory.mkdir(exist_ok=True)
    (directory / "step.json").write_text(json.dumps(result))


def test_ratios_on_both_sides_of_one(tmp_path: Path) -> None:
    directory = tmp_path / "some-machine"
    write_step(
        directory,
        fusedacl_ce=200,
        hugging_face_ce=190,
        fusedacl_scl=210,
        fusedacl_acl_ungated=220,
        fusedacl_acl=330,
    )
    text = page([directory])
    assert "## Machine `some-machine`" in text
    assert "| fusedacl, CE | 200.0 (188.0 to 212.0) | - |" in text
    assert "| Hugging Face Trainer, CE, the same model | 190.0 (178.6 to 201.4) | 0.95 |" in text
    assert "| 1.65 |" in text
    assert "contrastive loss, forward" not in text


def test_several_exits(tmp_path: Path) -> None:
    def times(**medians_ms: float) -> dict[str, Any]:
        return {name: quantiles([value / 1e3]) for name, value in medians_ms.items()}

    result = {
        "environment": environment(),
        "shape": {"model": "MiniLM", "texts": "MRPC", "batch": 32},
        "second_stage": {
            "mha_acl": {
                "options": {"exit_head": "mha", "objective": "acl", "bf16": True},
                "exits": 5,
                "mean_tokens": 53.2,
                "times": times(together=400, apart=1800, cached=80),
                "total_faster_than_apart": 4.46,
                "total_cached_faster": 5.12,
            }
        },
        "early_exit": [
            {
                "exit_head": "linear",
                "batch": batch,
                "batches": 16 // batch,
                "times": times(full=100, early_exit=100 + batch),
            }
            for batch in (1, 16)
        ],
        "losses": [
            {
                "shape": {"exits": 11, "samples": 32, "labels": 77, "width": 64},
                "times": times(fusedacl=2, dense=5),
            }
        ],
    }
    (tmp_path / "exits.json").write_text(json.dumps(result))
    text = page([tmp_path])
    assert "mha exits, ACL-CL with the gate, bfloat16, 53 tokens on average." in text
    assert "together is 4.46 times as fast as one at a time, and the cache 5.12 times" in text
    assert "| 5 exits, one at a time | 1800.0 (1800.0 to 1800.0) | 4.50 |" in text
    assert "| 5 exits together, from the feature cache | 80.0 (80.0 to 80.0) | 0.20 |" in text
    assert "linear exits, 16 texts one by one:" in text
    assert "| early exit that nothing leaves | 101.0 (101.0 to 101.0) | 1.01 |" in text
    assert "linear exits, a batch of 16:" in text
    assert "| early exit that nothing leaves | 116.0 (116.0 to 116.0) | 1.16 |" in text
    assert "E = 11, N = 32, K = 77, d = 64:" in text
    assert "| a dense loss an exit, eager PyTorch | 5.00 (5.00 to 5.00) | 2.50 |" in text
