"""A training step never waits for the GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fusedacl.engine import TrainingConfig
from fusedacl.engine.training.builder import build_run
from fusedacl.engine.training.logs.metrics_log import MetricsLog, read_records
from fusedacl.engine.training.trainer import Trainer
from tqdm import tqdm

DEVICE = torch.device("cuda")


@pytest.fixture
def refuse_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_the_mode_sees_a_wait(refuse_waiting: None) -> None:
    number = torch.ones((), device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        number.item()


@pytest.mark.parametrize("precision", [{}, {"fp16": True}])
@pytest.mark.parametrize("strategy", ["single", "joint"])
def test_the_steps_of_a_run(
    refuse_waiting: None,
    tiny_bert: Path,
    tiny_data: Path,
    tmp_path: Path,
    strategy: str,
    precision: dict[str, bool],
) -> None:
    """From the batch to the log record; the values are read when they have arrived."""
    config = TrainingConfig.create(
        task_name="opinions", data_dir=str(tiny_data), model_name_or_path=str(tiny_bert),
        max_seq_length=16, per_device_train_batch_size=16, max_steps=8, logging_steps=1,
        strategy=strategy, disable_tqdm=True, device="cuda", output_dir=str(tmp_path), **precision,
    )  # fmt: skip
    trainer = Trainer(build_run(config))
    with MetricsLog(tmp_path) as log, tqdm(disable=True) as bar:
        steps = trainer.steps(log, bar)
        for _ in range(2):
            next(steps)
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(6):
            next(steps)
        torch.cuda.set_sync_debug_mode("default")
        assert next(steps, "done") == "done"
    trainer.parts.lock.release()
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [*range(1, 9)]
