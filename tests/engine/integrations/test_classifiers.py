"""Finding the classifier of any model of transformers, and what it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine import ACLTrainer
from fusedacl.engine.integrations.classifiers import Classifiers
from peft import LoraConfig, get_peft_model
from torch import nn
from trainer_cases import arguments, collate, exit_model, plain_model, rows, steps, trainer_of
from transformers import AutoConfig, AutoModelForSequenceClassification

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
# How the layer that answers is called in each family.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta": ("classifier.out_proj", {}),
    "distilbert": ("classifier", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}),
    "electra": ("classifier.out_proj", {"embedding_size": 16}),
    "deberta-v2": ("classifier", {"pooler_hidden_size": 16}),
    "modernbert": ("classifier", {}),
    "albert": ("classifier", {"embedding_size": 16}),
    "gpt2": ("score", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    "llama": ("score", {"num_key_value_heads": 2}),
}


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family][1]})
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = model_of(family).eval()
    classifiers = Classifiers(model)
    wanted = model.get_submodule(FAMILIES[family][0])
    assert classifiers.linears == [wanted]
    batch = collate(rows(4))
    del batch["labels"]
    output = dict(model(**batch))
    (read,) = classifiers.take(output)
    again = nn.functional.linear(read.inputs, read.weight, wanted.bias)
    assert read.inputs.shape == (4, 16)
    torch.testing.assert_close(again, output["logits"])
    if family == "albert":
        with pytest.raises(ValueError, match="Use all or head"):
            classifiers.top_parameters(1)
    else:
        assert len(classifiers.top_parameters(1)) >= 4
    classifiers.remove()
    with torch.no_grad():
        assert type(model(**batch)) is not dict


def test_a_decoder_is_trained_by_its_last_token(tmp_path: Path) -> None:
    trainer = trainer_of(model_of("llama"), tmp_path, max_steps=2)
    trainer.train()
    assert all(0 < step["angle_degrees"] < 180 for step in steps(trainer))


@pytest.mark.parametrize("multi_exit", [False, True])
def test_adapters(tiny_bert: Path, tmp_path: Path, multi_exit: bool) -> None:
    kept = {"modules_to_save": ["exits"]} if multi_exit else {}
    settings = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], **kept)
    base = (exit_model if multi_exit else plain_model)(tiny_bert)
    model = get_peft_model(base, settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_of(model, tmp_path, max_steps=2)
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    head = "exits" if multi_exit else "classifier"
    assert moved and all("lora" in name or f"{head}.modules_to_save" in name for name in moved)
    assert any(head in name for name in moved)


class Scaled(nn.Module):
    """A model whose logits are not those of its classifier."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config, self.base_model = inner, inner.config, inner.base_model

    def forward(self, **batch: Any) -> Any:
        output = self.inner(**batch)
        output.logits = 2 * output.logits
        return output


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 32, 1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv1d(hidden[..., None], self.weight)[..., 0]


def test_models_without_label_embeddings_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    unusual = plain_model(tiny_bert)
    unusual.classifier = Convolution()
    with pytest.raises(ValueError, match="BertFor.* has no linear classifier with num_labels=3"):
        trainer_of(unusual, tmp_path)
    other_width = plain_model(tiny_bert)
    other_width.classifier = nn.Linear(32, 5)
    with pytest.raises(ValueError, match=r"its linear layers: classifier \(5 outputs\)"):
        trainer_of(other_width, tmp_path)
    with pytest.raises(ValueError, match="logits are not the output of its linear classifier"):
        scaled = Scaled(plain_model(tiny_bert))
        trainer_of(scaled, tmp_path, remove_unused_columns=False).train()
    with pytest.raises(TypeError, match="Linear is not a model of transformers"):
        ACLTrainer(nn.Linear(2, 2), arguments(tmp_path), train_dataset=rows(6))
    for change in ({"problem_type": "multi_label_classification"}, {"num_labels": 1}):
        config = AutoConfig.from_pretrained(tiny_bert, **change)
        model = AutoModelForSequenceClassification.from_config(config)
        with pytest.raises(ValueError, match="needs one class of several"):
            trainer_of(model, tmp_path)
    adapted = get_peft_model(
        plain_model(tiny_bert), LoraConfig(target_modules=["query", "classifier"])
    )
    with pytest.raises(ValueError, match="Name it in modules_to_save"):
        trainer_of(adapted, tmp_path)
    adapted = get_peft_model(
        exit_model(tiny_bert), LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    )
    with pytest.raises(ValueError, match=r"Set modules_to_save=\['exits'\]"):
        trainer_of(adapted, tmp_path)
    tuples = plain_model(tiny_bert)
    tuples.config.return_dict = False
    with pytest.raises(ValueError, match="return_dict = True"):
        trainer_of(tuples, tmp_path).train()
