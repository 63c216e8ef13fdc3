"""SupConLoss of pytorch-metric-learning without its matrices of all pairs."""

from typing import Any

from torch import Tensor

from ...kernels import supcon_loss

try:
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import SupConLoss
    from pytorch_metric_learning.utils.common_functions import (
        labels_or_indices_tuple_required,
        torch_arange_from_size,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "MetricSupConLoss needs pytorch-metric-learning: pip install 'pytorch-metric-learning>=2.8'"
    ) from error


class MetricSupConLoss(SupConLoss):
    """`pytorch_metric_learning.losses.SupConLoss` in memory proportional to the embeddings.

    Same call, options, reducers, regularizers and values: the losses of the anchors come from
    `supcon_loss`, and go to the reducer of the package. Its default temperature is 0.1.

    What needs a matrix of pairs is refused: miners (`indices_tuple`), `ref_emb` (a memory of other
    embeddings), and distances other than CosineSimilarity.

    Args:
        impl: implementation of `supcon_loss`; the other arguments are those of the package.
    """

    def __init__(self, temperature: float = 0.1, *, impl: str = "auto", **kwargs: Any) -> None:
        super().__init__(temperature=temperature, **kwargs)
        found = self.distance
        if (type(found), found.p, found.power) != (CosineSimilarity, 2, 1):
            raise ValueError(
                f"distance={type(found).__name__}(p={found.p}, power={found.power}): "
                "MetricSupConLoss has CosineSimilarity() only. Use the SupConLoss of "
                "pytorch-metric-learning for others."
            )
        self.impl = impl

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Any,
        ref_emb: Tensor,
        ref_labels: Tensor,
    ) -> dict[str, Any]:
        labels_or_indices_tuple_required(labels, indices_tuple)
        if indices_tuple is not None:
            raise ValueError(
                "indices_tuple: MetricSupConLoss contrasts all pairs of a batch, and a miner "
                "chooses some. Leave the miner out, or use the SupConLoss of "
                "pytorch-metric-learning."
            )
        if ref_emb is not embeddings:
            raise ValueError(
                "ref_emb: MetricSupConLoss contrasts a batch with itself. Use the SupConLoss of "
                "pytorch-metric-learning with CrossBatchMemory and the like."
            )
        if len(embeddings) < 2:
            return self.zero_losses()
        losses = supcon_loss(
            embeddings,
            labels,
            temperature=self.temperature,
            denominator="others",
            reduction="none",
            # No label is special here; the largest integer is not a class of anybody.
            ignore_index=2**63 - 1,
            impl=self.impl,
        )
        # The package gives a batch without negatives the loss 0.
        losses = losses * (labels != labels[0]).any()
        indices = torch_arange_from_size(embeddings)
        return {
            "loss": {
                "losses": losses.to(embeddings.dtype),
                "indices": indices,
                "reduction_type": "element",
            }
        }
