"""Time of the gradient-angle check over a BERT-base-sized parameter list, float32 on the CPU.

    python -m fusedacl.benchmarks.angle [--quick]

`grad_dot_norm` beside one torch.dot of two flat tensors of that size (the floor: every element read
once) and beside concatenating both lists, one dot and two norms; `gated_combine_` beside
PyTorch's multi-tensor operations. Results are checked against float64 before anything is timed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import gated_combine_, grad_dot_norm
from .baselines import concatenated_dot_norm, foreach_combine_
from .measure import Result, command_line, interleave, ratio, write

WEIGHT = 0.02
SCALE = 0.5
# Relative to float64. torch.norm of 110M float32 elements is itself off by some percent.
MAX_ERROR = {"grad_dot_norm": 1e-5, "concatenate": 5e-2}


def main() -> None:
    arguments = command_line(__doc__)
    shapes = bert_shapes(num_layers=1 if arguments.quick else 12)
    result = angle(shapes, rounds=3 if arguments.quick else 15)
    if not arguments.quick:
        write(result, arguments.output_dir / "angle.json")


def bert_shapes(num_layers: int, hidden: int = 768, vocabulary: int = 30522) -> list[list[int]]:
    """Parameter shapes of BERT-base with its pooler: 199 tensors, 109,482,240 elements."""
    norm = [[hidden], [hidden]]
    layer = [[hidden, hidden], [hidden]] * 4 + norm
    layer += [[4 * hidden, hidden], [4 * hidden], [hidden, 4 * hidden], [hidden], *norm]
    embeddings = [[vocabulary, hidden], [512, hidden], [2, hidden], *norm]
    return embeddings + layer * num_layers + [[hidden, hidden], [hidden]]


def angle(shapes: list[list[int]], rounds: int) -> Result:
    generator = torch.Generator().manual_seed(0)
    a = [torch.randn(shape, generator=generator) for shape in shapes]
    b = [
        torch.randn(shape, generator=generator) + 0.1 * x
        for shape, x in zip(shapes, a, strict=True)
    ]
    num_elements = sum(x.numel() for x in a)
    errors = check(a, b)
    stats = grad_dot_norm(a, b)
    # Flat copies of their own, so that the floor reads as much memory as the lists hold.
    flat_a, flat_b = (torch.cat([x.reshape(-1) for x in gradients]) for gradients in (a, b))
    candidates: dict[str, Callable[[], object]] = {
        "one_dot": lambda: torch.dot(flat_a, flat_b),
        "grad_dot_norm": lambda: grad_dot_norm(a, b),
        "concatenate": lambda: concatenated_dot_norm(a, b),
        "gated_combine_": lambda: gated_combine_(a, b, stats, weight=WEIGHT, scale=SCALE),
        "foreach_combine_": lambda: foreach_combine_(a, b, WEIGHT, SCALE),
    }
    times = interleave(candidates, rounds=rounds)
    result = {
        "shape": {"tensors": len(shapes), "elements": num_elements},
        "relative_errors": errors,
        "times": times,
        "over_one_dot": ratio(times, "grad_dot_norm", "one_dot"),
        "faster_than_concatenate": ratio(times, "concatenate", "grad_dot_norm"),
        "combine_faster_than_foreach": ratio(times, "foreach_combine_", "gated_combine_"),
        "one_dot_gigabytes_per_second": 8e-6 * num_elements / times["one_dot"]["p50_ms"],
    }
    print(
        f"{len(shapes)} tensors, {num_elements / 1e6:.1f}M elements: grad_dot_norm "
        f"{times['grad_dot_norm']['p50_ms']:.1f} ms, {result['over_one_dot']:.2f}x one dot "
        f"({result['one_dot_gigabytes_per_second']:.0f} GB/s), "
        f"{result['faster_than_concatenate']:.1f}x faster than concatenate + dot + two norms; "
        f"gated_combine_ {times['gated_combine_']['p50_ms']:.1f} ms, "
        f"{result['combine_faster_than_foreach']:.2f}x foreach"
    )
    return result


def check(a: list[Tensor], b: list[Tensor]) -> dict[str, float]:
    """Refuses to time a wrong result; returns the relative errors of the sums."""
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in zip(a, b, strict=True):
        x, y = x.double().reshape(-1), y.double().reshape(-1)
        sums += torch.stack([x @ y, x @ x, y @ y])
    errors = {}
    for name, found in (
        ("grad_dot_norm", grad_dot_norm(a, b)[0]),
        ("concatenate", concatenated_dot_norm(a, b)),
    ):
        errors[name] = float(((found - sums) / sums).abs().max())
        if not errors[name] <= MAX_ERROR[name]:
            raise SystemExit(f"{name}: relative error {errors[name]:.1e}: not timed")
    left, right = a[-2:], b[-2:]
    wanted = [SCALE * ((1 - WEIGHT) * x + WEIGHT * y) for x, y in zip(left, right, strict=True)]
    ours, theirs = ([x.clone() for x in left] for _ in range(2))
    gated_combine_(ours, right, grad_dot_norm(left, right), weight=WEIGHT, scale=SCALE)
    foreach_combine_(theirs, right, WEIGHT, SCALE)
    for name, found_list in (("gated_combine_", ours), ("foreach_combine_", theirs)):
        for x, y in zip(found_list, wanted, strict=True):
            if not torch.allclose(x, y, rtol=1e-5, atol=1e-7):
                raise SystemExit(f"{name}: wrong combination: not timed")
    return errors


if __name__ == "__main__":
    main()
