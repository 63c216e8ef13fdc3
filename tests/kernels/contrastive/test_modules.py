"""The losses as modules are the functions, bit for bit."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusedacl.kernels import ACLCLLoss, ACLLoss, SupConLoss, acl_cl_loss, acl_loss, supcon_loss
from torch import Tensor, nn

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.1, "denominator": "others", "reduction": "sum", "ignore_index": 1},
    {"denominator": "negatives", "reduction": "none", "impl": "reference"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["defaults", "others", "negatives"])
@pytest.mark.parametrize(
    ("module", "function", "num_tensors"),
    [(SupConLoss, supcon_loss, 0), (ACLLoss, acl_loss, 1), (ACLCLLoss, acl_cl_loss, 3)],
)
def test_values_and_gradients_are_those_of_the_function(
    module: type[nn.Module], function: Callable[..., Tensor], num_tensors: int, options: Any
) -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    beside = [torch.randn(size, 5) for size in (3, 7, 3)][:num_tensors]
    results = []
    for loss in (module(**options), lambda *tensors: function(*tensors, **options)):
        embeddings = torch.randn(7, 5, generator=torch.manual_seed(1)).requires_grad_()
        value = loss(embeddings, labels, *beside)
        value.sum().backward()
        results.append((value.detach(), embeddings.grad))
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)


def test_a_module_shows_its_options_and_has_no_state() -> None:
    loss = SupConLoss(temperature=0.1)
    assert repr(loss) == (
        "SupConLoss(temperature=0.1, denominator='all', reduction='mean', ignore_index=-100, "
        "impl='auto', pair_memory=67108864, positives='overlap')"
    )
    assert not loss.state_dict()
    assert pickle.loads(pickle.dumps(loss)).temperature == 0.1


def test_mistakes_are_refused_by_the_constructor() -> None:
    with pytest.raises(ValueError, match="temperature is 0: it must be a finite number > 0"):
        SupConLoss(temperature=0)
    with pytest.raises(ValueError, match="did you mean 'others'"):
        ACLLoss(denominator="other")
    with pytest.raises(TypeError, match="ignore_index must be an int"):
        ACLCLLoss(ignore_index=1.5)  # type: ignore[arg-type]
