"""The protocol of a suite and of its providers, and what suites share: peak memory, bars."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels.contrastive.tiled import cpu_triangle
from ..floors.rates import Floor, Rates
from ..measuring.environment import CPU, Result
from ..measuring.memory import HighWaterMark

# Takes one input set; only the suite's check looks at what it returns.
Call = Callable[[Any], Any]


class WrongResult(Exception):
    """Something of ours computes a wrong result, so that nothing is timed."""


@dataclass(frozen=True)
class Provider:
    """One implementation of what a suite times.

    make: (case, device) -> the call to time. It imports the packages that it needs.
    formula: what is computed; the call is compared with float64 of it before it is timed.
    extra_bytes: case -> predicted memory beside the inputs.
    obstacle: (case, device) -> why it cannot run here and what to install, or None.
    """

    name: str
    make: Callable[[Any, torch.device], Call]
    formula: str
    extra_bytes: Callable[[Any], int]
    obstacle: Callable[[Any, torch.device], str | None] = lambda case, device: None
    is_ours: bool = False


class Suite(Protocol):
    """Everything that the runner asks of a suite; its cases are frozen dataclasses."""

    def providers(self, case: Any, device: torch.device) -> list[Provider]:
        """All providers, ours first, including those that cannot run here."""

    def input_bytes(self, case: Any) -> int:
        """Predicted size of one input set."""

    def check_bytes(self, case: Any) -> int:
        """Predicted memory of the comparison with float64, beside the inputs."""

    def inputs(self, case: Any, device: torch.device, number: int) -> Sequence[Any]:
        """`number` different input sets."""

    def exact(self, formula: str, case: Any, inputs: Any) -> Any:
        """Result of a formula in float64 for one input set."""

    def error(self, call: Call, case: Any, inputs: Any, exact: Any) -> float:
        """Largest error of a call relative to the largest exact value; infinite for NaN."""

    def max_error(self, provider: Provider, case: Any) -> float:
        """Largest error with which a provider is still timed."""

    def rate_calls(self, case: Any) -> dict[str, Callable[[], object]]:
        """On a CPU: calls that take turns with the providers, to measure the rates."""

    def rates(self, case: Any, times: Mapping[str, Any]) -> Rates:
        """Rates from the times of `rate_calls`."""

    def floor(self, rates: Rates, case: Any) -> Floor | None:
        """Lower bound of the time at these rates."""

    def shared(self, case: Any) -> bool:
        """True if the case is also timed while another process keeps a core busy."""

    def shrunk(self, case: Any) -> Any | None:
        """The case at half its size, None if it cannot shrink."""

    def words(self, case: Any) -> str:
        """The case as one line of text."""


def peak_bytes(suite: Suite, name: str, case: Any) -> int:
    """Bytes by which one call of the provider `name` raises this process's memory, on the CPU."""
    mark = HighWaterMark()
    makers = {provider.name: provider.make for provider in suite.providers(case, CPU)}
    call = makers[name](case, CPU)
    (inputs,) = suite.inputs(case, CPU, 1)
    # The first call loads libraries, compiles, starts threads and allocates workspaces.
    call(inputs)
    # Memory that the loss keeps for its next call counts too.
    cpu_triangle.spare.clear()
    return mark.raised_by(lambda: call(inputs))


def bar(what: str, value: float, limit: float, bound: str = "at_most") -> Result:
    """A value and its target, which is reported but not enforced; bound: at_most or at_least."""
    met = value <= limit if bound == "at_most" else value >= limit
    return {"what": what, "value": float(value), bound: limit, "met": bool(met)}


def describe(bar: Result) -> str:
    """A bar as one line of text."""
    bound = "at_most" if "at_most" in bar else "at_least"
    words = f"{bound.replace('_', ' ')} {bar[bound]}: {'yes' if bar['met'] else 'no'}"
    return f"{bar['what']}: {bar['value']:.2f} ({words})"


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest error relative to the largest exact value; infinite for NaN."""
    error = float(((found.to(exact.dtype) - exact).abs().max() / exact.abs().max()).detach())
    return math.inf if math.isnan(error) else error


def flat_gradient(loss: Tensor, parameters: Sequence[Tensor], retain_graph: bool = True) -> Tensor:
    gradients = torch.autograd.grad(
        loss, parameters, retain_graph=retain_graph, materialize_grads=True
    )
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def missing(module: str, distribution: str) -> str | None:
    """A message with the command that installs a package, None if it is installed."""
    if importlib.util.find_spec(module) is not None:
        return None
    return f"{distribution} is not installed. Run: pip install {distribution}"
