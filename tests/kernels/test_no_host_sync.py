"""No value is read on the host: CUDA's synchronization debug mode, imitated on the CPU.

Every way by which PyTorch hands the value of a tensor to Python ends in one of a few operators.
They are refused here while losses, gradient functions and whole training steps run as they would
on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from contrastive_cases import DEVICE, make_inputs, run, set_tile, use_implementation
from fusedacl.benchmarks.measuring.counting import is_host_read
from fusedacl.engine import TrainingConfig
from fusedacl.engine.backends import loss_scaling
from fusedacl.engine.training import transfers
from fusedacl.engine.training.builder import build_run
from fusedacl.engine.training.logs.metrics_log import MetricsLog
from fusedacl.engine.training.trainer import Trainer
from fusedacl.kernels import angle_degrees, combined_squared_norm, gated_combine_, grad_dot_norm
from fusedacl.kernels.contrastive import batch
from tiny_runs import records
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from tqdm import tqdm
from wider_cases import make_problem, results

pytest.importorskip("triton", reason="triton is not installed")


class Refuse(TorchDispatchMode):
    """Raise an error where a value is read."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if is_host_read(name.removeprefix("aten::"), args):
            raise AssertionError(f"{name} reads a value on the host")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse reads, except those that `compute_classes` makes intentionally on the CPU only.

    It checks for labels out of range there, because the check costs nothing;
    `test_classes_are_not_read` shows that it makes none on another device.
    """

    original = batch.compute_classes

    def compute_classes(*arguments: Any) -> tuple[Tensor, bool]:
        with _disable_current_modes():
            classes, _ = original(*arguments)
        # The answer of a device on which the labels are not checked.
        return classes, True

    with Refuse(), monkeypatch.context() as patch:
        patch.setattr(batch, "compute_classes", compute_classes)
        # On the CPU these read memory without an operator.
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(Tensor, name, lambda tensor: tensor.flatten()[0].item())
        yield


def test_reads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3, device=DEVICE)
    # `is_host_read` knows more, by tests/benchmarks/counts.
    reads: list[Callable[[], object]] = [
        lambda: float(x[0]), lambda: x.tolist(), lambda: x.numpy(), lambda: x.cpu(),
        lambda: x.masked_fill_(x > 0, 0).index_put_((x > 0,), x),
    ]  # fmt: skip
    for read in reads:
        with pytest.raises(AssertionError, match="reads a value"), no_reads(monkeypatch):
            read()


@pytest.mark.parametrize("num_labels", [None, 3])
def test_classes_are_not_read(num_labels: int | None) -> None:
    """A tensor on the device "meta" has no values: reading one raises."""
    labels = torch.zeros(5, dtype=torch.int64, device="meta")
    classes, may_ignore = batch.compute_classes(labels, num_labels, -100, 2)
    assert classes.shape == (2 * (5 + (num_labels or 0)),)
    assert may_ignore


KINDS: dict[str, dict[str, Any]] = {
    "samples": {"num_labels": None},
    "labels, exits": {"num_labels": 3, "exits": 2},
    "teacher": {"num_labels": 3, "teacher": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["reference", "tiled", "small", "fused"])
def test_losses(monkeypatch: pytest.MonkeyPatch, implementation: str, kind: str) -> None:
    impl = use_implementation(monkeypatch, implementation)
    inputs = make_inputs(9, width=5, dtype=torch.float32, device=DEVICE, **KINDS[kind])
    labels = torch.arange(9, device=DEVICE) % 3
    for reduction, denominator in (("mean", "all"), ("none", "negatives"), ("sum", "others")):
        options = {"impl": impl, "reduction": reduction, "denominator": denominator}
        with no_reads(monkeypatch):
            run(inputs, labels, None, **options)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_wider_losses(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    """On the device "meta", where every read of a value raises, and autocast is not known."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    for labels, temperature, kind in (
        ("several", "scalar", {"memory": 4, "class_weights": True, "mask": True}),
        ("ignored", "by sample", {"teacher": True, "memory": 4}),
        ("soft", None, {"exits": 2}),
        ("integers", "by label", {"label_embeddings": False}),
    ):
        for denominator in ("all", "others", "negatives"):
            problem = make_problem(9, labels, temperature, **kind, denominator=denominator)
            moved = {
                name: value.to("meta") if isinstance(value, Tensor) else value
                for name, value in problem.items()
            }
            found = results(moved, impl)
            assert found["embeddings"].shape == problem["embeddings"].shape


@pytest.mark.parametrize("tile", [4, 512])
def test_tiles(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """Several tiles with Triton kernels between their products, and one tile without."""
    set_tile(monkeypatch, tile, with_epilogue=tile == 4)
    inputs = make_inputs(9, 3, dtype=torch.float16, device=DEVICE)
    with no_reads(monkeypatch):
        run(inputs, torch.arange(9, device=DEVICE) % 3, None, impl="tiled")


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("groups", [None, [0, 2, 0]])
def test_gradients(monkeypatch: pytest.MonkeyPatch, impl: str, groups: list[int] | None) -> None:
    """Sums, decision, combination, loss-scale removal, clipping, and the logged values."""
    from fusedacl.kernels.gradients import gpu

    a, b = ([torch.randn(shape, device=DEVICE) for shape in ((3, 4), 7, 2)] for _ in range(2))
    some = [b[0].t().contiguous().t(), b[1], None]
    scale = torch.tensor(0.5, device=DEVICE)
    # The largest angle as a cosine is a constant, computed once on the host.
    gpu.lowest_cosine_bits(90.0)
    with no_reads(monkeypatch):
        for max_norm, clip_groups in ((None, False), (1.0, False), (1.0, True)):
            stats = grad_dot_norm(a, some, groups=groups, impl=impl)
            used = gated_combine_(
                a, some, stats, weight=0.3, scale=scale, max_norm=max_norm,
                clip_groups=clip_groups, groups=groups, impl=impl,
            )  # fmt: skip
            angle_degrees(stats)
            combined_squared_norm(stats, used)


STEPS: dict[str, dict[str, Any]] = {
    "ce": {"objective": "ce"},
    "scl": {"objective": "scl", "max_grad_norm": 0},
    "acl": {},
    "acl, triton": {"impl": "triton", "max_steps": 2},
    "acl, fp16": {"fp16": True},
    "ce, fp16": {"objective": "ce", "fp16": True},
    "acl, bf16, micro-batches": {"bf16": True, "gradient_accumulation_steps": 2},
    "several exits": {"strategy": "joint"},
    "alternating exits, fp16": {"strategy": "alternating", "fp16": True},
    "two stages": {"strategy": "two_stage", "max_steps": 2},
    "two stages from a feature cache": {"strategy": "two_stage", "max_steps": 2, "cache": True},
    "large batch": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "contrastive_batch_size": 16,
        "bf16": True,
    },
    "top:1": {"gate_scope": "top:1", "gate_agreement_steps": 2},
    "head, fp16": {"gate_scope": "head", "gate_agreement_steps": 2, "fp16": True},
}


@pytest.mark.parametrize("case", STEPS)
def test_training_steps(
    monkeypatch: pytest.MonkeyPatch, tiny_options: dict[str, Any], tmp_path: Path, case: str
) -> None:
    """Values are read after the steps only, and are then those of a run that reads at once.

    One step in three is logged. Under float16 the first steps overflow.
    """
    options = tiny_options | {"max_steps": 6, "num_train_epochs": 2, "logging_steps": 3}
    options |= {"per_device_train_batch_size": 16, "impl": "reference", "device": "cpu"}
    options |= STEPS[case]
    if options.pop("cache", False):
        options["feature_cache"] = str(tmp_path / "cache")
    monkeypatch.setattr(loss_scaling, "INITIAL_SCALE", 2.0**21)

    def steps(name: str, refused: bool) -> tuple[list[Any], Trainer]:
        directory = tmp_path / name
        config = TrainingConfig.create(**options | {"output_dir": str(directory)})
        trainer = Trainer(build_run(config))
        with MetricsLog(directory) as log, tqdm(disable=True) as bar:
            taken = trainer.steps(log, bar)
            for _ in range(trainer.plan.num_steps):
                # Between stages values are read, and an exit's features may be written.
                between = trainer.step == trainer.plan.ends[trainer.stage_index]
                with no_reads(monkeypatch) if refused and not between else nullcontext():
                    next(taken)
            if refused and len(trainer.plan.stages) == 1:
                assert (directory / "metrics.jsonl").read_text() == ""
            assert next(taken, "done") == "done"
        trainer.parts.lock.release()
        return records(directory), trainer

    expected, at_once = steps("at once", refused=False)
    monkeypatch.setattr(transfers._Parcel, "has_arrived", lambda parcel: False)
    found, pending = steps("pending", refused=True)
    assert found == expected != []
    assert pending.history.state_dict() == at_once.history.state_dict()
    parameters = zip(pending.model.parameters(), at_once.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in parameters)
    if options.get("fp16"):
        assert 0 < pending.backend.optimizer.num_taken < 6, "some steps are skipped"
