"""Suite of the gradient-angle check over the parameters of a BERT.

Tasks: `dot_norm`, the three sums that give the angle; `combine`, the gated combination with
unscaling and clipping, given the sums; `gate`, both. Every provider is compared with float64 of its
own formula: PCGrad is another rule, and unscaling and clipping alone is the least that a float16
step does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....kernels import grad_dot_norm
from ...floors import cpu as cpu_rates
from ...floors.rates import Floor, Rates
from ..suite import Call, Provider, relative_error
from .case import AngleCase, AngleInputs, num_elements
from .providers import COMBINED, PCGRAD, SUMS, WEIGHT, providers

# Task -> lists that move at least: the sums read both, the combination also writes one.
LISTS_MOVED = {"dot_norm": 2, "combine": 3, "gate": 5}
TASKS = tuple(LISTS_MOVED)
# max_norm of the check, so low that clipping takes effect.
CHECKED_NORM = 1.0
OUR_MAX_ERROR = 1e-5
# A float32 norm of 23 million elements may be wrong by some percent.
OTHERS_MAX_ERROR = 5e-2
# Number of tensors whose combination is checked, on copies.
NUM_CHECKED = 3
# Elements per float64 block of the check.
BLOCK = 2**24


class AngleSuite:
    providers = staticmethod(providers)

    def input_bytes(self, case: AngleCase) -> int:
        # While the largest tensor is made, two more of it exist in float32.
        largest = max(num_elements([shape]) for shape in case.shapes)
        return 2 * case.elements * case.torch_dtype.itemsize + 8 * largest

    def check_bytes(self, case: AngleCase) -> int:
        return 8 * 3 * min(BLOCK, case.elements)

    def inputs(self, case: AngleCase, device: torch.device, number: int) -> Sequence[AngleInputs]:
        generator = torch.Generator(device=device).manual_seed(0)
        found = []
        for _ in range(number):
            a, b = [], []
            for shape in case.shapes:
                x, noise = (
                    torch.randn(shape, generator=generator, device=device) for _ in range(2)
                )
                a.append(x.to(case.torch_dtype))
                b.append(noise.add_(x, alpha=0.1).to(case.torch_dtype))
            found.append(AngleInputs(a, b, grad_dot_norm(a, b)))
        return found

    def exact(self, formula: str, case: AngleCase, inputs: AngleInputs) -> list[Tensor]:
        """The sums [3] of all tensors, or the clipped result for the checked ones."""
        if formula == SUMS:
            return [_sums(inputs.a, inputs.b)]
        few = _few(inputs)
        a, b = ([tensor.double() for tensor in tensors] for tensors in (few.a, few.b))
        if formula == PCGRAD:
            return [_pcgrad(_flat(a), _flat(b))]
        weight = WEIGHT if formula == COMBINED else 0.0
        combined = [(1 - weight) * x + weight * y for x, y in zip(a, b, strict=True)]
        factor = (CHECKED_NORM / (_flat(combined).norm() + 1e-6)).clamp(max=1)
        return [x * factor for x in combined]

    def error(self, call: Call, case: AngleCase, inputs: AngleInputs, exact: list[Tensor]) -> float:
        if len(exact) == 1 and exact[0].shape == (3,):
            # Relative to each sum: the dot product is much smaller than the norms.
            found, exact = list(call(inputs).reshape(3)), list(exact[0])
        else:
            few = _few(inputs)
            returned = call(few)
            if isinstance(returned, list):
                returned = _flat(returned)
            found = few.a if len(exact) > 1 else [returned]
        return max(map(relative_error, found, exact))

    def max_error(self, provider: Provider, case: AngleCase) -> float:
        if not provider.is_ours:
            return OTHERS_MAX_ERROR
        if provider.formula == SUMS:
            return OUR_MAX_ERROR
        # A few rounding errors of the result's dtype.
        return max(OUR_MAX_ERROR, 4 * torch.finfo(case.torch_dtype).eps)

    def rate_calls(self, case: AngleCase) -> dict[str, Callable[[], object]]:
        return cpu_rates.memory_rates()

    def rates(self, case: AngleCase, times: Mapping[str, Any]) -> Rates:
        return cpu_rates.rates_from(times, width=0)

    def floor(self, rates: Rates, case: AngleCase) -> Floor:
        moved = LISTS_MOVED[case.task] * case.elements * case.torch_dtype.itemsize
        return Floor(moved / rates.bytes, "memory")

    def shared(self, case: AngleCase) -> bool:
        return True

    def shrunk(self, case: AngleCase) -> AngleCase | None:
        if case.parameters < 2000:
            return None
        return replace(case, parameters=case.parameters // 2)

    def words(self, case: AngleCase) -> str:
        return f"{case.task} of {len(case.shapes)} tensors, {case.elements:,} x 2, {case.dtype}"


def _few(inputs: AngleInputs) -> AngleInputs:
    a, b = inputs.a[-NUM_CHECKED:], inputs.b[-NUM_CHECKED:]
    return AngleInputs([x.clone() for x in a], b, grad_dot_norm(a, b), CHECKED_NORM)


def _sums(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    sums = torch.zeros(3, dtype=torch.float64, device=a[0].device)
    for x, y in zip(a, b, strict=True):
        for u, v in zip(x.reshape(-1).split(BLOCK), y.reshape(-1).split(BLOCK), strict=True):
            u, v = u.double(), v.double()
            sums += torch.stack([u @ v, u @ u, v @ v])
    return sums


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _pcgrad(a: Tensor, b: Tensor) -> Tensor:
    """Sum of both gradients, each without its component that opposes the other."""
    against = (a @ b).clamp(max=0)
    return a - against / (b @ b) * b + b - against / (a @ a) * a


def cases(sizes: Mapping[str, Any]) -> list[AngleCase]:
    """All combinations of `parameters`, `dtypes` and `tasks`."""
    combined = itertools.product(sizes["parameters"], sizes["dtypes"], sizes["tasks"])
    return [AngleCase(task, number, dtype) for number, dtype, task in combined]


SUITE = AngleSuite()
