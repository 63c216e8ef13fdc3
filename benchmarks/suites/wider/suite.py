"""Time of the wider losses, forward + backward, float32, in turns with what they are compared with.

- Several labels a row (3 of K), a learned temperature and temperatures by row, beside the plain
  loss of the same rows and the dense formula with matrices [M, M].
- A memory of Q rows for N samples, beside its own two matrix products.

Losses and gradients are compared with the reference in float64 before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....engine.runtime.text import text_table
from ....kernels import supcon_loss
from ...measuring.clock import interleave_on, ratio
from ...measuring.environment import CPU
from ...measuring.result_file import ResultFile
from ...measuring.times_table import times_table
from ..suite import WrongResult, bar, describe

TEMPERATURE = 0.1
# Share of the largest value of the reference in float64.
MAX_ERROR = 1e-4
SIZES: dict[str, dict[str, int]] = {
    "full": {"rows": 4096, "width": 64, "classes": 16, "samples": 256, "memory": 16384},
    "quick": {"rows": 192, "width": 16, "classes": 8, "samples": 32, "memory": 256},
}
ROUNDS = {"full": 15, "quick": 3}
WORDS = {
    "plain": "plain loss",
    "several": "several labels a row (3 of K)",
    "learned": "learned temperature",
    "by_row": "temperatures by row",
    "memory": "memory of Q rows",
    "dense_several": "dense formula: several labels",
    "dense_learned": "dense formula: learned temperature",
    "dense_by_row": "dense formula: temperatures by row",
    "dense_memory": "dense formula: memory",
    "products": "matrix products of the memory",
}
# Targets: words, whose time over whose, and the limit with its side.
BARS = (
    ("several labels over plain", "several", "plain", 1.25, "at_most"),
    ("learned temperature over plain", "learned", "plain", 1.15, "at_most"),
    ("temperatures by row over plain", "by_row", "plain", 1.6, "at_most"),
    ("memory over its matrix products", "memory", "products", 1.3, "at_most"),
    ("dense formula over ours, several labels", "dense_several", "several", 10.0, "at_least"),
    ("dense formula over ours, learned temperature", "dense_learned", "learned", 10.0, "at_least"),
    ("dense formula over ours, temperatures by row", "dense_by_row", "by_row", 10.0, "at_least"),
)

Problem = dict[str, Any]


def run(file: ResultFile, *, preset: str, threads: int) -> None:
    """Measure everything; WrongResult if a loss or gradient of ours is wrong."""
    torch.set_num_threads(threads)
    sizes = SIZES[preset]
    problems = make_problems(sizes)
    for name, problem in problems.items():
        check(name, problem)
    calls: dict[str, Callable[[], object]] = {
        name: partial(differentiate, supcon_loss, problem) for name, problem in problems.items()
    }
    for name, problem in problems.items():
        if name != "plain":
            calls[f"dense_{name}"] = partial(differentiate, dense, problem)
    memory = problems["memory"]
    calls["products"] = partial(
        matrix_products, memory["embeddings"].detach(), memory["memory_embeddings"]
    )
    times = interleave_on(CPU, {name: calls[name] for name in WORDS}, rounds=ROUNDS[preset])
    bars = [
        bar(what, ratio(times, slower, faster), limit, bound)
        for what, slower, faster, limit, bound in BARS
    ]
    file.result |= {"threads": threads, "shape": sizes, "times": times, "bars": bars}
    print(times_table(times, text_table, WORDS))
    print(*map(describe, bars), sep="\n")


def make_problems(sizes: dict[str, int]) -> dict[str, Problem]:
    """Return the arguments of the losses by name."""
    made = torch.Generator().manual_seed(0)
    num_rows, width, num_classes = sizes["rows"], sizes["width"], sizes["classes"]

    def rows(number: int) -> Tensor:
        return torch.randn(number, width, generator=made)

    def labels(number: int) -> Tensor:
        return torch.randint(num_classes, (number,), generator=made)

    x, classes = rows(num_rows).requires_grad_(), labels(num_rows)
    several = torch.zeros(num_rows, num_classes, dtype=torch.bool)
    order = torch.rand(num_rows, num_classes, generator=made).argsort(1)[:, :3]
    several.scatter_(1, order, True)
    by_row = TEMPERATURE * (0.8 + 0.4 * torch.rand(num_rows, generator=made))
    plain = {"embeddings": x, "labels": classes, "temperature": TEMPERATURE}
    return {
        "plain": plain,
        "several": plain | {"labels": several},
        "learned": plain | {"temperature": torch.tensor(TEMPERATURE, requires_grad=True)},
        "by_row": plain | {"temperature": by_row.requires_grad_()},
        "memory": {
            "embeddings": rows(sizes["samples"]).requires_grad_(),
            "labels": labels(sizes["samples"]),
            "temperature": TEMPERATURE,
            "memory_embeddings": rows(sizes["memory"]),
            "memory_labels": labels(sizes["memory"]),
        },
    }


def differentiate(loss: Callable[..., Tensor], problem: Problem) -> list[Tensor]:
    """Return the loss and its gradients."""
    trained = [
        value for value in problem.values() if isinstance(value, Tensor) and value.requires_grad
    ]
    value = loss(**problem)
    return [value.detach(), *torch.autograd.grad(value, trained)]


def dense(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    memory_embeddings: Tensor | None = None,
    memory_labels: Tensor | None = None,
) -> Tensor:
    """The same loss with matrices of all pairs, in eager PyTorch."""
    rows, keys = embeddings, labels
    if memory_embeddings is not None and memory_labels is not None:
        rows = torch.cat([embeddings, memory_embeddings])
        keys = torch.cat([labels, memory_labels])
    z = torch.nn.functional.normalize(rows, dim=1)
    scale = 1 / temperature
    if isinstance(scale, Tensor) and scale.dim():
        scale = scale[:, None]
    anchors = z[: embeddings.shape[0]]
    similarity = (anchors @ z.T) * scale
    if labels.dim() == 2:
        shared = labels.to(z.dtype) @ keys.to(z.dtype).T
    else:
        shared = (labels[:, None] == keys).to(z.dtype)
    shared = shared.fill_diagonal_(0)
    total = shared.sum(1)
    losses = similarity.logsumexp(1) - (shared * similarity).sum(1) / total.clamp(min=1)
    is_anchor = total > 0
    return losses.masked_fill(~is_anchor, 0).sum() / is_anchor.sum()


def matrix_products(samples: Tensor, memory: Tensor) -> Tensor:
    """Return the products without which no memory can do: similarities, and their gradient."""
    return (samples @ memory.T) @ memory


def check(name: str, problem: Problem) -> None:
    doubles = {
        key: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in problem.items()
    }
    exact = differentiate(partial(supcon_loss, impl="reference"), doubles)
    for loss in (supcon_loss, dense):
        for wanted, found in zip(exact, differentiate(loss, problem), strict=True):
            error = float((found - wanted).abs().max() / wanted.abs().max())
            if not error <= MAX_ERROR:
                raise WrongResult(f"{WORDS[name]}: wrong by {error:.1e}: not timed")
