"""Loss, gradient check and combination captured in a CUDA graph and replayed with other data."""

import pytest
import torch
from fusedacl.kernels import acl_loss, gated_combine_, grad_dot_norm
from torch import Tensor

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("num_samples", [32, 700])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_replay_equals_eager(dtype: torch.dtype, num_samples: int) -> None:
    inputs = torch.randn(num_samples, 24, device=DEVICE, dtype=dtype)
    labels = torch.randint(3, (num_samples,), device=DEVICE)
    parameters = [
        torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
        for shape in ((24, 48), (3, 48))
    ]
    scale = torch.tensor(0.5, device=DEVICE)

    def step() -> list[Tensor]:
        weight, label_embeddings = parameters
        hidden = torch.tanh(inputs @ weight)
        logits = (hidden @ label_embeddings.t()).float()
        main = torch.nn.functional.cross_entropy(logits, labels)
        auxiliary = acl_loss(hidden, labels, label_embeddings)
        auxiliary_gradients = torch.autograd.grad(auxiliary, parameters, retain_graph=True)
        main_gradients = torch.autograd.grad(main, parameters)
        stats = grad_dot_norm(main_gradients, auxiliary_gradients)
        used = gated_combine_(
            main_gradients, auxiliary_gradients, stats, weight=0.3, scale=scale, max_norm=0.1
        )
        return [main.detach(), auxiliary.detach(), stats, used, *main_gradients]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    for seed in range(3):
        torch.manual_seed(seed)
        inputs.copy_(torch.randn(num_samples, 24))
        labels.copy_(torch.randint(3, (num_samples,)))
        scale.fill_(0.1 + seed)
        disturb_tables()
        expected = step()
        graph.replay()
        for found, wanted in zip(captured, expected, strict=True):
            torch.testing.assert_close(found, wanted)


def disturb_tables() -> None:
    """Fill the tables of the kernels with other lists; the graph must have kept its own."""
    keep = []
    for size in range(1, 30):
        a = [torch.randn(size, device=DEVICE) for _ in range(2)]
        keep.append(a)
        gated_combine_(a, a, grad_dot_norm(a, a), weight=0.5)
    for _ in range(30):
        a = [torch.randn(24, 48, device=DEVICE), torch.randn(3, 48, device=DEVICE)]
        keep.append(a)
        grad_dot_norm(a, a)
