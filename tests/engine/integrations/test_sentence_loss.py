"""SentenceSupConLoss under the trainer of sentence-transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from fusedacl.engine import SentenceSupConLoss
from fusedacl.kernels import supcon_loss
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.sentence_transformer import modules

TEXTS = ["the good dog", "a bad cat", "good old bird", "the bad river"] * 4


@pytest.fixture
def embedder(tiny_bert: Path) -> SentenceTransformer:
    word = modules.Transformer(str(tiny_bert))
    pooling = modules.Pooling(word.get_embedding_dimension())
    return SentenceTransformer(modules=[word, pooling], device="cpu").eval()


@pytest.mark.parametrize("columns", [1, 2])
def test_the_trainer_lowers_it(embedder: SentenceTransformer, tmp_path: Path, columns: int) -> None:
    table: dict[str, Any] = {f"text{index}": TEXTS for index in range(columns)}
    data = Dataset.from_dict({**table, "label": [index % 2 for index in range(len(TEXTS))]})
    arguments = Arguments(
        str(tmp_path),
        num_train_epochs=4,
        learning_rate=3e-3,
        per_device_train_batch_size=8,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model=embedder, args=arguments, train_dataset=data, loss=SentenceSupConLoss(embedder)
    )
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[-1] < found[0] - 0.1
    embedder.save_pretrained(str(tmp_path / "saved"))


def test_the_rows_are_all_texts_of_the_batch(embedder: SentenceTransformer) -> None:
    features = [embedder.preprocess(TEXTS[:3]), embedder.preprocess(TEXTS[1:4])]
    labels = torch.tensor([[0], [1], [0]])
    found = SentenceSupConLoss(embedder, temperature=0.2)(features, labels)
    rows = torch.cat([embedder(part)["sentence_embedding"] for part in features])
    expected = supcon_loss(rows, torch.tensor([0, 1, 0, 0, 1, 0]), temperature=0.2)
    torch.testing.assert_close(found, expected)


def test_several_labels_are_zeros_and_ones(embedder: SentenceTransformer) -> None:
    features = [embedder.preprocess(TEXTS[:3])]
    labels = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 0, 0]])
    loss = SentenceSupConLoss(embedder)
    expected = supcon_loss(
        embedder(features[0])["sentence_embedding"], labels.bool(), temperature=0.1
    )
    torch.testing.assert_close(loss(features, labels), expected)
    with pytest.raises(ValueError, match="labels has the value 2: it must hold zeros and ones"):
        loss(features, labels + 1)


def test_mistakes_are_refused(embedder: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="a column named 'label'"):
        SentenceSupConLoss(embedder)([], None)
    with pytest.raises(ValueError, match="temperature is 0"):
        SentenceSupConLoss(embedder, temperature=0)
    assert SentenceSupConLoss(embedder).get_config_dict() == {
        "temperature": 0.1,
        "denominator": "all",
        "reduction": "mean",
        "ignore_index": -100,
        "impl": "auto",
        "pair_memory": 64 * 2**20,
        "positives": "overlap",
        "gather_across_devices": False,
    }
