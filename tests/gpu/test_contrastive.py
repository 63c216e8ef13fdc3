"""The compiled losses against float64: the grid of the interpreter's tests, and larger sizes."""

import itertools
from typing import Any

import pytest
import torch
from contrastive_cases import (
    DENOMINATORS,
    LABELS,
    REDUCTIONS,
    Inputs,
    check_error,
    loss_function,
    make_inputs,
    run,
)
from fusedacl.kernels.contrastive import dispatch
from fusedacl.kernels.contrastive.dispatch import Workload

DEVICE = torch.device("cuda")
IMPLEMENTATIONS = ("supcon_small", "supcon_fused", "tiled")
KINDS: dict[str, dict[str, Any]] = {
    "samples": {"num_labels": None},
    "labels": {"num_labels": 5},
    "exits": {"num_labels": 3, "exits": 11},
    "teacher": {"num_labels": 3, "teacher": True, "exits": 2},
    "more labels than samples": {"num_labels": 40},
}


def force(monkeypatch: pytest.MonkeyPatch, implementation: str, inputs: Inputs) -> str:
    """Make the dispatcher choose an implementation; return the `impl` to pass, or skip the test."""
    monkeypatch.setattr(dispatch, "SMALL_ROWS", 256 if implementation == "supcon_small" else 0)
    embeddings = inputs["embeddings"]
    num_rows = sum(tensor.shape[-2] for tensor in inputs.values())
    reason = dispatch.obstacle(
        implementation,
        Workload(DEVICE, embeddings.dtype, num_rows=num_rows, width=embeddings.shape[-1]),
    )
    if reason is not None:
        pytest.skip(reason)
    return "tiled" if implementation == "tiled" else "triton"


def skip_without_bfloat16(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bfloat16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_grid(
    monkeypatch: pytest.MonkeyPatch, implementation: str, kind: str, dtype: torch.dtype
) -> None:
    skip_without_bfloat16(dtype)
    for num_samples, width in ((1, 3), (2, 64), (17, 16), (33, 70), (61, 20), (64, 768)):
        inputs = make_inputs(num_samples, width=width, dtype=dtype, device="cuda", **KINDS[kind])
        impl = force(monkeypatch, implementation, inputs)
        labels = torch.randint(KINDS[kind]["num_labels"] or 4, (num_samples,), device=DEVICE)
        for denominator, reduction in itertools.product(DENOMINATORS, REDUCTIONS):
            options = {"denominator": denominator, "reduction": reduction}
            check_error(inputs, labels, impl=impl, temperature=0.5, **options)
        check_error(inputs, labels, impl=impl, temperature=0.05)


@pytest.mark.parametrize("layout", LABELS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_label_layouts(monkeypatch: pytest.MonkeyPatch, implementation: str, layout: str) -> None:
    for num_samples, denominator in itertools.product((1, 2, 49, 130), DENOMINATORS):
        inputs = make_inputs(num_samples, 4, width=33, dtype=torch.float32, device="cuda")
        impl = force(monkeypatch, implementation, inputs)
        labels = LABELS[layout](num_samples, 4).to(DEVICE)
        inputs["embeddings"][labels == -100] = torch.nan
        inputs["embeddings"][0] = 0
        check_error(inputs, labels, impl=impl, denominator=denominator)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strided_inputs(monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    """Transposed, every other row, one row repeated: the same bits as from a contiguous copy."""
    inputs = make_inputs(60, 5, width=24, dtype=torch.float16, device="cuda")
    impl = force(monkeypatch, implementation, inputs)
    labels = torch.arange(60, device=DEVICE) % 5
    samples, label_embeddings = inputs["embeddings"], inputs["label_embeddings"]
    for strided in (
        samples.t().contiguous().t(),
        samples.repeat_interleave(2, 0)[::2],
        samples[:1].expand(60, 24),
    ):
        results = []
        for embeddings in (strided.detach(), strided.contiguous()):
            embeddings.requires_grad_()
            loss = loss_function(inputs)(embeddings, labels, label_embeddings, impl=impl)
            results.append((loss, *torch.autograd.grad(loss, embeddings)))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("width", [64, 128, 256, 768])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("implementation", ["supcon_fused", "tiled"])
def test_4096_rows(
    monkeypatch: pytest.MonkeyPatch, implementation: str, dtype: torch.dtype, width: int
) -> None:
    """A multiple of the block size, and some rows more or fewer."""
    skip_without_bfloat16(dtype)
    for num_samples, num_labels, denominator in (
        (4096, None, "others"), (4090, 5, "all"), (4097, 16, "negatives"),
    ):  # fmt: skip
        inputs = make_inputs(num_samples, num_labels, width=width, dtype=dtype, device="cuda")
        impl = force(monkeypatch, implementation, inputs)
        labels = torch.randint(num_labels or 16, (num_samples,), device=DEVICE)
        # A loss scale, without which gradients of the mean underflow in float16.
        upstream = torch.tensor(4096.0, device=DEVICE)
        check_error(inputs, labels, upstream, impl=impl, denominator=denominator)


@pytest.mark.parametrize("num_rows", [127, 128, 129, 255, 256])
def test_the_small_kernel_at_its_largest(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    for dtype, width in itertools.product((torch.float16, torch.float32), (64, 768, 1024)):
        inputs = make_inputs(num_rows - 3, 3, width=width, dtype=dtype, device="cuda")
        impl = force(monkeypatch, "supcon_small", inputs)
        labels = torch.arange(num_rows - 3, device=DEVICE) % 3
        check_error(inputs, labels, torch.tensor(256.0, device=DEVICE), impl=impl)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_twice_the_same_bits(monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    num_samples = 100 if implementation == "supcon_small" else 5000
    inputs = make_inputs(num_samples, 5, width=64, dtype=torch.float16, device="cuda")
    impl = force(monkeypatch, implementation, inputs)
    labels = torch.randint(5, (num_samples,), device=DEVICE)
    first, second = (run(inputs, labels, None, impl=impl) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("implementation", ["supcon_fused", "tiled"])
def test_memory_grows_with_the_rows_only(
    monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    """Memory of forward and backward beyond the inputs, for 65536 rows of width 64."""
    # A dense half-precision matrix would take 8.6 GB. "tiled" holds one tile (34 MB) and the rows
    # in float32.
    most = {"supcon_fused": 100e6, "tiled": 200e6}[implementation]
    inputs = make_inputs(65536, width=64, dtype=torch.float16, device="cuda")
    impl = force(monkeypatch, implementation, inputs)
    embeddings = inputs["embeddings"].requires_grad_()
    labels = torch.randint(16, (65536,), device=DEVICE)

    def forward_backward() -> None:
        loss = loss_function(inputs)(embeddings, labels, impl=impl)
        torch.autograd.grad(loss, embeddings)

    forward_backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward_backward()
    assert torch.cuda.max_memory_allocated() - before < most
