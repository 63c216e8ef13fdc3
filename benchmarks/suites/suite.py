"""A provider: one way to do what a suite times, what it needs, and why it may not run here."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ...engine.runtime.text import did_you_mean
from ..floors.rates import Floor, Rates

# Of one input set; what it returns is looked at by the suite's check alone.
Call = Callable[[Any], Any]


def _runs_anywhere(case: Any, device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """
    make: of a case and a device, the call that is timed. It imports what it needs.
    formula: what is computed; the call is checked against float64 of it before it is timed.
    extra_bytes: of a case, predicted, beside the inputs.
    obstacle: of a case and a device, why it cannot run here and what to install, or None.
    """

    name: str
    make: Callable[[Any, torch.device], Call]
    formula: str
    extra_bytes: Callable[[Any], int]
    obstacle: Callable[[Any, torch.device], str | None] = _runs_anywhere
    is_ours: bool = False


class Suite(Protocol):
    """What the runner has to know of a suite; its cases are frozen dataclasses."""

    name: str

    def providers(self, case: Any, device: torch.device) -> list[Provider]:
        """All, ours first, those that cannot run here included."""

    def input_bytes(self, case: Any) -> int:
        """Of one input set, predicted."""

    def check_bytes(self, case: Any) -> int:
        """What the comparison with float64 takes beside the inputs."""

    def inputs(self, case: Any, device: torch.device, number: int) -> Sequence[Any]:
        """So many different input sets."""

    def exact(self, formula: str, case: Any, inputs: Any) -> Any:
        """float64 of a formula for one input set."""

    def error(self, call: Call, case: Any, inputs: Any, exact: Any) -> float:
        """The largest error of a call relative to the largest exact value; NaN is infinite."""

    def max_error(self, provider: Provider, case: Any) -> float:
        """From which nothing is timed."""

    def rate_calls(self, case: Any) -> dict[str, Callable[[], object]]:
        """On a CPU: what takes its turns among the providers, for the floor."""

    def rates(self, case: Any, times: Mapping[str, Any]) -> Rates:
        """From the times of `rate_calls`."""

    def floor(self, rates: Rates, case: Any) -> Floor | None:
        """The least time that the rates allow."""

    def shrunk(self, case: Any) -> Any | None:
        """The case at half its size, None where there is none: a size that fits is looked for."""

    def words(self, case: Any) -> str:
        """The case in a line."""


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def missing(module: str, distribution: str) -> str | None:
    """That a package is not installed, with the command that installs it."""
    if installed(module):
        return None
    return f"{distribution} is not installed. Run: pip install {distribution}"


def selected(providers: Iterable[Provider], names: Sequence[str]) -> list[Provider]:
    """Those with these names, in their own order; all of them without names."""
    return [provider for provider in providers if not names or provider.name in names]


def check_names(names: Sequence[str], known: Iterable[str], option: str = "providers") -> None:
    """Refuses what no case of a run knows.

    Raises:
        ValueError: with the nearest name.
    """
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: there is none named {name!r}.{did_you_mean(name, known)}")
