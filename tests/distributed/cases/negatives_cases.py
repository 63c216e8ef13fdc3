"""Parts of one contrastive batch on several ranks, and their losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import quick_interpreter
import torch
from contrastive_cases import LABELS, Inputs, make_inputs, run, use_implementation
from torch import Tensor, distributed

# For ranks, which import no conftest.py.
quick_interpreter.install()

GROUPS: dict[int, Any] = {}


def group_of(num_ranks: int) -> Any:
    """The group of ranks 0 .. num_ranks - 1; every rank must ask."""
    if num_ranks not in GROUPS:
        GROUPS[num_ranks] = distributed.new_group(list(range(num_ranks)))
    return GROUPS[num_ranks]


def own_part(inputs: Inputs, labels: Tensor, sizes: Sequence[int], rank: int) -> Inputs:
    """The part of one rank in the inputs of all, with its labels."""
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    sliced = {
        name: tensor[..., own, :] if "label" not in name else tensor
        for name, tensor in inputs.items()
    }
    return {**sliced, "labels": labels[own]}


def losses_on_rank(
    rank: int, cases: list[tuple[Any, ...]], name: str = ""
) -> list[list[Tensor] | None]:
    """[loss, gradients] of one rank for every case; None where it is no member of the group.

    name: of `use_implementation`, or the shipped sizes of tiles.
    """
    results: list[list[Tensor] | None] = []
    with pytest.MonkeyPatch.context() as patch:
        use_implementation(patch, name)
        for inputs, labels, sizes, upstreams, options in cases:
            group = group_of(len(sizes))
            if rank >= len(sizes):
                results.append(None)
                continue
            own = own_part(inputs, labels, sizes, rank)
            upstream = None if upstreams is None else upstreams[rank]
            results.append(run(own, own.pop("labels"), upstream, process_group=group, **options))
    return results


def make_case(
    sizes: list[int],
    kind: dict[str, Any],
    layout: str,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float64,
) -> tuple[Any, ...]:
    total = sum(sizes)
    inputs = make_inputs(total, **kind, dtype=dtype)
    labels = LABELS[layout](total, kind["num_labels"] or 3)
    if layout == "random":
        # Sorted: most classes are absent from most ranks.
        labels = labels.sort().values
    inputs["embeddings"][..., 2, :] = 0
    inputs["embeddings"][..., labels == -100, :] = torch.nan
    upstreams: list[Tensor] | None = None
    copies, num_labels = 2 if kind.get("teacher") else 1, kind["num_labels"] or 0
    exits = [kind["exits"]] if kind.get("exits") else []
    if options["reduction"] == "none":
        rows = [copies * (size + num_labels) for size in sizes]
        upstreams = [torch.randn(*exits, number, dtype=torch.float64) for number in rows]
    else:
        upstreams = [torch.randn(exits, dtype=torch.float64)] * len(sizes)
    return inputs, labels, sizes, upstreams, options
