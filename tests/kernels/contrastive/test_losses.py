"""The public functions: accepted arguments, refused arguments and their messages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusedacl.kernels import acl_cl_loss, acl_loss, supcon_loss
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

X, W = torch.randn(4, 3), torch.randn(2, 3)
Y = torch.tensor([0, 1, 1, 0])
with FakeTensorMode():
    FAKE = torch.ones(4, 3)


def test_shapes_of_the_results() -> None:
    exits_x, exits_w = torch.randn(5, 4, 3), torch.randn(5, 2, 3)
    for impl in ("reference", "tiled", "auto"):
        for function, plain, exits, num_rows in (
            (supcon_loss, (X, Y), (exits_x, Y), 4),
            (acl_loss, (X, Y, W), (exits_x, Y, exits_w), 6),
            (acl_cl_loss, (X, Y, W, X, W), (exits_x, Y, exits_w, X, W), 12),
        ):
            for reduction in ("mean", "sum"):
                assert function(*plain, reduction=reduction, impl=impl).shape == ()
                assert function(*exits, reduction=reduction, impl=impl).shape == (5,)
            assert function(*plain, reduction="none", impl=impl).shape == (num_rows,)
            assert function(*exits, reduction="none", impl=impl).shape == (5, num_rows)


def test_ignore_index_may_be_any_label() -> None:
    """A row with the ignored label has no effect, whether the label is a valid class or not."""
    for ignored in (1, -1, 255):
        labels = torch.where(Y == 1, ignored, Y)
        expected = supcon_loss(X[Y == 0], Y[Y == 0])
        torch.testing.assert_close(supcon_loss(X, labels, ignore_index=ignored), expected)
        rows = torch.cat([X[Y == 0], W])
        expected = supcon_loss(rows, torch.tensor([0, 0, 0, 1]))
        torch.testing.assert_close(acl_loss(X, labels, W, ignore_index=ignored), expected)


Call = Callable[[], Tensor]


def supcon(*arguments: Any, **options: Any) -> Call:
    return lambda: supcon_loss(*(arguments or (X, Y)), **options)


def acl(*arguments: Any, **options: Any) -> Call:
    return lambda: acl_loss(*arguments, **options)


def acl_cl(*arguments: Any) -> Call:
    return lambda: acl_cl_loss(X, Y, W, *arguments)


VALUE_ERRORS = {
    "temperature is 0: it must be a finite number > 0": supcon(temperature=0),
    "temperature is -0.5:": supcon(temperature=-0.5),
    "temperature is nan:": supcon(temperature=float("nan")),
    "denominator is 'other': .*did you mean 'others'": supcon(denominator="other"),
    "reduction is 'avg': it must be one of mean, sum, none": supcon(reduction="avg"),
    "impl is 'tile': .*did you mean 'tiled'": supcon(impl="tile"),
    "impl='triton' cannot run: the tensors are on the cpu": supcon(impl="triton"),
    r"embeddings has shape \(4,\): it must be \[N, d\]": supcon(X[:, 0], Y),
    r"embeddings has shape \(4, 0\): the width d must be at least 1": supcon(X[:, :0], Y),
    r"labels has shape \(3,\): .* one label per sample, \[4\]": supcon(X, Y[:3]),
    r"labels has shape \(4, 1\)": supcon(X, Y[:, None]),
    "labels is on meta and embeddings on cpu: move": supcon(X, Y.to("meta")),
    r"label_embeddings has shape \(1, 2, 3\): .* needs \[K, d\]": acl(X, Y, W[None]),
    r"label_embeddings has shape \(2, 3\): .* \[E, K, d\] with E = 2": acl(X.expand(2, 4, 3), Y, W),
    r"label_embeddings has shape \(3, 2, 3\): .*E = 2": acl(
        X.expand(2, 4, 3), Y, W.expand(3, 2, 3)
    ),
    "label_embeddings has width 2 and embeddings width 3": acl(X, Y, W[:, :2]),
    "label_embeddings has no rows": acl(X, Y, W[:0]),
    r"labels holds 2, but label_embeddings has K = 2 rows: .*\[0, 2\)": acl(X, Y + 1, W),
    "labels holds -1, .*ignore_index = -100": acl(X, Y - 1, W),
    r"teacher_embeddings has shape \(3, 3\): .*\[4, 3\]": acl_cl(X[:3], W),
    r"teacher_embeddings has shape \(1, 4, 3\): .*without an exit": acl_cl(X[None], W),
    r"teacher_label_embeddings has shape \(4, 3\): .*\[2, 3\]": acl_cl(X, X),
}
TYPE_ERRORS = {
    "temperature must be a Python number or a tensor of floats, not str": supcon(temperature="1"),
    "temperature must be a Python number or a tensor of floats, not bool": supcon(temperature=True),
    "ignore_index must be an int, not float": supcon(ignore_index=-100.0),
    "embeddings must be a torch.Tensor, not list": supcon(X.tolist(), Y),
    "embeddings is torch.int64: it must be float16": supcon(X.long(), Y),
    "labels is torch.float32: labels must be integers": supcon(X, Y.float()),
    "labels is torch.bool: labels must be integers": supcon(X, Y > 0),
    "label_embeddings is torch.float64 and embeddings is torch.float32: convert": acl(
        X, Y, W.double()
    ),
    "teacher_embeddings must be a torch.Tensor, not NoneType": acl_cl(None, W),
    "teacher_label_embeddings must be a torch.Tensor, not NoneType": acl_cl(X, None),
    "label_embeddings must be a torch.Tensor, not NoneType": acl(X, Y, None),
    "^embeddings is a FakeTensor, which has no memory": supcon(FAKE, Y),
    "^labels is a TwoTensor, which has no memory": supcon(X, TwoTensor(Y, Y)),
    r"label_embeddings is a TwoTensor, .*\.full_tensor\(\)": acl(X, Y, TwoTensor(W, W)),
}


@pytest.mark.parametrize("message", VALUE_ERRORS)
def test_values_that_are_refused(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        VALUE_ERRORS[message]()


@pytest.mark.parametrize("message", TYPE_ERRORS)
def test_types_that_are_refused(message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TYPE_ERRORS[message]()


@pytest.mark.parametrize("impl", ["reference", "tiled", "triton"])
def test_a_teacher_is_a_constant_even_where_it_asks_for_a_gradient(impl: str) -> None:
    """A loss of a frozen student has no graph, even if the teacher was not detached."""
    teacher, teacher_labels = X.clone().requires_grad_(), W.clone().requires_grad_()
    loss = acl_cl_loss(X, Y, W, teacher, teacher_labels, impl=impl)
    assert not loss.requires_grad
    student = X.clone().requires_grad_()
    loss = acl_cl_loss(student, Y, W, teacher, teacher_labels, impl=impl)
    (loss + teacher.sum()).backward()
    assert student.grad is not None
    assert (teacher.grad == 1).all() and teacher_labels.grad is None
