"""The compiled losses at larger sizes; the tests in tests/kernels use the GPU as well."""

import itertools

import pytest
import torch
from contrastive_cases import Inputs, check_error, loss_function, make_inputs, run
from fusedacl.kernels.contrastive import dispatch
from fusedacl.kernels.contrastive.dispatch import Workload

DEVICE = torch.device("cuda")


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
        options = {"impl": impl, "denominator": denominator}
        found = check_error(inputs, labels, upstream, **options)
        # Twice the same bits.
        assert all(map(torch.equal, found, run(inputs, labels, upstream, **options)))


@pytest.mark.parametrize("num_rows", [127, 128, 129, 255, 256])
def test_the_small_kernel_at_its_largest(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    for dtype, width in itertools.product((torch.float16, torch.float32), (64, 768, 1024)):
        inputs = make_inputs(num_rows - 3, 3, width=width, dtype=dtype, device="cuda")
        impl = force(monkeypatch, "supcon_small", inputs)
        labels = torch.arange(num_rows - 3, device=DEVICE) % 3
        check_error(inputs, labels, torch.tensor(256.0, device=DEVICE), impl=impl)


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
