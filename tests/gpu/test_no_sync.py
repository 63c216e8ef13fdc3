"""A training step never waits for the GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fusedacl.engine import GradientGate, TrainingConfig
from fusedacl.engine.training.builder import build_run
from fusedacl.engine.training.metrics_log import MetricsLog, read_records
from fusedacl.engine.training.trainer import Trainer
from fusedacl.kernels import acl_loss
from torch import Tensor, nn
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


@pytest.mark.parametrize("num_samples", [32, 700])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("groups", [None, [0, 0, 1, 1]])
def test_a_step(
    refuse_waiting: None, dtype: torch.dtype, num_samples: int, groups: list[int] | None
) -> None:
    """Both losses, two backward passes, the gate with loss scale and clipping, the optimizer."""
    body = nn.Linear(24, 48, device=DEVICE)
    head = nn.Linear(48, 3, device=DEVICE)
    parameters = [*body.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    gate = GradientGate(parameters, weight=0.02, groups=groups)
    scale = torch.tensor(128.0, device=DEVICE)
    inputs = torch.randn(num_samples, 24, device=DEVICE)
    labels = torch.randint(3, (num_samples,), device=DEVICE)

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            hidden = torch.tanh(body(inputs))
            main = nn.functional.cross_entropy(head(hidden).float(), labels)
            auxiliary = acl_loss(hidden, labels, head.weight)
        gate.accumulate(main * scale, auxiliary * scale)
        decision = gate.combine(loss_scale=scale, max_norm=1.0)
        optimizer.step()
        return [main.detach(), auxiliary.detach(), decision.angle, decision.grad_norm]

    # The first step compiles kernels and fills tables, and may wait.
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    seen = [step() for _ in range(3)]
    torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite().all() for values in seen for value in values)


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
    with MetricsLog(tmp_path, "none") as log, tqdm(disable=True) as bar:
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
