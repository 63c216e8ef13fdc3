"""Work of one rank: check the losses, count their bytes, measure rates, times and memory."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, distributed

from ....kernels import acl_loss
from ....kernels.contrastive.sharded.agreement import all_gather
from ...floors.cpu import BLOCK, RATE_CALLS, machine_rates
from ...measuring.clock import seconds as seconds_of
from ...measuring.environment import Result
from ...measuring.memory import HighWaterMark
from ..suite import relative_error
from . import baselines as global_baselines
from .cost_model import METHODS
from .loopback import Wire, loopback_bytes

TEMPERATURE = 0.5
# Relative to the largest value of the float64 reference.
MAX_ERROR = 1e-5
SMALL_GATHERS = 20
LARGE_BYTES = 4 * 2**20

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def losses() -> dict[str, Loss]:
    group = distributed.group.WORLD
    others = {name: getattr(global_baselines, name) for name in METHODS if name != "ours"}
    losses = {"ours": partial(acl_loss, process_group=group), **others}
    return {name: partial(loss, temperature=TEMPERATURE) for name, loss in losses.items()}


def measure(rank: int, num_samples: int, num_labels: int, width: int, rounds: int) -> Result:
    """Rates of this rank while all ranks are busy, and seconds, bytes and memory of each method."""
    inputs = own_inputs(rank, num_samples, num_labels, width)
    found = losses()
    check(found, inputs)
    methods: dict[str, Result] = {name: count(loss, inputs) for name, loss in found.items()}
    rates = calibrate(width, rounds)
    for method in methods.values():
        method["seconds"] = []
    for _ in range(rounds):
        for name, loss in found.items():
            # All ranks start together.
            distributed.barrier()
            methods[name]["seconds"].append(seconds_of(partial(forward_backward, loss, inputs)))
    for name, loss in found.items():
        methods[name]["memory_bytes"] = peak_memory(partial(forward_backward, loss, inputs))
    return {"rates": rates, "methods": methods}


def own_inputs(
    rank: int | None, num_samples: int, num_labels: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, labels and label embeddings of one rank, or of all ranks if `rank` is None."""
    generator = torch.Generator().manual_seed(0)
    total = num_samples * distributed.get_world_size()
    embeddings = torch.randn(total, width, generator=generator)
    labels = torch.randint(num_labels, (total,), generator=generator)
    label_embeddings = torch.randn(num_labels, width, generator=generator)
    if rank is not None:
        own = slice(rank * num_samples, (rank + 1) * num_samples)
        embeddings, labels = embeddings[own].clone(), labels[own].clone()
    return embeddings.requires_grad_(), labels, label_embeddings.requires_grad_()


def forward_backward(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    embeddings, labels, label_embeddings = inputs
    embeddings.grad = label_embeddings.grad = None
    value = loss(embeddings, labels, label_embeddings)
    value.backward()
    return value.detach()


def check(found: dict[str, Loss], inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """AssertionError if a method's loss or gradients differ from one process with all samples."""
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    num_samples, (num_labels, width) = inputs[0].shape[0], inputs[2].shape
    shapes: list[list[int]] = [[], [num_ranks * num_samples, width], [num_labels, width]]
    expected = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    if rank == 0:
        # The dense reference takes much memory, so one rank computes it for all.
        embeddings, labels, label_embeddings = own_inputs(None, num_samples, num_labels, width)
        exact = [each.detach().double().requires_grad_() for each in (embeddings, label_embeddings)]
        value = acl_loss(exact[0], labels, exact[1], temperature=TEMPERATURE, impl="reference")
        expected = [value.detach(), *torch.autograd.grad(value, exact)]
    for tensor in expected:
        distributed.broadcast(tensor, 0)
    expected[1] = expected[1][rank * num_samples : (rank + 1) * num_samples]
    for name, loss in found.items():
        value = forward_backward(loss, inputs).double()
        assert inputs[0].grad is not None and inputs[2].grad is not None
        samples, labels_gradient = inputs[0].grad / num_ranks, inputs[2].grad.clone()
        for tensor in (value, labels_gradient):
            distributed.all_reduce(tensor)
            tensor /= num_ranks
        whats = ("loss", "samples' gradient", "label embeddings' gradient")
        given = (value, samples, labels_gradient)
        for what, error in zip(whats, map(relative_error, given, expected), strict=True):
            assert error <= MAX_ERROR, f"{name}: relative error of the {what} is {error:.1e}"


def count(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> Result:
    """Messages and bytes of one forward + backward pass, and the loopback interface's count."""
    with Wire() as wire:
        forward_backward(loss, inputs)
    on_loopback = []
    for _ in range(3):
        distributed.barrier()
        before = loopback_bytes()
        distributed.barrier()
        forward_backward(loss, inputs)
        distributed.barrier()
        after = loopback_bytes()
        distributed.barrier()
        if before is not None and after is not None:
            on_loopback.append(after - before)
    return {
        "messages": wire.messages,
        "sent_bytes": wire.sent_bytes,
        "received_bytes": wire.received_bytes,
        # Other programs only add to the count.
        "loopback_bytes": min(on_loopback, default=None),
    }


def calibrate(width: int, rounds: int) -> Result:
    """Seconds per message and bytes per second of an all-gather; products and exponentials.

    All ranks work at the same time.
    """
    num_ranks = distributed.get_world_size()
    seconds: dict[str, list[float]] = {name: [] for name in ("small", "large", "gemm", "exp")}
    work = machine_rates(width)
    for _ in range(rounds):
        if num_ranks > 1:
            seconds["small"].append(gather_seconds(8, SMALL_GATHERS))
            seconds["large"].append(gather_seconds(LARGE_BYTES, 1))
        for name, call in work.items():
            distributed.barrier()
            seconds[name].append(seconds_of(call) / RATE_CALLS)
    gemm, exp = (statistics.median(seconds[name]) for name in ("gemm", "exp"))
    rates = {
        "flops_per_second": 2 * BLOCK**2 * width / gemm,
        "exponentials_per_second": BLOCK**2 / exp,
    }
    if num_ranks == 1:
        return rates
    small, large = (statistics.median(seconds[name]) for name in ("small", "large"))
    steps = num_ranks - 1
    return rates | {
        "seconds_per_message": small / steps,
        "bytes_per_second": steps * LARGE_BYTES / max(large - small, 1e-9),
    }


def gather_seconds(num_bytes: int, repeats: int) -> float:
    group = distributed.group.WORLD
    sent = torch.zeros(num_bytes, dtype=torch.uint8)
    received = torch.empty(distributed.get_world_size() * num_bytes, dtype=torch.uint8)
    all_gather(received, sent, group)
    distributed.barrier()

    def gather() -> None:
        for _ in range(repeats):
            all_gather(received, sent, group)

    return seconds_of(gather) / repeats


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes by which a call raises the high-water mark of resident memory; None if unknown."""
    if not HighWaterMark.is_available():
        return None
    mark = HighWaterMark()
    call()
    return mark.raised_by(call)
