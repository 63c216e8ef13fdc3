"""Batches of the wider losses and their oracle."""

from collections.abc import Callable
from typing import Any

import torch
from contrastive_cases import make_inputs
from fusedacl.kernels import acl_cl_loss, acl_loss, supcon_loss
from torch import Tensor

NUM_CLASSES = 4
# Kinds of labels.
LABELS = ("integers", "ignored", "several", "soft", "rows of zeros", "one class")
# Kinds of temperatures, by the dimensions of the tensor; None: a number.
TEMPERATURES = (None, "scalar", "by sample", "by exit", "by label", "both")

Problem = dict[str, Any]


def make_labels(kind: str, num_rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return integers [N] or memberships [N, NUM_CLASSES]."""
    integers = torch.arange(num_rows) % NUM_CLASSES
    if kind == "integers":
        return integers
    if kind == "ignored":
        return torch.where(torch.arange(num_rows) % 3 == 1, -100, integers)
    if kind == "one class":
        return torch.nn.functional.one_hot(torch.zeros_like(integers), NUM_CLASSES).bool()
    several = torch.rand(num_rows, NUM_CLASSES) < 0.4
    # A class without members.
    several[:, 2] = False
    if kind == "rows of zeros":
        several[::2] = False
    if kind != "soft":
        return several
    return (torch.rand(num_rows, NUM_CLASSES).softmax(1) * several).to(dtype)


def make_temperature(kind: str | None, num_samples: int, exits: int | None) -> dict[str, Any]:
    """Return the temperature and, where the kind has one, the label embeddings' own."""
    if kind is None:
        return {"temperature": 0.3}
    if kind == "scalar":
        return {"temperature": torch.tensor(0.3)}
    if kind == "by label":
        return {"temperature": 0.2, "label_temperature": torch.tensor(0.6)}
    if kind == "by exit" and exits is not None:
        return {"temperature": 0.2 + torch.rand(exits)}
    by_sample = 0.2 + torch.rand(num_samples)
    if kind == "both":
        return {"temperature": by_sample, "label_temperature": 0.4}
    shape = (num_samples,) if exits is None else (1, num_samples)
    return {"temperature": by_sample.view(shape)}


def make_problem(
    num_samples: int = 12,
    labels: str = "integers",
    temperature: str | None = None,
    *,
    label_embeddings: bool = True,
    teacher: bool = False,
    memory: int | None = None,
    class_weights: bool = False,
    mask: bool = False,
    exits: int | None = None,
    width: int = 6,
    **options: Any,
) -> Problem:
    """Return arguments of a loss, float32."""
    inputs = make_inputs(
        num_samples, NUM_CLASSES if label_embeddings else None, width=width, exits=exits,
        teacher=teacher, dtype=torch.float32,
    )  # fmt: skip
    problem: Problem = {**inputs, "labels": make_labels(labels, num_samples), **options}
    problem |= make_temperature(temperature, num_samples, exits)
    if not label_embeddings:
        problem.pop("label_temperature", None)
    if memory is not None:
        problem["memory_embeddings"] = torch.randn(memory, width)
        problem["memory_labels"] = make_labels(labels, memory)
    if class_weights:
        problem["class_weights"] = torch.tensor([1.0, 0.5, 3.0, 0.0])
    if mask:
        problem["ignore_mask"] = torch.arange(num_samples) % 4 == 1
    return problem


def loss_of(problem: Problem) -> Callable[..., Tensor]:
    if "teacher_embeddings" in problem:
        return acl_cl_loss
    return acl_loss if "label_embeddings" in problem else supcon_loss


def differentiate(
    objective: Callable[..., Tensor], problem: Problem, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return a scalar objective of the problem in a dtype, and its gradients by name."""
    arguments = dict(problem)
    trained = {}
    for name, value in problem.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        arguments[name] = value.detach().to(dtype or value.dtype)
        if name in ("embeddings", "label_embeddings", "temperature", "label_temperature"):
            trained[name] = arguments[name].requires_grad_()
    total = objective(**arguments)
    gradients = torch.autograd.grad(total, list(trained.values()))
    return {"loss": total.detach(), **dict(zip(trained, gradients, strict=True))}


def results(problem: Problem, impl: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the loss, and the gradients by name for varied upstreams."""
    losses = []

    def objective(**arguments: Any) -> Tensor:
        losses.append(loss := loss_of(arguments)(**arguments))
        upstream = torch.linspace(0.5, 2.0, max(loss.numel(), 1)).to(loss)[: loss.numel()]
        return (loss * upstream.view_as(loss)).sum()

    found = differentiate(objective, problem | {"impl": impl}, dtype)
    return found | {"loss": losses[0].detach()}


def check(problem: Problem, impl: str) -> None:
    """Compare with the reference in float64: at most twice the error of it in the same dtype.

    Where it happens to be exact, 32 units of the output's dtype allow for sums in another order. A
    loss is a difference of terms of up to 1 / temperature that may cancel, and the gradient of a
    temperature one of 1 / temperature^2: their units are those of the terms.
    """
    exact = results(problem, "reference", torch.float64)
    eager, found = results(problem, "reference"), results(problem, impl)
    num_rows = sum(
        value.shape[-2] for name, value in problem.items() if name.endswith("embeddings")
    )
    num_terms = 1 if problem.get("reduction", "mean") == "mean" else num_rows
    for name, wanted in exact.items():
        got = found[name]
        assert got.shape == wanted.shape
        if wanted.numel() == 0:
            continue
        largest = float(wanted.abs().max())
        if "embeddings" not in name:
            largest = max(largest, num_terms / (0.2 if name == "loss" else 0.2**2))
        allowed = 2 * float((eager[name].double() - wanted).abs().max())
        allowed += 32 * torch.finfo(got.dtype).eps * largest
        error = float((got.double() - wanted).abs().max())
        # `not <=` also catches a NaN.
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
