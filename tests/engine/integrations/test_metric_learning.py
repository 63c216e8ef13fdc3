"""MetricSupConLoss has the values of the package that it stands in for."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from fusedacl.engine import MetricSupConLoss
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"reducer": reducers.MeanReducer()},
    {"reducer": reducers.SumReducer()},
    {"reducer": reducers.ThresholdReducer(low=0.5)},
    {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.1},
]
LABELS = {
    "random": torch.arange(24) % 5,
    "single anchors": torch.tensor([0, 1, 1, 2, 3, 3, 3, 4]),
    "any integers": torch.tensor([-100, 7, -100, 7, 123456789, 3]),
    "one class": torch.zeros(6, dtype=torch.int64),
    "no positives": torch.arange(6),
    "one text": torch.zeros(1, dtype=torch.int64),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "defaults")
def test_values_and_gradients_are_those_of_the_package(
    options: dict[str, Any], labels: torch.Tensor
) -> None:
    results = []
    for kind in (MetricSupConLoss, losses.SupConLoss):
        embeddings = torch.randn(
            len(labels), 16, generator=torch.manual_seed(0), dtype=torch.float64
        )
        embeddings.requires_grad_()
        loss = kind(**options)(embeddings, labels)
        (gradient,) = torch.autograd.grad(loss, embeddings, allow_unused=True)
        zeros = torch.zeros_like(embeddings)
        results.append((loss.detach(), zeros if gradient is None else gradient))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_what_needs_a_matrix_of_pairs_is_refused() -> None:
    embeddings, labels = torch.randn(8, 4), torch.arange(8) % 2
    loss = MetricSupConLoss()
    with pytest.raises(ValueError, match="distance=LpDistance"):
        MetricSupConLoss(distance=distances.LpDistance())
    with pytest.raises(ValueError, match="indices_tuple: .*Leave the miner out"):
        loss(embeddings, labels, miners.MultiSimilarityMiner()(embeddings, labels))
    with pytest.raises(ValueError, match="ref_emb: .*contrasts a batch with itself"):
        loss(embeddings, labels, ref_emb=torch.randn(3, 4), ref_labels=torch.arange(3))
    with pytest.raises(ValueError, match="labels"):
        loss(embeddings)


def test_all_public_names_are_imported_without_the_package() -> None:
    code = """
import sys
sys.modules["pytorch_metric_learning"] = None
from fusedacl.engine import *
assert "AngleMonitor" in globals() and "MetricSupConLoss" not in globals()
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
