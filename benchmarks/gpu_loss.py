"""Time, memory and launches of the contrastive loss, forward + backward, on a GPU.

    python -m fusedacl.benchmarks.gpu_loss [--quick]

Large batches beside the dense formula (eager, under autocast, compiled), pytorch-metric-learning,
and the kernels of inf_cl and cut_cross_entropy where they are installed; batches of fine-tuning,
1 and 11 exits, beside a loop over the exits. What would not fit into the GPU's memory is left out
and named. Before anything is timed, loss and gradient are checked against float64, computed here in
blocks of rows: the loss at its full size, the gradient in some of its rows. Floors use the
rates measured in the same process (floors.py).
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..kernels import acl_loss, supcon_loss
from ..kernels.dispatch import Workload, choose, obstacle, triton_file
from .baselines import (
    cut_log_sum_exp,
    dense_acl,
    dense_supcon,
    flash_log_sum_exp,
    metric_learning_supcon,
    supcon_by_log_sum_exp,
)
from .floors import ALGORITHMS, Rates, loss_floor, measured
from .loss import NUM_CLASSES, TEMPERATURE
from .measure import (
    Result,
    extra_device_memory,
    gpu_command_line,
    interleave_on,
    launches,
    ratio,
    write,
)

DTYPES = (torch.float16, torch.bfloat16)
# Rows of which the gradient is checked.
NUM_CHECKED = 256
# Pairs of a float64 block of the check: 256 MiB.
BLOCK_PAIRS = 2**25
# Relative to float64. Ours rounds the result to its dtype; the others compute in it.
OUR_MAX_ERROR = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-4}
OTHERS_MAX_ERROR = 5e-2
# Memory beyond the inputs, in bytes per pair of rows for elements of 16 bits: the resident memory
# that one forward + backward of 4096 rows adds on the CPU.
DENSE_BYTES = 14
FLOAT32_DENSE_BYTES = 29
METRIC_LEARNING_BYTES = 34

OURS = "fusedacl"
DENSE = "dense"
EAGER_LOOP = "dense, a loop over exits"
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Contestant:
    """A loss of (embeddings, labels), and its bytes per pair of rows (0: none that count)."""

    loss: Loss
    bytes_per_pair: int = 0
    is_ours: bool = False


def main() -> None:
    arguments = gpu_command_line(__doc__)
    device = arguments.device
    rows: Sequence[int] = (16384, 32768, 65536)
    widths: Sequence[int] = (64, 128, 256, 768)
    rounds, width_of_exits = 15, 768
    if arguments.quick:
        # More than a small batch, so that the path of large ones is tried.
        rows, widths, rounds, width_of_exits = (
            ((4096,), (64, 768), 3, 768) if device.type == "cuda" else ((272,), (16,), 1, 16)
        )
    rates = measured(device) if device.type == "cuda" else None
    result: Result = {
        "rates": None if rates is None else rates_result(rates),
        "large": [
            large_batch(num_rows, width, dtype, device, rates, rounds)
            for width in widths
            for num_rows in rows
            for dtype in dtypes_of(device)
        ],
        "small": [
            small_batch(num_exits, dtype, width_of_exits, device, rounds)
            for num_exits in (1, 11)
            for dtype in (*dtypes_of(device), torch.float32)
        ],
    }
    if not arguments.quick:
        write(result, arguments.output_dir / "gpu_loss.json", device)


def dtypes_of(device: torch.device) -> list[torch.dtype]:
    """float16, and bfloat16 where the GPU has it."""
    has_bfloat16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    return [dtype for dtype in DTYPES if dtype == torch.float16 or has_bfloat16]


def rates_result(rates: Rates) -> Result:
    return {
        "teraflops": {str(dtype): flops / 1e12 for dtype, flops in rates.flops.items()},
        "giga_exponentials_per_second": rates.exponentials / 1e9,
        "gigabytes_per_second": rates.bytes / 1e9,
    }


def large_batch(
    num_rows: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    rates: Rates | None,
    rounds: int,
) -> Result:
    """One [M, d] batch of 16 classes with denominator "others", which all contestants share."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(num_rows, width, generator=generator).to(device, dtype)
    embeddings.requires_grad_()
    labels = torch.randint(NUM_CLASSES, (num_rows,), generator=generator).to(device)
    # The mean makes gradients of 1 / M; as a loss scale this keeps them in float16's range.
    upstream = torch.tensor(float(num_rows), device=device)
    workload = Workload(device, dtype, TEMPERATURE, num_rows, width)
    # A compiled function keeps what it compiled for other shapes, and gives up after a few.
    torch._dynamo.reset()
    entrants = contestants(workload)
    fitting, left_out = fits(entrants, num_rows, device)
    exact = exact_in_blocks(embeddings.detach(), labels)
    calls: dict[str, Callable[[], object]] = {}
    errors: dict[str, Result] = {}
    for name in fitting:
        call = partial(forward_backward, entrants[name].loss, embeddings, labels, upstream)
        found, reason = attempt(call, must_run=entrants[name].is_ours)
        if found is None:
            left_out[name] = reason
            continue
        loss, gradient = found
        errors[name] = error_of(loss, gradient, upstream, exact)
        limit = OUR_MAX_ERROR[dtype] if entrants[name].is_ours else OTHERS_MAX_ERROR
        if max(errors[name].values()) <= limit:
            calls[name] = call
        elif entrants[name].is_ours:
            raise SystemExit(f"{name}, M={num_rows} d={width} {dtype}: {errors[name]}: not timed")
        else:
            left_out[name] = "wrong by more than 5%: not timed"
        del found, loss, gradient
    times = interleave_on(device, calls, rounds=rounds)
    result: Result = {
        "shape": {"rows": num_rows, "width": width, "classes": NUM_CLASSES, "dtype": str(dtype)},
        "implementation": choose("auto", workload),
        "relative_errors": errors,
        "checked": f"the loss, and the gradient of {len(exact.rows)} rows, at this size",
        "left_out": left_out,
        "times": times,
        "extra_bytes": {name: extra_device_memory(call, device) for name, call in calls.items()},
        "launches": launches(calls[OURS], device),
        "times_faster_than": {
            name: ratio(times, name, OURS) for name in times if not entrants[name].is_ours
        },
        "floors": floors(rates, num_rows, width, dtype, times[OURS]["p50_ms"]),
    }
    print_large(result)
    return result


def contestants(workload: Workload) -> dict[str, Contestant]:
    """Ours as "auto" chooses and each other implementation by its name; then what others use."""
    pairs = {"reference": FLOAT32_DENSE_BYTES}
    found = {OURS: Contestant(partial(supcon, impl="auto"), is_ours=True)}
    chosen = choose("auto", workload)
    for impl in ("triton", "tiled", "reference"):
        name = triton_file(workload) if impl == "triton" else impl
        if name != chosen and obstacle(name, workload) is None:
            loss = partial(supcon, impl=impl)
            found[f"{OURS} {name}"] = Contestant(loss, pairs.get(impl, 0), is_ours=True)
    itemsize = workload.dtype.itemsize
    dense = partial(dense_supcon, temperature=TEMPERATURE)
    found[DENSE] = Contestant(dense, DENSE_BYTES * itemsize // 2)
    if workload.device.type == "cuda":
        under_autocast = partial(autocast_dense, workload.dtype)
        found["dense, autocast"] = Contestant(under_autocast, FLOAT32_DENSE_BYTES)
        found["dense, compiled"] = Contestant(
            torch.compile(dense_supcon, dynamic=False), DENSE_BYTES * itemsize // 2
        )
    if installed("pytorch_metric_learning"):
        found["pytorch-metric-learning"] = Contestant(
            metric_learning_supcon(TEMPERATURE), METRIC_LEARNING_BYTES
        )
    if workload.device.type == "cuda" and installed("inf_cl"):
        found["inf_cl"] = by_log_sum_exp(flash_log_sum_exp())
    if workload.device.type == "cuda" and installed("cut_cross_entropy"):
        for accumulate_float32 in (False, True):
            name = "cut_cross_entropy" + ", float32 accumulation" * accumulate_float32
            found[name] = by_log_sum_exp(cut_log_sum_exp(accumulate_float32=accumulate_float32))
    return found


def supcon(embeddings: Tensor, labels: Tensor, impl: str) -> Tensor:
    return supcon_loss(embeddings, labels, temperature=TEMPERATURE, denominator="others", impl=impl)


def autocast_dense(dtype: torch.dtype, embeddings: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(embeddings.device.type, dtype=dtype):
        return dense_supcon(embeddings, labels, temperature=TEMPERATURE)


def by_log_sum_exp(log_sum_exp: Callable[[Tensor], Tensor]) -> Contestant:
    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        return supcon_by_log_sum_exp(log_sum_exp, embeddings, labels, NUM_CLASSES, TEMPERATURE)

    return Contestant(loss)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def fits(
    entrants: dict[str, Contestant], num_rows: int, device: torch.device
) -> tuple[list[str], dict[str, str]]:
    """Who fits into the device's free memory, and who does not, with the bytes that say so."""
    if device.type != "cuda":
        return list(entrants), {}
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    fitting, left_out = [], {}
    for name, contestant in entrants.items():
        needed = contestant.bytes_per_pair * num_rows**2
        if needed < 0.9 * free:
            fitting.append(name)
        else:
            left_out[name] = (
                f"does not fit: about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
            )
    return fitting, left_out


def attempt(
    call: Callable[[], tuple[Tensor, Tensor]], *, must_run: bool
) -> tuple[tuple[Tensor, Tensor] | None, str]:
    """What the call returns; or None and why others' code does not run here."""
    try:
        return call(), ""
    except torch.cuda.OutOfMemoryError:
        if must_run:
            raise
        reason = "does not fit: out of memory"
    except Exception as error:
        # Any error of code that is not ours, from its compiler's to its kernels'.
        if must_run:
            raise
        reason = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    torch.cuda.empty_cache()
    return None, reason


def forward_backward(
    loss: Loss, embeddings: Tensor, labels: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    value = loss(embeddings, labels)
    (gradient,) = torch.autograd.grad(value, embeddings, upstream.to(value.dtype))
    return value.detach(), gradient


@dataclass(frozen=True)
class Exact:
    """The loss, and its gradient [n, d] in some rows [n], float64."""

    loss: Tensor
    rows: Tensor
    gradient: Tensor


def exact_in_blocks(embeddings: Tensor, labels: Tensor, num_checked: int = NUM_CHECKED) -> Exact:
    """float64 loss (denominator "others", mean), and the gradient of rows spread over the batch.

    The formula of reference.py with its sums over blocks of rows: every row's denominator, for the
    gradient of one row needs those of all.
    """
    x = embeddings.double()
    norm = x.norm(dim=1, keepdim=True)
    z = x / norm
    num_rows = z.shape[0]
    block = max(1, min(num_rows, BLOCK_PAIRS // num_rows))
    starts = range(0, num_rows, block)
    denominators = torch.cat(
        [exponentials(z, rows_from(z, start, block)).sum(1) for start in starts]
    )

    one_hot = torch.nn.functional.one_hot(labels, NUM_CLASSES).double()
    of_class = (one_hot.T @ z)[labels]  # [M, d]
    num_positives = one_hot.sum(0)[labels] - 1
    is_anchor = num_positives > 0
    positive_mean = ((of_class - z) * z).sum(1) / TEMPERATURE / num_positives.clamp(min=1)
    weight = is_anchor / is_anchor.sum()
    loss = ((denominators.log() - positive_mean) * weight).sum()

    rows = torch.arange(0, num_rows, max(1, num_rows // num_checked), device=z.device)
    u = weight / denominators
    gradients = []
    for part in rows.split(block):
        pairs = exponentials(z, part) * (u[part, None] + u)
        v = (weight / num_positives.clamp(min=1))[part, None]
        of_z = (pairs @ z - 2 * v * (of_class - z)[part]) / TEMPERATURE
        along = (of_z * z[part]).sum(1, keepdim=True)
        gradients.append((of_z - along * z[part]) / norm[part])
    return Exact(loss, rows, torch.cat(gradients))


def rows_from(z: Tensor, start: int, block: int) -> Tensor:
    return torch.arange(start, min(start + block, z.shape[0]), device=z.device)


def exponentials(z: Tensor, rows: Tensor) -> Tensor:
    """e_ij [rows, M], 0 for a row with itself."""
    pairs = (z[rows] @ z.T).div_(TEMPERATURE).exp_()
    return pairs.scatter_(1, rows[:, None], 0.0)


def error_of(loss: Tensor, gradient: Tensor, upstream: Tensor, exact: Exact) -> Result:
    """Largest differences relative to the largest exact values; a NaN counts as infinite."""
    pairs = {
        "loss": (loss, exact.loss),
        "gradient": (gradient[exact.rows], exact.gradient * upstream),
    }
    errors = {
        what: float((found.double() - wanted).abs().max() / wanted.abs().max())
        for what, (found, wanted) in pairs.items()
    }
    return {what: error if error == error else float("inf") for what, error in errors.items()}


def floors(
    rates: Rates | None, num_rows: int, width: int, dtype: torch.dtype, p50_ms: float
) -> Result | None:
    """By algorithm: the floor, what binds it, and the share of it that was reached."""
    if rates is None:
        return None
    found: Result = {}
    for algorithm in ALGORITHMS:
        floor = loss_floor(rates, num_rows, width, dtype, algorithm)
        if floor is not None:
            found[algorithm] = {
                "milliseconds": floor.seconds * 1e3,
                "forward_bound_by": floor.forward.bound_by,
                "backward_bound_by": floor.backward.bound_by,
                "share_reached": floor.seconds * 1e3 / p50_ms,
            }
    return found


def print_large(result: Result) -> None:
    shape, times = result["shape"], result["times"]
    words = [f"M={shape['rows']} d={shape['width']} {shape['dtype']}: {result['implementation']}"]
    words[0] += f" {times[OURS]['p50_ms']:.3g} ms"
    if result["extra_bytes"][OURS] is not None:
        words.append(f"{result['extra_bytes'][OURS] / 1e6:.0f} MB more at the peak")
    if result["floors"]:
        shares = (
            f"{floor['share_reached']:.2f} of the floor by {algorithm}"
            for algorithm, floor in result["floors"].items()
        )
        words += shares
    words += [f"{faster:.1f}x {name}" for name, faster in result["times_faster_than"].items()]
    words += [f"{name} {reason}" for name, reason in result["left_out"].items()]
    print(", ".join(words), flush=True)


def small_batch(
    num_exits: int, dtype: torch.dtype, width: int, device: torch.device, rounds: int
) -> Result:
    """32 texts and 2 label embeddings for each exit: acl_loss of all exits at once."""
    num_samples, num_labels = 32, 2
    generator = torch.Generator().manual_seed(0)
    embeddings, label_embeddings = (
        torch.randn(num_exits, number, width, generator=generator)
        .to(device, dtype)
        .requires_grad_()
        for number in (num_samples, num_labels)
    )
    labels = torch.randint(num_labels, (num_samples,), generator=generator).to(device)
    upstream = torch.full((num_exits,), float(num_samples + num_labels), device=device)
    workload = Workload(device, dtype, TEMPERATURE, num_samples + num_labels, width)
    torch._dynamo.reset()
    losses: dict[str, Loss] = {
        OURS: partial(acl, impl="auto"),
        f"{OURS} tiled": partial(acl, impl="tiled"),
        EAGER_LOOP: loop_over_exits,
    }
    if device.type == "cuda":
        losses["dense, a compiled loop over exits"] = torch.compile(loop_over_exits, dynamic=False)
    inputs = (embeddings, label_embeddings)
    calls = {
        name: partial(small_forward_backward, loss, inputs, labels, upstream)
        for name, loss in losses.items()
    }
    doubles = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    exact = small_forward_backward(
        partial(acl, impl="reference"), doubles, labels, upstream.double()
    )
    errors = {}
    for name, call in calls.items():
        errors[name] = max(
            float((found.double() - wanted).abs().max() / wanted.abs().max())
            for found, wanted in zip(call(), exact, strict=True)
        )
        limit = OUR_MAX_ERROR[dtype] if name.startswith(OURS) else OTHERS_MAX_ERROR
        if not errors[name] <= limit:
            raise SystemExit(f"{name}, E={num_exits} {dtype}: off by {errors[name]:.1e}: not timed")
    times = interleave_on(device, calls, rounds=rounds)
    launched = {name: launches(call, device) for name, call in calls.items()}
    result: Result = {
        "shape": {
            "exits": num_exits,
            "samples": num_samples,
            "labels": num_labels,
            "width": width,
            "dtype": str(dtype),
        },
        "implementation": choose("auto", workload),
        "relative_errors": errors,
        "times": times,
        "launches": {
            name: None if names is None else len(names) for name, names in launched.items()
        },
        "our_launches": launched[OURS],
        "times_faster_than": {
            name: ratio(times, name, OURS) for name in losses if not name.startswith(OURS)
        },
    }
    faster = ", ".join(
        f"{number:.1f}x {name}" for name, number in result["times_faster_than"].items()
    )
    print(
        f"E={num_exits} N={num_samples} K={num_labels} d={width} {dtype}: "
        f"{result['implementation']} {times[OURS]['p50_ms'] * 1e3:.0f} us, "
        f"launches {result['launches']}, {faster}",
        flush=True,
    )
    return result


def acl(embeddings: Tensor, labels: Tensor, label_embeddings: Tensor, impl: str) -> Tensor:
    return acl_loss(embeddings, labels, label_embeddings, temperature=TEMPERATURE, impl=impl)


def loop_over_exits(embeddings: Tensor, labels: Tensor, label_embeddings: Tensor) -> Tensor:
    """[E]: what one writes without a batch of exits."""
    return torch.stack(
        [
            dense_acl(samples, labels, label_rows, TEMPERATURE)
            for samples, label_rows in zip(embeddings, label_embeddings, strict=True)
        ]
    )


def small_forward_backward(
    loss: Loss, inputs: tuple[Tensor, ...], labels: Tensor, upstream: Tensor
) -> tuple[Tensor, ...]:
    """The losses, and the gradients of both inputs."""
    embeddings, label_embeddings = inputs
    value = loss(embeddings, labels, label_embeddings)
    return value.detach(), *torch.autograd.grad(value, inputs, upstream)


if __name__ == "__main__":
    main()
