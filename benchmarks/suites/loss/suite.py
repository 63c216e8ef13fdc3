"""Suite of the contrastive loss, forward + backward.

A case is `supcon_loss` of one batch [M, d], or `acl_loss` or `acl_cl_loss` of N samples and K label
embeddings for E exits in one call. Providers differ in which rows the denominator and the mean
include; the loss and gradient of each are compared with float64 of its own formula.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...floors import cpu as cpu_rates
from ...floors.loss import loss_floor
from ...floors.rates import Floor, Rates
from ..suite import Call, Provider
from .case import LossCase, LossInputs
from .exact import (
    BLOCK_PAIRS,
    SIGMOIDS,
    Exact,
    error_of,
    exact_in_blocks,
    sigmoids_in_blocks,
)
from .providers import TEMPERATURE, providers

# Relative to float64. Ours only rounds its result to the dtype; the others compute in the dtype.
OUR_MAX_ERROR = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-5}
OUR_MAX_ERROR_GPU = OUR_MAX_ERROR | {torch.float32: 1e-4}
# A call of fewer rows is over before another process gets the core.
SHARED_ROWS = 4096
OTHERS_MAX_ERROR = {torch.float16: 5e-2, torch.bfloat16: 5e-2, torch.float32: 1e-3}


class LossSuite:
    providers = staticmethod(providers)

    def input_bytes(self, case: LossCase) -> int:
        rows = case.exits * case.num_rows * case.width * case.torch_dtype.itemsize
        # Twice: random float32 numbers exist before they are rounded.
        return 2 * rows + 8 * case.samples

    def check_bytes(self, case: LossCase) -> int:
        block = min(case.num_rows**2, BLOCK_PAIRS)
        return 8 * (3 * block + 6 * case.num_rows * case.width)

    def inputs(self, case: LossCase, device: torch.device, number: int) -> Sequence[LossInputs]:
        generator = torch.Generator().manual_seed(0)
        leading = (case.exits,) if case.exits > 1 else ()

        def rows(num_rows: int, *leading: int) -> list[Tensor]:
            # All sets share one block of memory.
            shape = (number, *leading, num_rows, case.width)
            return list(torch.randn(shape, generator=generator).to(device, case.torch_dtype))

        samples = rows(case.samples, *leading)
        labels = torch.randint(case.classes, (number, case.samples), generator=generator).to(device)
        label_rows: list[Any] = [None] * number
        if case.loss != "supcon":
            label_rows = rows(case.classes, *leading)
        teachers: list[Any] = [()] * number
        if case.loss == "acl_cl":
            teachers = list(zip(rows(case.samples), rows(case.classes), strict=True))
        upstream = [float(case.num_rows)] * number
        found = list(map(LossInputs, samples, labels, label_rows, upstream, teachers))
        for leaf in (leaf for inputs in found for leaf in inputs.leaves):
            leaf.requires_grad_()
        return found

    def exact(self, formula: str, case: LossCase, inputs: LossInputs) -> list[Exact]:
        """Loss and gradient of each exit."""
        labels = _row_labels(inputs, case)
        exact: Callable[..., Exact] = (
            sigmoids_in_blocks if formula == SIGMOIDS else partial(exact_in_blocks, formula=formula)
        )
        return [
            exact(
                torch.cat([rows, *inputs.teachers]), labels, temperature=TEMPERATURE,
                num_trained=case.num_trained,
            )
            for rows in _rows(inputs.leaves)
        ]  # fmt: skip

    def error(self, call: Call, case: LossCase, inputs: LossInputs, exact: list[Exact]) -> float:
        losses, *gradients = call(inputs)
        by_exit = zip(losses.reshape(-1), _rows(gradients), exact, strict=True)
        return max(
            error_of(loss, gradient, inputs.upstream, wanted) for loss, gradient, wanted in by_exit
        )

    def max_error(self, provider: Provider, case: LossCase) -> float:
        if not provider.is_ours:
            return OTHERS_MAX_ERROR[case.torch_dtype]
        limits = OUR_MAX_ERROR_GPU if torch.cuda.is_available() else OUR_MAX_ERROR
        return limits[case.torch_dtype]

    def rate_calls(self, case: LossCase) -> dict[str, Callable[[], object]]:
        return cpu_rates.machine_rates(case.width)

    def rates(self, case: LossCase, times: Mapping[str, Any]) -> Rates:
        return cpu_rates.rates_from(times, case.width)

    def floor(self, rates: Rates, case: LossCase) -> Floor | None:
        share = case.num_trained / case.num_rows
        found = loss_floor(rates, case.num_rows, case.width, case.torch_dtype, share)
        return None if found is None else replace(found, seconds=case.exits * found.seconds)

    def shared(self, case: LossCase) -> bool:
        return case.num_rows >= SHARED_ROWS

    def shrunk(self, case: LossCase) -> LossCase | None:
        if max(case.samples, case.classes) < 4:
            return None
        if case.loss != "supcon" and case.classes > case.samples:
            return replace(case, classes=case.classes // 2)
        return replace(case, samples=case.samples // 2)

    def words(self, case: LossCase) -> str:
        if case.loss == "supcon":
            shape = f"M={case.samples} d={case.width}"
        else:
            shape = f"E={case.exits} N={case.samples} K={case.classes} d={case.width}"
        return f"{case.loss}_loss {shape} {case.dtype}"


def _rows(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Rows [M, d] of each exit: samples, then label embeddings."""
    by_exit = [leaf.detach().reshape(-1, *leaf.shape[-2:]) for leaf in leaves]
    return [torch.cat(of_exit) for of_exit in zip(*by_exit, strict=True)]


def _row_labels(inputs: LossInputs, case: LossCase) -> Tensor:
    if inputs.label_embeddings is None:
        return inputs.labels
    own = torch.cat([inputs.labels, torch.arange(case.classes, device=inputs.labels.device)])
    return own.repeat(case.num_rows // case.num_trained)


def cases(sizes: Mapping[str, Any]) -> list[LossCase]:
    """All combinations; `rows` belong to supcon, `samples`, `classes` and `exits` to the others."""
    found: list[LossCase] = []
    if "supcon" in sizes["losses"]:
        found += [
            LossCase("supcon", rows, width, 16)
            for rows, width in itertools.product(sizes["rows"], sizes["widths"])
        ]
    others = [loss for loss in sizes["losses"] if loss != "supcon"]
    found += [
        LossCase(loss, sizes["samples"], sizes["widths"][0], num, num_exits)
        for loss, num_exits, num in itertools.product(others, sizes["exits"], sizes["classes"])
    ]
    return [replace(case, dtype=dtype) for case in found for dtype in sizes["dtypes"]]


SUITE = LossSuite()
