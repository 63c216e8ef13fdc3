"""Answers, probabilities and losses of texts that may have several labels."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from fusedacl.engine import MultiExitForSequenceClassification
from fusedacl.engine.model.answers import (
    IGNORED,
    answers_of,
    contrasted_labels,
    cross_entropies,
    probabilities_of,
    same_answers,
    training_loss,
)
from fusedacl.engine.model.saved import load_tokenizer, load_trained
from tiny_runs import save_model
from torch.nn import functional
from transformers import pipeline

LOGITS = torch.tensor([[[2.0, -1.0, 0.5], [-3.0, -0.1, -2.0]], [[0.0, 1.0, -1.0], [4.0, 4.0, 4.0]]])
LABELS = torch.tensor([[True, False, True], [False, False, False]])
MULTI = "multi_label_classification"


def test_answers_and_probabilities() -> None:
    assert answers_of(LOGITS[0], several=False).tolist() == [0, 1]
    answers = answers_of(LOGITS[0], several=True)
    assert torch.equal(answers, LABELS)
    assert answers_of(LOGITS[0], several=True, threshold=0.7).tolist()[0] == [True, False, False]
    exact = torch.tensor([[math.log(0.3 / 0.7) + 1e-6, math.log(0.3 / 0.7) - 1e-6]])
    assert answers_of(exact, several=True, threshold=0.3).tolist() == [[True, False]]
    assert torch.equal(probabilities_of(LOGITS, True), torch.sigmoid(LOGITS))
    assert torch.equal(probabilities_of(LOGITS, False), LOGITS.softmax(-1))
    assert same_answers(answers, LABELS, several=True).tolist() == [True, True]
    assert same_answers(answers, ~LABELS, several=True).tolist() == [False, False]
    one_off = LABELS.clone()
    one_off[1, 2] = True
    assert same_answers(answers, one_off, several=True).tolist() == [True, False]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_cross_entropy_is_that_of_bce_with_logits(smoothing: float) -> None:
    each = cross_entropies(LOGITS, LABELS, label_smoothing=smoothing)
    targets = LABELS.float() * (1 - smoothing) + smoothing / 2
    for index, logits in enumerate(LOGITS):
        expected = torch.nn.BCEWithLogitsLoss()(logits, targets)
        torch.testing.assert_close(each[index].mean(), expected)
    assert each.shape == (2, 2)


def test_an_ignored_text_counts_in_no_loss() -> None:
    labels = torch.cat([LABELS.long(), torch.full((1, 3), IGNORED)])
    logits = torch.cat([LOGITS, torch.randn(2, 1, 3)], dim=1).requires_grad_()
    each = cross_entropies(logits, labels)
    assert each[:, 2].tolist() == [0, 0]
    torch.testing.assert_close(each[:, :2], cross_entropies(LOGITS, LABELS))
    each.sum().backward()
    assert logits.grad is not None and not logits.grad[:, 2].any()
    contrasted = contrasted_labels(labels, "each")
    assert contrasted["positives"] == "each"
    assert contrasted["ignore_mask"].tolist() == [False, False, True]
    assert contrasted["labels"][:2].tolist() == LABELS.tolist()


def test_the_loss_of_a_model(tiny_bert: Path) -> None:
    model = MultiExitForSequenceClassification.from_encoder(
        str(tiny_bert), label_names=["a", "b", "c"], exit_layers=[1, 2], problem_type=MULTI
    ).eval()
    batch = load_tokenizer(str(tiny_bert))(
        ["a good dog", "a cat"], return_tensors="pt", padding=True
    )
    output = model(**batch, labels=LABELS)
    expected = sum(
        functional.binary_cross_entropy_with_logits(logits, LABELS.float())
        for logits in output.exit_logits
    )
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model(**batch, labels=LABELS.float()).loss, expected)
    for labels in (torch.tensor([0, 1]), torch.ones(2, 4)):
        with pytest.raises(ValueError, match=r"zeros and ones, \[2, 3\]"):
            model(**batch, labels=labels)
    with pytest.raises(ValueError, match=r"need problem_type='multi_label_classification'"):
        training_loss(LOGITS, LABELS.float(), several=False)


def test_a_saved_model_keeps_its_problem_type_and_pipelines_know_it(
    tiny_bert: Path, tmp_path: Path
) -> None:
    model = MultiExitForSequenceClassification.from_encoder(
        str(tiny_bert), label_names=["a", "b", "c"], problem_type=MULTI
    )
    directory = save_model(model, tiny_bert, tmp_path / "model")
    loaded = load_trained(str(directory)).eval()
    assert loaded.config.problem_type == MULTI
    text = "a good dog"
    batch = load_tokenizer(str(directory))([text], return_tensors="pt")
    with torch.no_grad():
        expected = torch.sigmoid(loaded(**batch).logits[0]).tolist()
    found = pipeline("text-classification", str(directory))([text], top_k=None)[0]
    scores = {item["label"]: item["score"] for item in found}
    assert [scores[name] for name in "abc"] == pytest.approx(expected, abs=1e-6)
