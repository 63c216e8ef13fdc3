"""Options, sentence pairs, classifier and losses of the loops in this folder."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import torch
from fusedacl.engine.data.quickstart import quickstart_splits
from fusedacl.kernels import acl_loss
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer


def parser_of_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name_or_path", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--max_steps", type=int, default=50)
    parser.add_argument("--per_device_train_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--max_seq_length", type=int, default=96)
    parser.add_argument("--local_rank", type=int, help="of the launcher of DeepSpeed")
    torch.manual_seed(0)
    return parser


class Classifier(nn.Module):
    def __init__(self, name: str, num_labels: int = 3) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(name)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, num_labels)

    def forward(self, **batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Representations, logits, label embeddings (of which sharded models free the weight)."""
        embeddings = self.encoder(**batch).last_hidden_state[:, 0].clone()  # FSDP2 warns of views
        return embeddings, self.classifier(embeddings), self.classifier.weight * 1.0


def losses(outputs: tuple[Tensor, Tensor, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    embeddings, logits, label_embeddings = outputs
    main = nn.functional.cross_entropy(logits.float(), labels)
    return main, acl_loss(embeddings, labels, label_embeddings)


def batches(
    options: argparse.Namespace, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """The batches of a process: of MRPC if FUSEDACL_DATA names it, else of the embedded pairs."""
    file = Path(os.environ.get("FUSEDACL_DATA", "")) / "mrpc" / "train.parquet"
    if file.exists():
        rows = pyarrow.parquet.read_table(file).to_pylist()
    else:
        rows = quickstart_splits()["train"]
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    size = options.per_device_train_batch_size
    for step in range(options.max_steps):
        first = (step * world_size + rank) * size
        chosen = [rows[(first + number) % len(rows)] for number in range(size)]
        texts = [(row["sentence1"], row["sentence2"]) for row in chosen]
        encoded = tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=options.max_seq_length,
            return_tensors="pt",
        )
        yield dict(encoded), torch.tensor([row["label"] for row in chosen])
