"""The scripts of docs/examples that stand for other people's loops run."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
SHORT = ["--max_steps", "4", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
SCRIPTS = {
    "trainer": [*SHORT, "--output_dir", "out", "--logging_steps", "1", "--objective", "scl"],
    "sentence_embeddings": [*SHORT, "--output_dir", "out"],
    "metric_learning": [],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs(
    name: str,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = [] if name == "metric_learning" else ["--model_name_or_path", str(tiny_bert)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *SCRIPTS[name], *model])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    if name == "trainer":
        assert "eval_loss" in printed
    elif name == "metric_learning":
        ours, theirs = (line.split(": ")[1] for line in printed.splitlines())
        assert ours == theirs
