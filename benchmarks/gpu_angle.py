"""Time of the gradient-angle check over BERT's parameters on a GPU, float32 and float16.

    python -m fusedacl.benchmarks.gpu_angle [--quick]

`grad_dot_norm` beside a copy that moves as many bytes (the share of the copy's bandwidth is the
ratio of their times), beside concatenating both lists, and beside multi-tensor norms with a loop of
dot products. `gated_combine_` with loss-scale removal and clipping beside what a step pays anyway:
unscale, global norm, clip with multi-tensor operations. Results are checked against float64 before
anything is timed. Launches are counted, and the host's part of a call is timed on as many tensors
of one element.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..kernels import gated_combine_, grad_dot_norm
from ..kernels.gradients import choose
from .angle import bert_shapes
from .baselines import concatenated_dot_norm, foreach_dot_norm, unscale_and_clip_
from .floors import num_elements
from .measure import Result, gpu_command_line, interleave_on, launches, ratio, write

WEIGHT = 0.02
# Above every norm here: the factor is computed and is 1, so that repeated calls change no scale.
MAX_NORM = 1e9
OUR_MAX_ERROR = 1e-5
# A float32 norm of 23 million elements may be off by some percent.
OTHERS_MAX_ERROR = 5e-2
DTYPES = (torch.float32, torch.float16)

OURS = "grad_dot_norm"
COPY = "copy of as many bytes"
COMBINE = "gated_combine_"
UNSCALE_AND_CLIP = "unscale, norm and clip"
Lists = tuple[list[Tensor], list[Tensor]]
DotNorm = Callable[[list[Tensor], list[Tensor]], Tensor]


def main() -> None:
    arguments = gpu_command_line(__doc__)
    device = arguments.device
    models = {
        "BERT-base": bert_shapes(num_layers=12),
        "BERT-large": bert_shapes(num_layers=24, hidden=1024),
    }
    rounds = 15
    if arguments.quick:
        on_gpu = device.type == "cuda"
        small = bert_shapes(1) if on_gpu else bert_shapes(1, hidden=4, vocabulary=50)
        models, rounds = {"one layer": small}, 3
    result: Result = {
        "models": [
            angle(name, shapes, dtype, device, rounds)
            for name, shapes in models.items()
            for dtype in DTYPES
        ]
    }
    if not arguments.quick:
        write(result, arguments.output_dir / "gpu_angle.json", device)


def angle(
    name: str, shapes: list[list[int]], dtype: torch.dtype, device: torch.device, rounds: int
) -> Result:
    a, b = make_lists(shapes, dtype, device)
    functions: dict[str, DotNorm] = {
        OURS: grad_dot_norm,
        "concatenate, dot, two norms": concatenated_dot_norm,
        "foreach norms, a loop of dots": foreach_dot_norm,
    }
    errors, left_out = check_sums(functions, a, b)
    check_combination(a, b)
    stats = grad_dot_norm(a, b)
    one = torch.ones((), device=device)
    found_inf = torch.zeros(1, device=device)
    source = torch.zeros(num_elements(shapes), dtype=dtype, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {COPY: lambda: target.copy_(source)}
    calls |= {
        what: partial(function, a, b) for what, function in functions.items() if what in errors
    }
    calls[COMBINE] = lambda: gated_combine_(
        a, b, stats, weight=WEIGHT, scale=one, max_norm=MAX_NORM
    )
    calls[UNSCALE_AND_CLIP] = lambda: unscale_and_clip_(a, one.reshape(1), found_inf, MAX_NORM)
    times = interleave_on(device, calls, rounds=rounds)
    num_bytes = 2 * source.numel() * dtype.itemsize
    launched = {what: launches(call, device) for what, call in calls.items()}
    result: Result = {
        "shape": {
            "gradients_of": name,
            "tensors": len(shapes),
            "elements": source.numel(),
            "dtype": str(dtype),
        },
        "implementation": choose("auto", device, a, b),
        "relative_errors": errors,
        "left_out": left_out,
        "times": times,
        "copy_gigabytes_per_second": num_bytes / times[COPY]["p50_ms"] / 1e6,
        "share_of_copy_bandwidth": ratio(times, COPY, OURS),
        "times_faster_than": {what: ratio(times, what, OURS) for what in errors if what != OURS},
        # Of the two times, ours over theirs: below 1 ours is faster.
        "combine_over_unscale_and_clip": ratio(times, COMBINE, UNSCALE_AND_CLIP),
        "launches": {
            what: None if names is None else len(names) for what, names in launched.items()
        },
        "our_launches": {what: launched[what] for what in (OURS, COMBINE)},
        "host": host_times(len(shapes), dtype, device, rounds),
    }
    print_result(result)
    return result


def make_lists(shapes: list[list[int]], dtype: torch.dtype, device: torch.device) -> Lists:
    """Gradients a little less than 90 degrees apart, so that both are combined."""
    generator = torch.Generator(device=device).manual_seed(0)
    a = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]
    b = [
        (torch.randn(shape, generator=generator, device=device) + 0.1 * x).to(dtype)
        for shape, x in zip(shapes, a, strict=True)
    ]
    return a, b


def check_sums(
    functions: dict[str, DotNorm], a: list[Tensor], b: list[Tensor]
) -> tuple[dict[str, float], dict[str, str]]:
    """Relative errors of those that may be timed, and why the others may not."""
    sums = torch.zeros(3, dtype=torch.float64, device=a[0].device)
    for x, y in zip(a, b, strict=True):
        x, y = x.double().reshape(-1), y.double().reshape(-1)
        sums += torch.stack([x @ y, x @ x, y @ y])
    errors, left_out = {}, {}
    for name, function in functions.items():
        found = function(a, b).reshape(3).double()
        error = float(((found - sums) / sums).abs().max())
        limit = OUR_MAX_ERROR if name == OURS else OTHERS_MAX_ERROR
        if error <= limit:
            errors[name] = error
        elif name == OURS:
            raise SystemExit(f"{name}: relative error {error:.1e}: not timed")
        else:
            left_out[name] = f"relative error {error:.1e}: not timed"
    return errors, left_out


def check_combination(a: list[Tensor], b: list[Tensor]) -> None:
    """Refuses to time a wrong combination: unscaled, gated and clipped, in some of the tensors."""
    left, right = a[-3:], b[-3:]
    ours = [x.clone() for x in left]
    scale = torch.full((), 0.5, device=left[0].device)
    gated_combine_(
        ours, right, grad_dot_norm(left, right), weight=WEIGHT, max_angle=180, scale=scale,
        max_norm=1.0,
    )  # fmt: skip
    wanted = [
        0.5 * ((1 - WEIGHT) * x.double() + WEIGHT * y.double())
        for x, y in zip(left, right, strict=True)
    ]
    norm = torch.cat([x.reshape(-1) for x in wanted]).norm()
    tolerance = 2 * torch.finfo(left[0].dtype).eps
    for found, exact in zip(ours, wanted, strict=True):
        exact = exact * (1 / (norm + 1e-6)).clamp(max=1)
        if not torch.allclose(found.double(), exact, rtol=1e-5 + tolerance, atol=1e-7):
            raise SystemExit("gated_combine_: wrong combination: not timed")


def host_times(
    num_tensors: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, Result]:
    """Of as many tensors of one element: what is left is Python and the launches."""
    a, b = make_lists([[1]] * num_tensors, dtype, device)
    stats = grad_dot_norm(a, b)
    return interleave_on(
        device,
        {
            OURS: lambda: grad_dot_norm(a, b),
            COMBINE: lambda: gated_combine_(a, b, stats, weight=WEIGHT, max_norm=MAX_NORM),
        },
        rounds=rounds,
    )


def print_result(result: Result) -> None:
    shape, times, host = result["shape"], result["times"], result["host"]
    faster = [f"{number:.1f}x {name}" for name, number in result["times_faster_than"].items()]
    faster += [f"{name} {reason}" for name, reason in result["left_out"].items()]
    print(
        f"{shape['gradients_of']}, {shape['tensors']} tensors, {shape['elements'] / 1e6:.1f}M "
        f"elements, {shape['dtype']}: {OURS} ({result['implementation']}) "
        f"{times[OURS]['p50_ms']:.3g} ms, {result['share_of_copy_bandwidth']:.2f} of the copy's "
        f"{result['copy_gigabytes_per_second']:.0f} GB/s, {', '.join(faster)}; {COMBINE} "
        f"{times[COMBINE]['p50_ms']:.3g} ms, {result['combine_over_unscale_and_clip']:.2f}x "
        f"{UNSCALE_AND_CLIP}; host {host[OURS]['p50_ms'] * 1e3:.0f} + "
        f"{host[COMBINE]['p50_ms'] * 1e3:.0f} us; launches {result['launches']}",
        flush=True,
    )


if __name__ == "__main__":
    main()
