"""A few small shapes of every kernel against float64, in a process of its own.

    PYTHONPATH=tests/support python tests/gpu/small_grid.py [--as_volta] [--few] [supcon_small] ...

Stops with an error at the first wrong result. Without a GPU, Triton's interpreter runs fewer shapes
on the CPU (TRITON_INTERPRET=1).

With --as_volta the kernels are compiled for compute capability 7.0, and the driver turns their PTX
into code for the GPU that is there: the program of a V100, run elsewhere. The names of the compiled
kernels are printed. With --few every kernel runs in few compilations: a smoke test.
"""

import argparse
import itertools
import re
from functools import partial
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOLTA = (7, 0)
# The implementation's `impl`, and numbers of samples.
LOSSES: dict[str, tuple[str, tuple[int, ...]]] = {
    "supcon_small": ("triton", (1, 17, 33, 61)),
    "supcon_fused": ("triton", (1, 61, 130)),
    "tiled": ("tiled", (61, 100)),
}


def main() -> None:
    names = (*LOSSES, "gradients")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--as_volta", action="store_true")
    parser.add_argument("--few", action="store_true")
    # Not `choices`: with them Python 3.11 refuses an empty list.
    parser.add_argument("names", nargs="*", help=", ".join(names))
    arguments = parser.parse_args()
    checks = {
        **{name: partial(check_losses, name, few=arguments.few) for name in LOSSES},
        "gradients": partial(check_gradients, few=arguments.few),
    }
    if unknown := set(arguments.names) - checks.keys():
        parser.error(f"no kernel is named {', '.join(sorted(unknown))}")
    if DEVICE.type == "cpu":
        import quick_interpreter

        quick_interpreter.install()
    compiled: list[str] = []
    if arguments.as_volta:
        compile_for_volta(compiled)
    torch.manual_seed(0)
    # A V100 has no kernel for large batches.
    for name in arguments.names or [name for name in names if can_run(name)]:
        checks[name]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: right", flush=True)
    if arguments.as_volta:
        assert compiled, "no kernel was compiled"
        print(f"{len(compiled)} kernels compiled for 7.0: {', '.join(sorted(set(compiled)))}")


def compile_for_volta(compiled: list[str]) -> None:
    """Make Triton compile for a V100 and stop at PTX, which the driver compiles for this GPU."""
    # Triton's driver keeps a reference to this function, so replace it before the driver is made.
    torch.cuda.get_device_capability = lambda device=None: VOLTA
    from triton.backends import backends

    def keep_ptx(self: Any, ptx: str | bytes, *_: Any) -> bytes:
        text = ptx.decode() if isinstance(ptx, bytes) else ptx
        assert re.search(r"^\.target sm_70\b", text, re.MULTILINE), "this is not PTX for sm_70"
        compiled.extend(re.findall(r"\.visible \.entry (\w+)", text))
        # cuModuleLoadData expects PTX as a zero-terminated string.
        return text.encode() + b"\0"

    backends["nvidia"].compiler.make_cubin = keep_ptx


def can_run(name: str) -> bool:
    has_matrix_unit = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (8, 0)
    return has_matrix_unit or name != "supcon_fused"


def check_losses(name: str, *, few: bool) -> None:
    from contrastive_cases import DENOMINATORS, REDUCTIONS, check_error, make_inputs
    from fusedacl.kernels.contrastive import dispatch
    from fusedacl.kernels.contrastive.tiled import loss as tiled

    dispatch.SMALL_ROWS = 256 if name == "supcon_small" else 0
    # Several tiles of several blocks each, the last one smaller.
    tiled.GPU_TILE, tiled.ONE_TILE, tiled.FEW_ROWS = 48, 0, 0
    impl, sizes = LOSSES[name]
    kinds: list[dict[str, Any]] = [
        {"num_labels": None},
        {"num_labels": 5},
        {"num_labels": 3, "teacher": True, "exits": 2},
    ]
    if DEVICE.type == "cpu":
        sizes = sizes[:2]
    if few:
        sizes, kinds = sizes[1:2], kinds[-1:]
    # Two combinations per shape, in turn: all of them would take hours under a sanitizer.
    combinations = itertools.cycle(itertools.product(DENOMINATORS, REDUCTIONS))
    for num_samples, kind, dtype in itertools.product(sizes, kinds, dtypes_here(few)):
        inputs = make_inputs(num_samples, width=20, dtype=dtype, device=DEVICE.type, **kind)
        labels = torch.randint(kind["num_labels"] or 4, (num_samples,), device=DEVICE)
        for denominator, reduction in itertools.islice(combinations, 1 if few else 2):
            check_error(inputs, labels, impl=impl, denominator=denominator, reduction=reduction)


def dtypes_here(few: bool) -> tuple[torch.dtype, ...]:
    """Dtypes to check: bfloat16 only where a GPU has it, float32 alone on the CPU."""
    if DEVICE.type == "cpu":
        return (torch.float32,)
    both = (torch.float16, torch.float32)
    has_bfloat16 = torch.cuda.get_device_capability() >= (8, 0)
    return (*both, torch.bfloat16) if has_bfloat16 and not few else both


def check_gradients(*, few: bool) -> None:
    from fusedacl.kernels import grad_dot_norm
    from gradient_cases import check_combination

    shapes = ((300, 70), (1,), (0,), (16384,), (20000,), (7, 5))
    groups = [0, 1, 1, 2, 0, 3]
    for dtype, other in itertools.product(dtypes_here(few), repeat=2):
        a = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
        b = [torch.randn(shape, device=DEVICE).to(other) for shape in shapes]
        # An address that is not a multiple of 16, and a transposed tensor.
        a[3] = torch.randn(16385, device=DEVICE).to(dtype)[1:]
        b[5] = torch.randn(5, 7, device=DEVICE).to(other).t()
        doubles = [[x.double() for x in gradients] for gradients in (a, b)]
        stats = grad_dot_norm(a, b, groups=groups, impl="triton")
        wanted = grad_dot_norm(*doubles, groups=groups, impl="reference")
        torch.testing.assert_close(stats, wanted, rtol=1e-5, atol=1e-3)
        check_combination(a, b, stats, max_angle=90.0, scale=0.5, max_norm=1.0, groups=groups)


if __name__ == "__main__":
    main()
