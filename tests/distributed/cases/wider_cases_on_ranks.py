"""Parts of a wider contrastive batch on several ranks, and their losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contrastive_cases import use_implementation
from fusedacl.kernels.contrastive.wider import pairs
from negatives_cases import group_of
from torch import Tensor
from wider_cases import Problem, differentiate, loss_of

BY_SAMPLE = ("embeddings", "teacher_embeddings", "labels", "ignore_mask")


def own_part(problem: Problem, sizes: list[int], rank: int) -> Problem:
    """The part of one rank: its samples, and an equal share of the memory."""
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = dict(problem)
    for name in BY_SAMPLE:
        if name in found:
            rows = -2 if name.endswith("embeddings") else 0
            found[name] = found[name].movedim(rows, 0)[own].movedim(0, rows)
    temperature = found["temperature"]
    num_samples = sum(sizes)
    if isinstance(temperature, Tensor) and temperature.shape[-1:] == (num_samples,):
        found["temperature"] = temperature[..., own]
    if "memory_labels" in found:
        share = len(found["memory_labels"]) // len(sizes)
        part = slice(rank * share, (rank + 1) * share)
        for name in ("memory_embeddings", "memory_labels"):
            found[name] = found[name][part]
    return found


def wider_on_rank(
    rank: int, problems: list[tuple[Problem, list[int]]], name: str
) -> list[dict[str, Tensor] | None]:
    """Loss and gradients of one rank for every problem; None where it is no member of the group.

    name: an `impl`, computed in float64; "tiled by PyTorch", or "fused", in float32. For "none" the
    objective is that of the documentation: W x (sum over own samples) + (sum over the others).
    """
    impl, dtype = name.partition(" ")[0], torch.float64
    if name == "fused":
        impl, dtype = "triton", torch.float32
    results: list[dict[str, Tensor] | None] = []
    with pytest.MonkeyPatch.context() as patch:
        if name == "tiled by PyTorch":
            patch.setattr(pairs, "compiled_loop_takes", lambda found: False)
        if name == "fused":
            use_implementation(patch, name)
        for problem, sizes in problems:
            group = group_of(len(sizes))
            results.append(None)
            if rank >= len(sizes):
                continue
            own = own_part(problem, sizes, rank)

            def objective(size: int = sizes[rank], ranks: int = len(sizes), **own: Any) -> Tensor:
                loss = loss_of(own)(**own)
                if own["reduction"] != "none":
                    return loss.sum()
                copies = 2 if "teacher_embeddings" in own else 1
                by_copy = loss.unflatten(-1, (copies, -1))
                return ranks * by_copy[..., :size].sum() + by_copy[..., size:].sum()

            results[-1] = differentiate(
                objective, own | {"impl": impl, "process_group": group}, dtype
            )
    return results
