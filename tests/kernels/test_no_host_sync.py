"""No value is read on the host: CUDA's synchronization debug mode, imitated on the CPU.

Every way by which PyTorch hands a tensor's value to Python ends in one of a few operators. They are
refused here while losses and gradient functions run as they would on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from contrastive_cases import DEVICE, Inputs, make_inputs, run
from fusedacl.benchmarks.measuring.counting import is_host_read
from fusedacl.kernels import angle_degrees, combined_squared_norm, gated_combine_, grad_dot_norm
from fusedacl.kernels.contrastive import batch, dispatch
from fusedacl.kernels.contrastive.tiled import cpu_loop
from fusedacl.kernels.contrastive.tiled import loss as tiled
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

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

    It looks for labels out of range where a look costs nothing; `test_classes_are_not_read` shows
    that it does not look on another device.
    """

    original = batch.compute_classes

    def compute_classes(*arguments: Any) -> tuple[Tensor, bool]:
        with _disable_current_modes():
            classes, _ = original(*arguments)
        # The answer of a device on which the labels are not checked.
        return classes, True

    with Refuse(), monkeypatch.context() as patch:
        patch.setattr(batch, "compute_classes", compute_classes)
        # On the CPU it reads memory without an operator.
        patch.setattr(Tensor, "tolist", lambda tensor: tensor.flatten()[0].item())
        yield


def test_reads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3, device=DEVICE)
    reads: list[Callable[[], object]] = [
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: float(x[0]),
        lambda: x.tolist(),
        lambda: x[x > 0],
        lambda: x.masked_fill_(x > 0, 0).index_put_((x > 0,), x),
        lambda: x.nonzero(),
        lambda: torch.equal(x, x),
        lambda: torch.unique(x),
    ]
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
@pytest.mark.parametrize("implementation", ["reference", "tiled", "supcon_small", "supcon_fused"])
def test_losses(monkeypatch: pytest.MonkeyPatch, implementation: str, kind: str) -> None:
    impl = "triton" if implementation.startswith("supcon") else implementation
    small_rows = 256 if implementation == "supcon_small" else 0
    monkeypatch.setattr(dispatch, "SMALL_ROWS", small_rows)
    inputs: Inputs = make_inputs(9, width=5, dtype=torch.float32, device=DEVICE, **KINDS[kind])
    labels = torch.arange(9, device=DEVICE) % 3
    for reduction, denominator in (("mean", "all"), ("none", "negatives"), ("sum", "others")):
        options = {"impl": impl, "reduction": reduction, "denominator": denominator}
        with no_reads(monkeypatch):
            run(inputs, labels, None, **options)


@pytest.mark.parametrize("tile", [4, 512])
def test_tiles(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """Several tiles with Triton kernels between their products, and one tile without."""
    monkeypatch.setattr(cpu_loop, "MAX_ROWS", 0)
    monkeypatch.setattr(tiled, "TILE", tile)
    monkeypatch.setattr(tiled, "GPU_TILE", tile)
    monkeypatch.setattr(tiled, "ONE_TILE", tile * tile)
    monkeypatch.setattr(tiled, "FEW_ROWS", 0)
    monkeypatch.setattr(tiled, "has_epilogue", lambda tensor: True)
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
