"""Parameters sharded by FSDP2 (`fully_shard`): where their gradients lie, sums over all parts.

FSDP2 leaves the reduced part of a gradient in the `.grad` of the sharded parameter, a DTensor.
Before that, while gradients are accumulated without being reduced, they lie in attributes of its
own; those that are used here are the same from torch 2.6 to 2.13.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def fsdp_groups() -> list[Any]:
    """Everything that FSDP2 reduces together, in all models of this process."""
    from torch.distributed._composable_state import _module_state_mapping

    states = dict.fromkeys(reference() for reference in list(_module_state_mapping.values()))
    groups: list[Any] = []
    for state in states:
        # Named in the singular up to torch 2.9.
        several = getattr(state, "_fsdp_param_groups", None)
        groups += [getattr(state, "_fsdp_param_group", None)] if several is None else several
    return [group for group in groups if group is not None]


def whole_parameters(groups: Sequence[Any]) -> dict[Parameter, Parameter]:
    """The gathered parameter, which a graph of a loss ends in -> the sharded one."""
    pairs = [
        (getattr(managed, "_unsharded_param", None), managed.sharded_param)
        for group in groups
        for managed in group.fsdp_params
    ]
    return {whole: sharded for whole, sharded in pairs if whole is not None}


class Shards:
    """The layout of sharded parameters.

    Args:
        parameters: DTensors, all of them.
        groups: the group of each, as for `GradientGate`.

    groups: for `grad_dot_norm` over the parts: those given, apart for each layout.

    Raises:
        ValueError: some parameters are no DTensors, or one is a sum that is still to be taken.
    """

    def __init__(self, parameters: Sequence[Parameter], groups: Sequence[int] | None) -> None:
        # Only here, because it takes seconds.
        from torch.distributed.tensor import DTensor

        self.placements: list[Any] = []
        layouts: list[tuple[Any, tuple[int, ...]]] = []
        for parameter in parameters:
            if not isinstance(parameter, DTensor):
                raise ValueError(
                    "parameters: some are sharded (DTensor), and one of shape "
                    f"{tuple(parameter.shape)} is not, whose gradient nobody would average: call "
                    "fully_shard on the whole model, after its layers, without ignored_params."
                )
            if any(placement.is_partial() for placement in parameter.placements):
                raise ValueError(
                    f"parameters: one is a DTensor placed as {parameter.placements}, a sum that is "
                    "still to be taken: redistribute it (Shard or Replicate)."
                )
            sharded = [
                dimension
                for dimension, placement in enumerate(parameter.placements)
                if not placement.is_replicate()
            ]
            self.placements.append(parameter.placements)
            layouts.append((parameter.device_mesh, tuple(sharded)))
        given = [0] * len(layouts) if groups is None else groups
        self.num_groups = max(given) + 1
        self.layouts = list(dict.fromkeys(layouts))
        self.groups = [
            self.num_groups * self.layouts.index(layout) + group
            for layout, group in zip(layouts, given, strict=True)
        ]
        self._parameters = {id(parameter) for parameter in parameters}
        self._groups: list[Any] = []
        # Gradients of the auxiliary loss that are not reduced yet, by holder and attribute.
        self._waiting: dict[tuple[int, str], Any] = {}

    def find(self, groups: Sequence[Any]) -> None:
        """Note which of the `fsdp_groups` hold the parameters."""
        self._groups = [
            group
            for group in groups
            if any(id(managed.sharded_param) in self._parameters for managed in group.fsdp_params)
        ]

    def exchange(self) -> None:
        """Swap the gradients that are not reduced yet with those of the auxiliary loss."""
        for holder, attribute in self._places():
            kept = self._waiting.pop((id(holder), attribute), None)
            if (found := getattr(holder, attribute)) is not None:
                self._waiting[id(holder), attribute] = found
            if kept is not None or found is not None:
                setattr(holder, attribute, kept)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep weights gathered after a backward pass if they stayed so after the forward pass.

        Otherwise FSDP2 would gather the same weights again.
        """
        kept = [
            g for g in self._groups if g.reshard_after_backward and not g._reshard_after_forward
        ]
        for group in kept:
            group.reshard_after_backward = False
        try:
            yield
        finally:
            for group in kept:
                group.reshard_after_backward = True

    def forget(self) -> None:
        """Drop the gradients of the auxiliary loss that are not reduced yet."""
        self._waiting.clear()

    @property
    def waits(self) -> bool:
        """True if gradients are accumulated that have not been reduced."""
        return bool(self._waiting) or any(
            getattr(holder, attribute) is not None for holder, attribute in self._places()
        )

    def _places(self) -> Iterator[tuple[Any, str]]:
        for group in self._groups:
            yield group, "_partial_reduce_output"
            for managed in group.fsdp_params:
                yield managed, "unsharded_accumulated_grad"
                if (whole := getattr(managed, "_unsharded_param", None)) is not None:
                    yield whole, "grad"

    def parts(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """This process's parts of the gradients, in the same memory."""
        made: list[Tensor | None] = []
        for gradient, placements in zip(gradients, self.placements, strict=True):
            held: Any = gradient
            if held is not None and held.placements != placements:
                raise ValueError(
                    f"A gradient is placed as {held.placements} and its parameter as {placements}: "
                    "parallelize the module so that they agree."
                )
            with torch.no_grad():
                made.append(None if held is None else held.to_local())
        return made

    def total(self, stats: Tensor) -> Tensor:
        """Sums [G, 3] over all parts, from this process's in the groups `groups`. Collective."""
        sums = []
        for index, (mesh, dimensions) in enumerate(self.layouts):
            own = stats[self.num_groups * index : self.num_groups * (index + 1)].double()
            # The last groups may have no parameter of the last layout.
            own = torch.nn.functional.pad(own, (0, 0, 0, self.num_groups - len(own)))
            # Parameters may be offloaded to a host whose mesh communicates between GPUs.
            own = own.to(mesh.device_type)
            for dimension in dimensions:
                torch.distributed.all_reduce(own, group=mesh.get_group(dimension))
            sums.append(own.to(stats.device))
        return torch.stack(sums).sum(0).to(stats)
