"""Policies in graphs: the decisions of PyTorch, apart from those that rounding may turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fusedacl.engine import (
    EarlyExit,
    MultiExitConfig,
    MultiExitForSequenceClassification,
    OnnxEarlyExit,
)
from fusedacl.engine.inference.export import command
from fusedacl.engine.inference.export.decisions import clear_texts, unexplained
from fusedacl.engine.inference.export.onnx_early_exit import EXPORT_FILE
from fusedacl.engine.inference.export.onnx_files import differences, write_segments
from fusedacl.engine.inference.export.segments import example_inputs, split
from fusedacl.engine.model.encoder_layers import EncoderLayers
from fusedacl.engine.model.exit_policies import MaximumProbability, make_policy, parse_policy
from fusedacl.engine.runtime.files import write_json
from fusedacl.engine.runtime.manifest import write_manifest
from tiny_runs import BERT_SIZES
from transformers import BertConfig


class Shifts(EncoderLayers):
    """Layers that cost the exporter little: each adds its number to a rotated state."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.implementation = encoder, "eager"

    def context(self, hidden_states: Any, attention_mask: Any, padded: bool) -> dict[str, Any]:
        return {}

    def run(self, layer: int, hidden_states: Any, context: dict[str, Any]) -> Any:
        return hidden_states.roll(layer, dims=-1) * 1.5


def shifting_engine(policy: str) -> EarlyExit:
    """Three exits on `Shifts`, whose answers differ between texts."""
    config = BertConfig(**BERT_SIZES)
    made = MultiExitConfig(config, exit_layers=[1, 2, 3], exit_head="linear", num_labels=3)
    model = MultiExitForSequenceClassification(made)
    model.learned_exit = torch.nn.Linear(32, 1)
    torch.nn.init.normal_(model.learned_exit.weight)
    for head in model.exits:
        torch.nn.init.normal_(head.classifier.weight)
    torch.nn.init.normal_(model.backbone.embeddings.word_embeddings.weight)
    engine = EarlyExit(model, parse_policy(policy))
    engine.layers = Shifts(model.backbone)
    return engine


POLICIES = [
    "patience_confidence:patience=2,threshold=0.7",
    "voting:votes=2",
    "fixed_layer:layer=2",
    "learned:threshold=0.6",
]


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_with_memory_or_a_layer_of_their_own(policy: str, tmp_path: Path) -> None:
    engine = shifting_engine(policy)
    segments = split(engine)
    files = [tmp_path / f"{segment.layer}.onnx" for segment in segments]
    write_segments(engine, segments, files)
    error, num_wrong = differences(engine, segments, files)
    assert error < 1e-5 and num_wrong == 0
    record = {
        "format": 1, "label_names": ["a", "b", "c"], "policy": {},
        "segments": list(map(command.described, segments, files)),
    }  # fmt: skip
    write_json(tmp_path / EXPORT_FILE, record)
    write_manifest(tmp_path, {})
    ids = torch.randint(5, 60, (200, 9))
    mask = (torch.arange(9) < torch.randint(1, 10, (200, 1))).long()
    wanted, found = engine(ids, mask), OnnxEarlyExit(tmp_path)(ids, mask)
    assert found.exit_layers.tolist() == wanted.exit_layers.tolist()
    assert (len(set(found.exit_layers.tolist())) > 1) is (policy != "fixed_layer:layer=2")
    np.testing.assert_allclose(found.probabilities, wanted.probabilities, atol=1e-5)
    # The graphs of one setting beside another setting in PyTorch: only decisions differ.
    others = {"threshold": 0.95, "votes": 3, "layer": 2}
    changed = {name: others.get(name, value) for name, value in engine.policy.parameters.items()}
    for segment in segments:
        segment.policy = make_policy(engine.policy.name, **changed)
    error, num_wrong = differences(engine, segments, files)
    assert error < 1e-5 and (num_wrong > 0) is (policy != "fixed_layer:layer=2")


@torch.no_grad()
def test_rounding_turns_no_clear_decision(tmp_path: Path) -> None:
    engine = shifting_engine("max_probability:threshold=0.7")
    segments = split(engine)
    inputs = example_inputs(engine, 24, 10)
    chances = segments[0](*inputs)[0].softmax(dim=-1).amax(dim=-1)
    # A threshold at the signal of one text, with the others further away than rounding.
    far = (chances[:, None] - chances).abs().fill_diagonal_(1).amin(dim=-1)
    text = int(far.argmax())
    below, above = (MaximumProbability(float(chances[text]) + by) for by in (-1e-5, 1e-5))
    for segment in segments:
        segment.policy = below
    assert (~clear_texts(segments[0], inputs)[0]).nonzero().tolist() == [[text]]
    files = [tmp_path / f"{segment.layer}.onnx" for segment in segments]
    write_segments(engine, segments, files)
    left = segments[0](*inputs)[1]
    for segment in segments:
        segment.policy = above
    assert (segments[0](*inputs)[1] != left).nonzero().tolist() == [[text]]
    assert differences(engine, segments, files)[1] == 0
    # That text may leave at either exit, no other one; texts that leave alike differ in class.
    wrong = unexplained(segments, inputs, torch.where(left, 1, 2), torch.where(left, 2, 1))
    assert (~wrong).nonzero().tolist() == [[text]]
    first = torch.ones_like(left, dtype=torch.int64)
    same_class = clear_texts(segments[0], inputs)[1]
    assert torch.equal(unexplained(segments, inputs, first, first), same_class)
