"""Time and memory of the contrastive loss, forward + backward in float32 on the CPU.

    python -m fusedacl.benchmarks.loss [--quick]

Beside it: the dense formula in eager PyTorch and pytorch-metric-learning's SupConLoss, and the
floor that the machine sets, from the rates of matrix product and exponential measured in the same
rounds. Every contestant's loss and gradient are checked against float64 before it is timed.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..kernels import acl_loss, supcon_loss
from .baselines import dense_acl, dense_supcon, metric_learning_supcon
from .measure import Result, command_line, extra_memory, interleave, ratio, write

NUM_CLASSES = 16
TEMPERATURE = 0.5
# Rows of the blocks with which the machine's rates are measured.
BLOCK = 512
# Calls in a row per sample of a rate.
RATE_CALLS = 20
# Relative to float64; a float32 implementation of either formula is within a few 1e-7.
MAX_ERROR = 1e-5

Loss = Callable[..., Tensor]


def main() -> None:
    arguments = command_line(__doc__)
    rows, rounds, memory_rows = (1024, 3, 2048) if arguments.quick else (4096, 15, 8192)
    result = {
        "large": [large_batch(rows, width, rounds) for width in (64, 768)],
        "small": small_batch(32, 2, 64, rounds=20 if arguments.quick else 100),
        "memory": memory(memory_rows, 64),
    }
    if not arguments.quick:
        write(result, arguments.output_dir / "loss.json")


def large_batch(num_rows: int, width: int, rounds: int) -> Result:
    """One [M, d] batch of 16 classes with denominator "others", which all contestants share."""
    embeddings, labels = batch(num_rows, width)
    losses: dict[str, Loss] = {
        "fusedacl": fusedacl_supcon,
        "dense": dense_supcon,
        "metric_learning": metric_learning_supcon(TEMPERATURE),
    }
    check(losses, embeddings, labels)
    times = interleave(
        {name: partial(forward_backward, loss, embeddings, labels) for name, loss in losses.items()}
        | machine_rates(width),
        rounds=rounds,
    )
    # Per unordered pair of rows: two products and two exponentials (forward, and again backward),
    # two gradient updates. A product of blocks is BLOCK^2 pairs.
    pairs = num_rows * num_rows / 2
    gemm, exp = (times[name]["p50_ms"] / (RATE_CALLS * BLOCK**2) for name in ("gemm", "exp"))
    floor = pairs * (4 * gemm + 2 * exp)
    result = {
        "shape": {"rows": num_rows, "width": width, "classes": NUM_CLASSES},
        "times": times,
        "gemm_gflops": 2 * width / gemm * 1e-6,
        "exp_giga_per_second": 1e-6 / exp,
        "floor_ms": floor,
        "over_floor": times["fusedacl"]["p50_ms"] / floor,
        "faster_than_dense": ratio(times, "dense", "fusedacl"),
        "faster_than_metric_learning": ratio(times, "metric_learning", "fusedacl"),
    }
    print(
        f"M={num_rows} d={width}: {times['fusedacl']['p50_ms']:.1f} ms, "
        f"{result['faster_than_dense']:.1f}x dense, "
        f"{result['faster_than_metric_learning']:.1f}x pytorch-metric-learning, "
        f"{result['over_floor']:.2f}x the floor of {floor:.1f} ms "
        f"({result['gemm_gflops']:.0f} GFLOP/s, {result['exp_giga_per_second']:.1f} Gexp/s)"
    )
    return result


def small_batch(num_samples: int, num_labels: int, width: int, rounds: int) -> Result:
    """One GLUE batch: acl_loss beside the dense formula of the concatenated rows."""
    embeddings, labels = batch(num_samples, width, num_labels)
    label_embeddings = torch.randn(num_labels, width, requires_grad=True)
    losses: dict[str, Loss] = {"fusedacl": fusedacl_acl, "dense": dense_acl}
    check(losses, embeddings, labels, label_embeddings)
    times = interleave(
        {
            name: partial(forward_backward, loss, embeddings, labels, label_embeddings)
            for name, loss in losses.items()
        },
        rounds=rounds,
        repeats=20,
    )
    faster = ratio(times, "dense", "fusedacl")
    print(
        f"N={num_samples} K={num_labels} d={width}: {times['fusedacl']['p50_ms'] * 1e3:.0f} us, "
        f"{faster:.2f}x dense"
    )
    shape = {"samples": num_samples, "labels": num_labels, "width": width}
    return {"shape": shape, "times": times, "faster_than_dense": faster}


def memory(num_rows: int, width: int) -> Result:
    """What one forward + backward adds to the high-water mark of a fresh process."""
    ours = extra_memory(prepare, "fusedacl", num_rows, width)
    dense = extra_memory(prepare, "dense", num_rows, width)
    print(
        f"M={num_rows} d={width}: {ours / 2**20:.1f} MiB more at the peak, dense "
        f"{dense / 2**20:.0f} MiB: 1/{dense / ours:.0f}"
    )
    return {
        "shape": {"rows": num_rows, "width": width, "classes": NUM_CLASSES},
        "method": "VmHWM of a fresh process, reset after inputs and a call with 64 rows",
        "fusedacl_bytes": ours,
        "dense_bytes": dense,
        "dense_over_fusedacl": dense / ours,
    }


def prepare(name: str, num_rows: int, width: int) -> Callable[[], None]:
    loss = {"fusedacl": fusedacl_supcon, "dense": dense_supcon}[name]
    forward_backward(loss, *batch(64, width))
    inputs = batch(num_rows, width)
    return partial(forward_backward, loss, *inputs)


def fusedacl_supcon(embeddings: Tensor, labels: Tensor) -> Tensor:
    return supcon_loss(embeddings, labels, temperature=TEMPERATURE, denominator="others")


def fusedacl_acl(embeddings: Tensor, labels: Tensor, label_embeddings: Tensor) -> Tensor:
    return acl_loss(embeddings, labels, label_embeddings, temperature=TEMPERATURE)


def batch(num_rows: int, width: int, num_classes: int = NUM_CLASSES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(num_rows, width, generator=generator).requires_grad_()
    return embeddings, torch.randint(num_classes, (num_rows,), generator=generator)


def forward_backward(loss: Loss, embeddings: Tensor, *others: Tensor) -> None:
    for tensor in (embeddings, *others):
        tensor.grad = None
    loss(embeddings, *others).backward()


def check(losses: dict[str, Loss], embeddings: Tensor, *others: Tensor) -> None:
    """Refuses to time a wrong result: loss and gradient against the reference in float64."""
    exact: Loss = (
        partial(supcon_loss, denominator="others") if len(others) == 1 else partial(acl_loss)
    )
    doubles = [t.detach().double() if t.is_floating_point() else t for t in (embeddings, *others)]
    doubles[0].requires_grad_()
    expected = exact(*doubles, temperature=TEMPERATURE, impl="reference")
    (expected_gradient,) = torch.autograd.grad(expected, doubles[0])
    for name, loss in losses.items():
        value = loss(embeddings, *others)
        (gradient,) = torch.autograd.grad(value, embeddings)
        for what, found, wanted in (
            ("loss", value, expected),
            ("gradient", gradient, expected_gradient),
        ):
            error = float((found - wanted).detach().abs().max() / wanted.detach().abs().max())
            if not error <= MAX_ERROR:
                raise SystemExit(f"{name}: relative error of the {what} is {error:.1e}: not timed")


def machine_rates(width: int) -> dict[str, Callable[[], object]]:
    """RATE_CALLS products and exponentials of one block, into memory that is already there."""
    left, right = torch.randn(2, BLOCK, width)
    out = torch.empty(BLOCK, BLOCK)
    exponents = torch.rand(BLOCK, BLOCK)

    def gemm() -> None:
        for _ in range(RATE_CALLS):
            torch.mm(left, right.t(), out=out)

    def exp() -> None:
        for _ in range(RATE_CALLS):
            torch.exp(exponents, out=out)

    return {"gemm": gemm, "exp": exp}


if __name__ == "__main__":
    main()
