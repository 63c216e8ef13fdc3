"""Arguments that the wider losses refuse, with the words of each refusal."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusedacl.kernels import ACLLoss, SupConLoss, acl_loss, supcon_loss
from fusedacl.kernels.contrastive.dispatch import Workload, choose
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

X, W = torch.randn(4, 3), torch.randn(2, 3)
INTEGERS = torch.tensor([0, 1, 0, 1])
SEVERAL = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.5, 0.0]])
with FakeTensorMode():
    FAKE = torch.ones(4)
MEMORY = {"memory_embeddings": torch.randn(5, 3), "memory_labels": torch.tensor([0, 1, 1, 0, 1])}


def supcon(labels: Tensor = INTEGERS, x: Tensor = X, **options: Any) -> Callable[[], Tensor]:
    return lambda: supcon_loss(x, labels, **options)


def acl(labels: Tensor = INTEGERS, x: Tensor = X, **options: Any) -> Callable[[], Tensor]:
    return lambda: acl_loss(x, labels, W, **options)


def at(tensor: Tensor, place: Any, value: float) -> Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


VALUE_ERRORS = {
    r"labels\[1, 0\] is -1\.0: memberships must be finite": supcon(at(SEVERAL, (1, 0), -1.0)),
    r"labels\[2, 1\] is nan": acl(at(SEVERAL, (2, 1), torch.nan)),
    r"labels has 3 columns, but label_embeddings has K = 2": acl(torch.rand(4, 3)),
    r"labels has shape \(2, 2\): .* or a row of memberships, \[4, K\]": supcon(torch.rand(2, 2)),
    r"labels has shape \(4, 1\) and torch.int64: one label a row": supcon(INTEGERS[:, None]),
    r"temperature\[2\] is 0\.0: temperatures must be finite numbers > 0": supcon(
        temperature=at(torch.ones(4), 2, 0.0)
    ),
    r"temperature\[1, 3\] is nan": supcon(
        x=X.expand(3, 4, 3), temperature=at(torch.ones(3, 4), (1, 3), torch.nan)
    ),
    r"temperature is -1\.0: temperatures must be finite": supcon(temperature=torch.tensor(-1.0)),
    r"temperature has shape \(3,\): .* it must be \[\] or \[4\]": supcon(temperature=torch.ones(3)),
    r"temperature has shape \(4,\), and E = N = 4": supcon(
        x=X.expand(4, 4, 3), temperature=torch.ones(4)
    ),
    r"label_temperature is 0: it must be a finite number": acl(label_temperature=0),
    r"label_temperature has shape \(4,\)": acl(label_temperature=torch.ones(4)),
    "memory_labels is missing": supcon(memory_embeddings=X),
    "memory_embeddings is missing": supcon(memory_labels=INTEGERS),
    r"memory_embeddings has shape \(5, 2\): .*\[Q, 3\]": supcon(
        memory_embeddings=torch.randn(5, 2), memory_labels=MEMORY["memory_labels"]
    ),
    r"memory_labels has 4 rows and memory_embeddings 5": supcon(
        memory_embeddings=MEMORY["memory_embeddings"], memory_labels=INTEGERS
    ),
    "memory_labels holds 7, but label_embeddings has K = 2 rows": acl(
        **MEMORY | {"memory_labels": torch.tensor([0, 1, 7, 0, 1])}
    ),
    "labels holds 1, but class_weights has K = 1 numbers": supcon(class_weights=torch.ones(1)),
    r"class_weights has shape \(3,\): .* \[2\]": acl(class_weights=torch.ones(3)),
    r"class_weights\[1\] is -2\.0": acl(class_weights=torch.tensor([1.0, -2.0])),
    "class_weights requires a gradient": acl(class_weights=torch.ones(2, requires_grad=True)),
    "^labels requires a gradient": acl(SEVERAL.clone().requires_grad_()),
    "memory_labels requires a gradient": supcon(
        **MEMORY | {"memory_labels": torch.rand(5, 2, requires_grad=True)}
    ),
    r"ignore_mask has shape \(3,\): .*\[4\]": supcon(ignore_mask=torch.zeros(3) > 0),
    "ignore_mask is on meta": supcon(ignore_mask=torch.zeros(4, device="meta") > 0),
    "memory_embeddings is on meta": supcon(
        **MEMORY | {"memory_embeddings": torch.randn(5, 3, device="meta")}
    ),
    "temperature is on meta": supcon(temperature=torch.ones(4, device="meta")),
    "positives is 'any': it must be one of overlap, each": supcon(SEVERAL, positives="any"),
    "temperature is empty: there is no sample": acl(INTEGERS[:0], X[:0], temperature=torch.ones(0)),
}
TYPE_ERRORS = {
    "labels is torch.float32: positives='each' makes every label": supcon(
        SEVERAL, positives="each"
    ),
    "temperature is torch.int64: it must be a tensor of floats": supcon(
        temperature=torch.tensor(1)
    ),
    "label_temperature must be a Python number or a tensor": acl(label_temperature="0.1"),
    "memory_embeddings must be a torch.Tensor, not list": supcon(
        memory_embeddings=[], memory_labels=INTEGERS
    ),
    "memory_embeddings is torch.float64 and embeddings is torch.float32": supcon(
        **MEMORY | {"memory_embeddings": torch.randn(5, 3).double()}
    ),
    "memory_labels is torch.float32: labels must be integers": supcon(
        **MEMORY | {"memory_labels": torch.rand(5)}
    ),
    "temperature is a FakeTensor, which has no memory": supcon(temperature=FAKE),
    "class_weights must be a tensor of floats": supcon(class_weights=[1.0, 2.0]),
    "ignore_mask must be a tensor of bools, not torch.int64": supcon(ignore_mask=INTEGERS),
}


@pytest.mark.parametrize("message", VALUE_ERRORS)
def test_values_that_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VALUE_ERRORS[message]()


@pytest.mark.parametrize("message", TYPE_ERRORS)
def test_types_that_are_refused(message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TYPE_ERRORS[message]()


def test_who_computes_is_said(caplog: pytest.LogCaptureFixture) -> None:
    needs = ("a tensor as temperature",)
    with pytest.raises(ValueError, match="impl='triton' cannot run: .*a tensor as temperature"):
        choose("triton", Workload(torch.device("cuda"), needs=needs))
    assert choose("auto", Workload(torch.device("cuda"), num_rows=34, needs=needs)) == "tiled"
    assert choose("auto", Workload(torch.device("cpu"), needs=needs)) == "tiled"


def test_small_temperatures_are_computed_in_float64() -> None:
    x = torch.randn(6, 3)
    labels = torch.arange(6) % 2
    temperature = torch.full((6,), 0.005)
    loss = supcon_loss(x, labels, temperature=temperature)
    exact = supcon_loss(x.double(), labels, temperature=0.005, impl="reference")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact.float())
    with pytest.raises(ValueError, match="below 1 / 690"):
        supcon_loss(x, labels, temperature=temperature / 10, impl="tiled")


def test_modules_train_their_temperature_and_move_their_tensors() -> None:
    module = ACLLoss(
        temperature=nn.Parameter(torch.tensor(0.4)), class_weights=torch.tensor([1.0, 2.0])
    )
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    loss = module(X, INTEGERS, W, **MEMORY, ignore_mask=torch.arange(4) == 2)
    loss.backward()
    assert module.temperature.grad != 0
    expected = acl_loss(
        X, INTEGERS, W, temperature=0.4, class_weights=torch.tensor([1.0, 2.0]), **MEMORY,
        ignore_mask=torch.arange(4) == 2,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    assert module.to("meta").class_weights.device.type == "meta"
    with pytest.raises(TypeError, match="label_temperature: SupConLoss has no label embeddings"):
        SupConLoss(label_temperature=0.5)
