"""A loss for the trainer of sentence-transformers, over all labels of a batch."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import SupConLoss


class SentenceSupConLoss(nn.Module):
    """Supervised contrastive loss for `SentenceTransformerTrainer`.

        loss = SentenceSupConLoss(model, temperature=0.1)
        SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss).train()

    The data set has one column of texts, or several (the texts of a row share its class), and the
    column `label` of integers. Every text of a batch is contrasted with every other;
    `BatchSamplers.GROUP_BY_LABEL` gives each of them a positive. Memory grows with the number of
    texts, not its square.

    Args:
        model: the SentenceTransformer.
        gather_across_devices: contrast the texts of all processes.
        options: temperature, denominator, reduction and others of `SupConLoss`.

    Raises:
        ValueError: the batch has no labels, or several per row that are not zeros and ones; a
            mistake in the options.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float | Tensor = 0.1,
        *,
        gather_across_devices: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model = model
        self.gather_across_devices = gather_across_devices
        self.loss = SupConLoss(temperature=temperature, **options)

    def forward(
        self, sentence_features: Iterable[Mapping[str, Tensor]], labels: Tensor | None
    ) -> Tensor:
        """Loss of the texts of each column, tokenized.

        labels: the classes of the rows [N], or zeros and ones [N, K].
        """
        if labels is None:
            raise ValueError(
                "SentenceSupConLoss needs the class of each row: a column named 'label' with "
                "integers, or several as zeros and ones."
            )
        if labels.dim() == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        elif labels.dim() == 2 and labels.dtype != torch.bool:
            wrong = labels[(labels != 0) & (labels != 1)]
            if len(wrong):
                raise ValueError(
                    f"labels has the value {wrong[0].item()}: it must hold zeros and ones, "
                    f"{list(labels.shape)}, or one class per row."
                )
            labels = labels.bool()
        columns = [self.model(features)["sentence_embedding"] for features in sentence_features]
        if self.gather_across_devices and torch.distributed.is_initialized():
            # Not in the constructor: the trainer may join the processes later.
            self.loss.process_group = torch.distributed.group.WORLD
        return self.loss(torch.cat(columns), torch.cat([labels] * len(columns)))

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        options = {**self.loss.options, "gather_across_devices": self.gather_across_devices}
        del options["process_group"]
        return {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in options.items()
            if value is not None
        }

    @property
    def citation(self) -> str:
        """The paper of the loss, for the model card."""
        return """
@inproceedings{khosla2020supervised,
    title={Supervised Contrastive Learning},
    author={Khosla, Prannay and Teterwak, Piotr and Wang, Chen and Sarna, Aaron and others},
    booktitle={Advances in Neural Information Processing Systems},
    year={2020},
}
"""
