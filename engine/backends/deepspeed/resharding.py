"""The optimizer's state of a run, cut anew for another number of processes.

Every process saves its parts of the parameters with their places in them. DeepSpeed's universal
checkpoint rests on the same idea, but needs DeepSpeed's own checkpoint and a conversion in between;
here any process reads from the files of all processes what it will hold.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

from .gradients import ZeroGradients


class Place(NamedTuple):
    """Place of a part of a parameter.

    The elements [start, start + length) of the flattened parameter lie at `offset` of the flattened
    master, whose moments are entry `entry` of the optimizer's `state_dict`.
    """

    name: str
    start: int
    length: int
    master: int
    offset: int
    entry: int


def places(gradients: ZeroGradients, optimizer: torch.optim.Optimizer) -> list[Place]:
    """The parts that this process holds, in the order of `gradients.pieces`."""
    names = {id(p): name for name, p in gradients.engine.module.named_parameters()}
    updated = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    entries = {id(master): entry for entry, master in enumerate(updated)}
    masters = gradients.masters()
    return [
        Place(
            names[id(piece.parameter)], piece.start, piece.length, piece.group, piece.offset,
            entries[id(masters[piece.group])],
        )
        for piece in gradients.pieces
    ]  # fmt: skip


@torch.no_grad()
def load_parts(gradients: ZeroGradients, saved: Sequence[dict[str, Any]]) -> None:
    """Set masters and moments to those of a run of other processes.

    Args:
        saved: `DeepSpeedBackend.state_dict` of each of them. Only what this process needs is read,
            so the tensors may be memory-mapped files.

    Raises:
        ValueError: they do not hold all parameters that are trained now.
    """
    if saved[0]["layout"]["stage"] == 0:
        # Every process had everything.
        saved = saved[:1]
    found = defaultdict(list)
    for state in saved:
        for fields in state["places"]:
            place = Place(*fields)
            found[place.name].append((place, state))
    masters = gradients.masters()
    with gradients.wrapped_optimizer() as optimizer:
        made: dict[int, dict[str, Any]] = {}
        for piece, place in zip(gradients.pieces, places(gradients, optimizer), strict=True):
            master, num_copied = masters[place.master], 0
            for source, state in found[place.name]:
                first = max(place.start, source.start)
                length = min(place.start + place.length, source.start + source.length) - first
                if length <= 0:
                    continue
                to = slice(place.offset + first - place.start, None)
                of = slice(source.offset + first - source.start, None)
                values = state["masters"][source.master]
                master.data.view(-1)[to][:length].copy_(values.view(-1)[of][:length])
                entry = made.setdefault(place.entry, {})
                for name, value in state["optimizer"]["state"].get(source.entry, {}).items():
                    if not torch.is_tensor(value) or value.shape != values.shape:
                        # The number of steps, which all parts of a group have in common.
                        entry[name] = value
                        continue
                    moment = entry.setdefault(name, torch.zeros_like(master.data))
                    moment.view(-1)[to][:length].copy_(value.view(-1)[of][:length])
                num_copied += length
            size = getattr(piece.parameter, "ds_numel", piece.parameter.numel())
            if num_copied < min(place.length, size - place.start):
                raise ValueError(
                    f"The checkpoint's optimizer does not hold the whole of {place.name!r}: it "
                    "belongs to a run that trained other parameters."
                )
        state = optimizer.state_dict()
        state["state"] = {entry: values for entry, values in made.items() if values}
        for group, before in zip(
            state["param_groups"], saved[0]["optimizer"]["param_groups"], strict=True
        ):
            group |= {name: value for name, value in before.items() if name != "params"}
        optimizer.load_state_dict(state)
