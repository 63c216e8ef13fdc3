"""The specification against independent loops written from the definition."""

import math
from operator import mul

import pytest
import torch
from fusedacl.kernels import acl_cl_loss, acl_loss, supcon_loss
from torch import Tensor

DENOMINATORS = ("all", "others", "negatives")


def definition(
    rows: list[list[float]], labels: list[int], temperature: float, denominator: str
) -> tuple[list[float], int]:
    """Return L_i of every row and the number of anchors; the label -100 is ignored."""

    def unit(row: list[float]) -> list[float]:
        norm = math.sqrt(math.fsum(x * x for x in row))
        return [0.0 if norm <= 1e-12 else x / norm for x in row]

    z = [unit(row) for row in rows]
    existing = [i for i, label in enumerate(labels) if label != -100]
    losses, num_anchors = [0.0] * len(rows), 0
    for i in existing:
        similarity = {k: math.fsum(map(mul, z[i], z[k])) / temperature for k in existing}
        positives = [j for j in existing if j != i and labels[j] == labels[i]]
        compared = {
            "all": existing,
            "others": [k for k in existing if k != i],
            "negatives": [k for k in existing if labels[k] != labels[i]],
        }[denominator]
        if positives and compared:
            num_anchors += 1
            largest = max(similarity[k] for k in compared)
            total = math.fsum(math.exp(similarity[k] - largest) for k in compared)
            mean = math.fsum(similarity[j] for j in positives) / len(positives)
            losses[i] = largest + math.log(total) - mean
    return losses, num_anchors


def check(
    loss_of: dict[str, Tensor], rows: Tensor, labels: list[int], temperature: float, name: str
) -> None:
    losses, num_anchors = definition(rows.tolist(), labels, temperature, name)
    expected = torch.tensor(losses, dtype=torch.float64)
    torch.testing.assert_close(loss_of["none"], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss_of["sum"], expected.sum(), rtol=1e-12, atol=1e-12)
    mean = expected.sum() / max(num_anchors, 1)
    torch.testing.assert_close(loss_of["mean"], mean, rtol=1e-12, atol=1e-12)


LABELS = {
    "mixed": [0, 1, 0, 2, 1, 0],
    "ignored": [0, -100, 0, 2, -100, 2],
    "one class": [1, 1, 1, 1, 1, 1],
    "singletons": [0, 1, 2, -100, -100, -100],
    "all ignored": [-100] * 6,
}


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize("temperature", [0.5, 0.02, 0.0005])
def test_losses_are_the_definition(labels: list[int], denominator: str, temperature: float) -> None:
    num_labels = 4
    samples, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    label_rows, teacher_label_rows = torch.randn(2, num_labels, 5, dtype=torch.float64)
    samples[2] = 0
    own = list(range(num_labels))
    tensor = torch.tensor(labels)
    options = {"temperature": temperature, "denominator": denominator, "impl": "reference"}
    teachers = (teacher, teacher_label_rows)
    for function, arguments, row_labels in (
        (supcon_loss, (samples, tensor), labels),
        (acl_loss, (samples, tensor, label_rows), labels + own),
        (acl_cl_loss, (samples, tensor, label_rows, *teachers), (labels + own) * 2),
    ):
        rows = torch.cat([rows for rows in arguments if rows is not tensor])
        found = {r: function(*arguments, reduction=r, **options) for r in ("none", "sum", "mean")}
        check(found, rows, row_labels, temperature, denominator)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_is_the_numerical_one(denominator: str, reduction: str) -> None:
    labels = torch.tensor([0, 1, -100, 0, 1])
    samples = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    label_embeddings = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    teacher, teacher_labels = torch.randn(5, 3).double(), torch.randn(2, 3).double()

    def loss(samples: Tensor, label_embeddings: Tensor) -> Tensor:
        return acl_cl_loss(
            samples, labels, label_embeddings, teacher, teacher_labels,
            denominator=denominator, reduction=reduction, impl="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (samples, label_embeddings))
    assert torch.autograd.gradgradcheck(loss, (samples, label_embeddings))


def test_exits_are_computed_as_if_alone() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    samples, label_embeddings = torch.randn(3, 4, 5), torch.randn(3, 2, 5)
    together = acl_loss(samples, labels, label_embeddings, impl="reference")
    alone = [
        acl_loss(x, labels, w, impl="reference")
        for x, w in zip(samples, label_embeddings, strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_vectors_and_ignored_rows_get_gradient_zero(dtype: torch.dtype) -> None:
    samples = torch.randn(5, 4, dtype=dtype)
    samples[1], samples[3] = 0, torch.nan
    samples.requires_grad_()
    loss = supcon_loss(samples, torch.tensor([0, 0, 1, -100, 1]), impl="reference")
    loss.backward()
    assert samples.grad is not None
    assert loss.isfinite()
    assert samples.grad.isfinite().all()
    assert (samples.grad[[1, 3]] == 0).all()
    assert (samples.grad[[0, 2, 4]] != 0).any(1).all()
