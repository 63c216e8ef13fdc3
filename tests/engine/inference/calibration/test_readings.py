"""Reading all exits in one pass, and the errors."""

from __future__ import annotations

import pytest
import torch
from fusedacl.engine import MultiExitForSequenceClassification
from fusedacl.engine.data.batching import EncodedSplit
from fusedacl.engine.inference.calibration.learned_exit import with_learned_exit
from fusedacl.engine.inference.calibration.readings import ExitReadings, read_exits


def test_a_part_of_the_texts_reads_as_in_the_whole(exit_readings: ExitReadings) -> None:
    readings = with_learned_exit(exit_readings)
    rows = torch.tensor([5, 0, 17])
    part = readings.subset(rows)
    assert len(part) == 3 and torch.equal(part.labels, readings.labels[rows])
    assert torch.equal(part.at(1).logits, readings.at(1).logits[rows])
    assert torch.equal(part.at(1).certainty, readings.at(1).certainty[rows])
    assert torch.equal(part.embeddings, readings.embeddings[:, rows])
    mask = torch.zeros(len(readings), dtype=torch.bool)
    mask[rows] = True
    assert torch.equal(readings.subset(mask).lengths, readings.lengths[rows.sort().values])
    # The certainty of the last exit is not read.
    assert readings.at(3).certainty is None


def test_the_embeddings_are_what_the_learned_exit_reads(
    exit_model: MultiExitForSequenceClassification,
    exit_texts: EncodedSplit,
    exit_readings: ExitReadings,
) -> None:
    with torch.inference_mode():
        start, end = exit_texts.offsets[:2]
        ids = torch.from_numpy(exit_texts.tokens[start:end]).long()[None]
        output = exit_model(ids)
    torch.testing.assert_close(exit_readings.embeddings[:, :1], output.exit_embeddings[:-1])
    assert read_exits(exit_model, exit_texts, 16, pad_token_id=0).embeddings is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(
    exit_model: MultiExitForSequenceClassification, exit_texts: EncodedSplit, value: float
) -> None:
    with torch.no_grad():
        exit_model.exits[1].classifier.weight[0, 0] = value
    with pytest.raises(FloatingPointError, match="layer 2 has NaN .* for 80 of 80 texts"):
        read_exits(exit_model, exit_texts, 16, pad_token_id=0)


def test_mistakes(exit_model: MultiExitForSequenceClassification, exit_texts: EncodedSplit) -> None:
    unlabelled = EncodedSplit(**{**vars(exit_texts), "labels": None})
    with pytest.raises(ValueError, match="has no labels"):
        read_exits(exit_model, unlabelled, 16, pad_token_id=0)
