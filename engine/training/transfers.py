"""Copies between the host and the device for which neither waits, and the time of the device."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Parcel:
    """Some tensors, packed into one [n] float64, and what to do when they are on the host."""

    packed: Tensor
    arrival: torch.cuda.Event | None
    shapes: dict[str, torch.Size]
    others: dict[str, Any]
    use: Callable[[dict[str, Any]], None]

    def has_arrived(self) -> bool:
        return self.arrival is None or self.arrival.query()

    def open(self) -> None:
        if self.arrival is not None:
            self.arrival.synchronize()
        # One read of all; a read per value would be counted as a wait each.
        numbers = iter(self.packed.tolist())
        values = {
            name: [next(numbers) for _ in range(shape.numel())] if shape else next(numbers)
            for name, shape in self.shapes.items()
        }
        self.use(values | self.others)


class PendingValues:
    """Values on their way to the host, which are used in the order in which they were sent.

    On a GPU each set of values is copied to pinned memory behind the computations that make it;
    on a CPU it has arrived as soon as it is sent.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parcels: deque[_Parcel] = deque()

    def send(self, values: Mapping[str, Any], use: Callable[[dict[str, Any]], None]) -> None:
        """Start the copy of the tensors among the values; `collect` calls `use` with all values.

        Tensors [] become numbers, tensors [N] lists of numbers, in float64: True becomes 1.0.
        """
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in values.items() if name not in tensors}
        # One tensor, because each copy to the host has a cost of its own.
        packed = torch.cat(
            [tensor.detach().to(self._device).double().reshape(-1) for tensor in tensors.values()]
        )
        arrival = None
        if packed.is_cuda:
            on_host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            packed = on_host.copy_(packed, non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record()
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._parcels.append(_Parcel(packed, arrival, shapes, others, use))

    def collect(self, *, wait: bool = False) -> None:
        """Use the values that have arrived; with `wait`, all that were sent."""
        while self._parcels and (wait or self._parcels[0].has_arrived()):
            self._parcels.popleft().open()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; a copy from memory that is not pinned would wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Stopwatch:
    """Seconds that the device takes from here to `stop`; on a CPU those of the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._mark()
        self._stop = self._start

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        self._stop = self._mark()

    def seconds(self) -> float:
        """Known once the device has come to `stop`."""
        if self._device.type != "cuda":
            return self._stop - self._start
        return self._start.elapsed_time(self._stop) / 1000
