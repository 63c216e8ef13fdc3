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
