"""Inputs, label layouts and oracles for the tests of every contrastive implementation."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fusedacl.kernels import acl_cl_loss, acl_loss, supcon_loss
from fusedacl.kernels.contrastive import dispatch, reference
from fusedacl.kernels.contrastive.tiled import cpu_loop
from fusedacl.kernels.contrastive.tiled import loss as tiled
from torch import Tensor

# Without a GPU, Triton's interpreter runs the kernels on the CPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DENOMINATORS = ("all", "others", "negatives")
REDUCTIONS = ("mean", "sum", "none")
Inputs = dict[str, Tensor]

LABELS: dict[str, Callable[[int, int], Tensor]] = {
    "random": lambda num, num_labels: torch.randint(num_labels, (num,)),
    "one class": lambda num, num_labels: torch.zeros(num, dtype=torch.int64),
    "absent classes": lambda num, num_labels: torch.arange(num) % 2 * (num_labels - 1),
    "ignored": lambda num, num_labels: torch.where(
        torch.arange(num) % 3 == 1, -100, torch.arange(num) % num_labels
    ),
    "all ignored": lambda num, num_labels: torch.full((num,), -100),
}
# Label embeddings and teacher: arguments of `make_inputs`.
KINDS: list[dict[str, Any]] = [
    {"num_labels": None},
    {"num_labels": 3},
    {"num_labels": 11},
    {"num_labels": 3, "teacher": True},
]


def combine(*factors: Sequence[Any], strength: int = 2) -> list[tuple[Any, ...]]:
    """Choose combinations in which any `strength` values of different factors occur together."""
    choices = random.Random(0)
    numbered = [[(factor, i) for i in range(len(values))] for factor, values in enumerate(factors)]
    missing = set()
    for group in itertools.combinations(numbered, strength):
        missing |= set(itertools.product(*group))
    chosen = []
    while missing:
        meetings = {}
        # Each candidate has some of what is missing, and the best has most of it.
        for wanted in choices.sample(sorted(missing), min(40, len(missing))):
            case = tuple((dict(map(choices.choice, numbered)) | dict(wanted)).items())
            meetings[case] = set(itertools.combinations(case, strength)) & missing
        best = max(meetings, key=lambda case: len(meetings[case]))
        missing -= meetings[best]
        chosen.append(tuple(factors[factor][i] for factor, i in best))
    return chosen


def set_tile(monkeypatch: pytest.MonkeyPatch, tile: int, *, with_epilogue: bool = False) -> None:
    """Compute by tiles of that many rows, also as on a GPU, with Triton kernels for each tile.

    Class sums are computed by a mask only with the shipped tile.
    """
    values = {"TILE": tile, "ONE_TILE": tile * tile, "FEW_ROWS": 128 if tile == 512 else 0}
    if with_epilogue:
        values |= {"GPU_TILE": tile, "ONE_TILE": 0}
        monkeypatch.setattr(tiled, "has_epilogue", lambda tensor: tensor.dtype != torch.float64)
    monkeypatch.setattr(cpu_loop, "compiled_loop", lambda: None)
    for name, value in values.items():
        monkeypatch.setattr(tiled, name, value)


def use_implementation(monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    """Return the `impl` that runs what is meant by one of the names in test_implementations.py."""
    if name.startswith("tiles"):
        on_gpu = name == "tiles on a GPU"
        set_tile(monkeypatch, 48 if on_gpu else 4, with_epilogue=on_gpu)
        return "tiled"
    if name == "triangle":
        if cpu_loop.compiled_loop() is None:
            pytest.skip("the compiled loop was not built: no C compiler at installation")
        monkeypatch.setattr(cpu_loop, "MAX_ROWS", 0)
        return "tiled"
    if not name.startswith(("small", "fused")):
        return name
    monkeypatch.setattr(dispatch, "SMALL_ROWS", 256 if name == "small" else 0)
    if name == "fused":
        from fusedacl.kernels.contrastive.gpu import large_batches, pair_sums, row_steps
        from fusedacl.kernels.contrastive.gpu.tiles import Blocks, Tile

        def small_tiles(capability: int, dtype: torch.dtype, width: int) -> Blocks:
            chunk, output = min(width, 64), min(width, 128)
            return Blocks(Tile(32, 16, chunk, 0, 4, 2), Tile(16, 32, chunk, output, 4, 2))

        # Small batches have several tiles; the interpreter also computes the padded rows.
        monkeypatch.setattr(large_batches, "shipped", small_tiles)
        for module in (pair_sums, row_steps):
            monkeypatch.setattr(module, "PADDED_ROWS", 32)
    return "triton"


def make_inputs(
    num_samples: int,
    num_labels: int | None = None,
    *,
    width: int = 6,
    exits: int | None = None,
    teacher: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Inputs:
    """Make random samples [.., N, d], label embeddings [.., K, d] and teacher rows."""
    leading = () if exits is None else (exits,)
    inputs = {"embeddings": torch.randn(*leading, num_samples, width).to(dtype)}
    if num_labels is not None:
        inputs["label_embeddings"] = torch.randn(*leading, num_labels, width).to(dtype)
    if teacher and num_labels is not None:
        inputs["teacher_embeddings"] = torch.randn(num_samples, width).to(dtype)
        inputs["teacher_label_embeddings"] = torch.randn(num_labels, width).to(dtype)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def loss_function(inputs: Inputs) -> Callable[..., Tensor]:
    if "teacher_embeddings" in inputs:
        return acl_cl_loss
    return acl_loss if "label_embeddings" in inputs else supcon_loss


def run(inputs: Inputs, labels: Tensor, upstream: Tensor | None, **options: Any) -> list[Tensor]:
    """Return loss and gradients of the trained inputs for an upstream gradient (None: ones)."""
    copies = {
        name: tensor.detach()
        .clone(memory_format=torch.preserve_format)
        .requires_grad_(not name.startswith("teacher"))
        for name, tensor in inputs.items()
    }
    loss = loss_function(inputs)(labels=labels, **copies, **options)
    trained = [tensor for tensor in copies.values() if tensor.requires_grad]
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, trained, upstream)]


def check_error(
    inputs: Inputs,
    labels: Tensor,
    upstream: Tensor | None = None,
    *,
    impl: str = "triton",
    eager_in_float32: bool = False,
    leeway: float = 1.0,
    **options: Any,
) -> list[Tensor]:
    """Compare loss and gradients of `impl` with float64: at most twice eager PyTorch's error.

    Eager PyTorch computes in the dtype of the inputs or, if asked for, in float32. The largest
    error of each output counts: no wrong row is averaged away. Eager's error differs between
    processors and may happen to be 0, so a floor allows what follows from the number formats:

        half a unit in the last place of the dtype in which eager computes,
        8 units of the output's dtype, for sums in another order, and
        in gradients 2 units of float32 / temperature: s, up to 1 / temperature, is rounded as a
        product and when it is scaled, and so is log D, which makes that the relative error of
        exp(s - log D), the weights of a gradient.

    A loss is a difference of terms of up to 1 / temperature that may cancel: its units are those of
    its terms. leeway: factor of all that is allowed.
    """
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    exact = run(doubles, labels, upstream, impl="reference", **options)
    if eager_in_float32:
        eager = run(inputs, labels, upstream, impl="reference", **options)
        input_rounding = torch.finfo(torch.float32).eps
    else:
        # Every tensor, also [M, M], has the dtype of the inputs.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "accumulate_dtype", lambda *dtypes: dtypes[0])
            eager = run(inputs, labels, upstream, impl="reference", **options)
        input_rounding = torch.finfo(inputs["embeddings"].dtype).eps
    found = run(inputs, labels, upstream, impl=impl, **options)
    num_terms = 1
    if options.get("reduction") == "sum":
        num_terms = sum(tensor.shape[-2] for tensor in inputs.values())
    temperature = options.get("temperature", 0.5)
    single = torch.finfo(torch.float32).eps
    of_inputs = [tensor.dtype for name, tensor in inputs.items() if "teacher" not in name]
    of_loss = torch.float64 if torch.float64 in of_inputs else torch.float32
    assert [tensor.dtype for tensor in found] == [of_loss, *of_inputs]
    for index, (wanted, same_dtype, got) in enumerate(zip(exact, eager, found, strict=True)):
        assert got.shape == wanted.shape
        if wanted.numel() == 0:
            continue
        largest = wanted.abs().max()
        units = max(8 * torch.finfo(got.dtype).eps, 0.5 * input_rounding)
        if index == 0:
            largest = largest.clamp(min=num_terms / temperature)
        else:
            units = max(units, 2 * single / temperature)
        allowed = 2 * (same_dtype.double() - wanted).abs().max() + units * largest
        allowed *= leeway
        error = (got.double() - wanted).abs().max()
        # `not <=` also catches a NaN.
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    return found
