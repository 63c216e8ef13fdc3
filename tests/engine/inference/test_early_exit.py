"""Early exit: the same answers at any batch size and order, and its costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fusedacl.engine import MultiExitConfig, MultiExitForSequenceClassification
from fusedacl.engine.data.batching import EncodedSplit, collate
from fusedacl.engine.model import exit_policies
from fusedacl.engine.model.early_exit import EarlyExit, certainty_of, early_exit
from fusedacl.engine.model.exit_policies import (
    ExitReading,
    FixedLayer,
    MaximumProbability,
    Policy,
    make_policy,
    stored_policy,
)
from fusedacl.engine.model.flops import exit_flops, full_flops
from tiny_runs import random_texts
from torch import Tensor, nn
from transformers import BertConfig, DistilBertConfig, ModernBertConfig, RobertaConfig

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
BACKBONES = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "distilbert": DistilBertConfig(
        dim=32, n_layers=5, n_heads=2, hidden_dim=48, vocab_size=60, pad_token_id=1
    ),
    "modernbert": ModernBertConfig(
        **SIZES, local_attention=4, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3
    ),
}
# Settings under which some texts of the random models leave and some stay.
POLICIES = [
    ("max_probability", {"threshold": 0.5}),
    ("entropy", {"threshold": 0.9}),
    ("patience", {"patience": 2}),
    ("patience_confidence", {"patience": 2, "threshold": 0.45}),
    ("voting", {"votes": 2}),
    ("learned", {"threshold": 0.5}),
    ("fixed_layer", {"layer": 3}),
]
NUM_TEXTS = 60


def multi_exit_model(
    backbone: str = "bert", exit_head: str = "linear", exit_layers: tuple[int, ...] = (1, 2, 3, 5)
) -> MultiExitForSequenceClassification:
    torch.manual_seed(0)
    config = MultiExitConfig(
        BACKBONES[backbone], exit_layers=exit_layers, exit_head=exit_head, num_labels=3
    )
    model = MultiExitForSequenceClassification(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Random encoders give similar states for all texts; larger embeddings separate them.
        words = model.backbone.get_input_embeddings().weight
        words.copy_(torch.randn(words.shape, generator=generator))
    return model


def one_by_one(
    model: MultiExitForSequenceClassification, encoded: EncodedSplit, policy: Policy
) -> tuple[list[int], list[int]]:
    """Expected answers and layers, from the plain model, one text at a time."""
    answers, layers = [], []
    for row in range(len(encoded)):
        batch = collate(encoded, [row], 1)
        output = model(batch["input_ids"], batch["attention_mask"])
        memory: dict[str, Tensor] = {}
        for place, layer in enumerate(model.exit_layers):
            logits, last = output.exit_logits[place], layer == model.exit_layers[-1]
            certainty = None
            if policy.needs_learned_exit:
                certainty = certainty_of(model.learned_exit, output.exit_embeddings[place])
            leaving, memory = policy.leaves(ExitReading(layer, logits, certainty), memory)
            if leaving or last:
                answers.append(int(logits.argmax()))
                layers.append(layer)
                break
    return answers, layers


def test_no_policy_is_left_out() -> None:
    assert {name for name, _ in POLICIES} == set(exit_policies.POLICIES)


@torch.inference_mode()
@pytest.mark.parametrize("exit_head", ["linear", "mha"])
@pytest.mark.parametrize(("name", "parameters"), POLICIES)
def test_batches_do_not_matter(exit_head: str, name: str, parameters: dict[str, Any]) -> None:
    model, encoded = multi_exit_model(exit_head=exit_head), random_texts(NUM_TEXTS, 30)
    width = model.label_embeddings.shape[-1]
    model.learned_exit = nn.Linear(width, 1)
    with torch.no_grad():
        model.learned_exit.weight.copy_(torch.randn(1, width))
    policy = make_policy(name, **parameters)
    answers, layers = one_by_one(model, encoded, policy)
    if name != "fixed_layer":
        # Otherwise the test would show nothing.
        assert len(set(layers)) > 1, (name, np.bincount(layers))
    alone = None
    for batch_size in (1, 7, 256):
        for repack in (False, True):
            output = early_exit(
                model, encoded, name, batch_size=batch_size, repack=repack, **parameters
            )
            assert output.predictions.tolist() == answers
            assert output.exit_layers.tolist() == layers
            alone = output if alone is None else alone
            # Other batches have other padding, which changes the rounding only.
            torch.testing.assert_close(output.probabilities, alone.probabilities, rtol=0, atol=1e-6)
            assert torch.equal(output.flops, alone.flops)


@torch.inference_mode()
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("repack", [False, True])
def test_families_and_orders(backbone: str, repack: bool) -> None:
    model, encoded = multi_exit_model(backbone, "mha"), random_texts(NUM_TEXTS, 30)
    policy = MaximumProbability(0.45)
    answers, layers = one_by_one(model, encoded, policy)
    order = np.random.default_rng(0).permutation(NUM_TEXTS)
    shuffled = encoded.take(order)
    output = EarlyExit(model, policy).predict(shuffled, 16, pad_token_id=1, repack=repack)
    assert output.predictions.tolist() == [answers[i] for i in order]
    assert output.exit_layers.tolist() == [layers[i] for i in order]


@torch.inference_mode()
def test_nobody_leaves_early_is_the_full_model() -> None:
    model, encoded = multi_exit_model("roberta"), random_texts(20, 30)
    batch = collate(encoded, range(20), 1)
    batch.pop("labels")
    output = early_exit(model, batch, MaximumProbability(1.0))
    expected = model(**batch).logits.softmax(dim=-1)
    torch.testing.assert_close(output.probabilities, expected, rtol=0, atol=1e-6)
    assert output.mean_layer == 5
    # The earlier exits were computed without effect.
    assert 1 < output.flops_share < 1.1
    last = early_exit(model, batch, "fixed_layer", layer=5)
    torch.testing.assert_close(last.probabilities, expected, rtol=0, atol=1e-6)
    assert last.flops_share == 1


@torch.inference_mode()
def test_layers_run_for_the_texts_that_need_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoded = multi_exit_model(), random_texts(30, 30)
    policy = MaximumProbability(0.5)
    engine = EarlyExit(model, policy)
    run, seen = engine.layers.run, {}

    def counted(layer: int, hidden: Tensor, context: dict[str, Any]) -> Tensor:
        seen.setdefault(layer, []).append(tuple(hidden.shape[:2]))
        return run(layer, hidden, context)

    monkeypatch.setattr(engine.layers, "run", counted)
    output = engine.predict(encoded, 10, pad_token_id=1)
    lengths = torch.from_numpy(encoded.lengths)
    for layer in (1, 2, 3, 4, 5):
        assert sum(rows for rows, _ in seen.get(layer, [])) == int(
            (output.exit_layers >= layer).sum()
        )
    # No padding beyond the longest remaining text.
    widest = int(lengths[output.exit_layers == 5].max())
    assert max(width for _, width in seen[5]) == widest
    seen.clear()
    engine.predict(encoded, 10, pad_token_id=1, repack=True)
    full = [rows for shapes in seen.values() for rows, _ in shapes]
    assert max(full) == 10
    # Full batches, except for the last one of each layer.
    assert all(sum(rows < 10 for rows, _ in shapes) <= 1 for layer, shapes in seen.items())
    seen.clear()
    engine = EarlyExit(model, FixedLayer(2))
    monkeypatch.setattr(engine.layers, "run", counted)
    engine.predict(encoded, 10, pad_token_id=1)
    assert sorted(seen) == [1, 2]


def test_flops_by_hand() -> None:
    model = multi_exit_model()
    hidden, inner, tokens = 32, 48, 6
    layer = tokens * (8 * hidden**2 + 4 * hidden * inner) + 4 * tokens**2 * hidden
    exit = 2 * hidden * 3
    length = torch.tensor([tokens])
    spent = [flops.at(length).item() for flops in exit_flops(model)]
    assert spent == [layer + exit, 2 * (layer + exit), 3 * (layer + exit), 5 * layer + 4 * exit]
    assert full_flops(model).at(length).item() == 5 * layer + exit
    # An exit that is not read costs nothing; the learned exit costs a product with h.
    spent = [flops.at(length).item() for flops in exit_flops(model, FixedLayer(2))]
    assert spent[1] == 2 * layer + exit
    learned = exit_flops(model, make_policy("learned", threshold=0.5))
    assert learned[1].at(length).item() == 2 * (layer + exit + 2 * hidden)
    mha = multi_exit_model(exit_head="mha")
    width = 64
    head = tokens * (2 * hidden * width + 4 * width**2 + 4 * width) + 4 * width**2 + 2 * width * 3
    assert exit_flops(mha)[0].at(length).item() == layer + head


@torch.inference_mode()
def test_half_precision_decides_on_float32() -> None:
    model, encoded = multi_exit_model(exit_head="mha"), random_texts(20, 30)
    output = early_exit(model, encoded, "entropy", threshold=0.9, dtype=torch.bfloat16)
    assert output.probabilities.dtype == torch.float32
    reference = early_exit(model, encoded, "entropy", threshold=0.9)
    assert (output.exit_layers == reference.exit_layers).float().mean() > 0.8


def test_the_models_mode_is_kept() -> None:
    model, encoded = multi_exit_model(), random_texts(5, 30)
    model.train()
    model.backbone.eval()
    early_exit(model, encoded, MaximumProbability(0.5))
    assert model.training and model.exits[0].training and not model.backbone.training


def test_the_stored_policy() -> None:
    model, encoded = multi_exit_model(), random_texts(5, 30)
    with pytest.raises(ValueError, match="stores no early-exit policy: run `fusedacl exits`"):
        early_exit(model, encoded)
    model.config.exit_policy = {"name": "entropy", "parameters": {"threshold": 0.9}}
    stored = early_exit(model, encoded)
    named = early_exit(model, encoded, "entropy", threshold=0.9)
    assert torch.equal(stored.exit_layers, named.exit_layers)
    assert stored_policy(model) == make_policy("entropy", threshold=0.9)
    model.config.exit_policy = {"name": "entropy", "parameters": {"threshold": 9}}
    with pytest.raises(ValueError, match="threshold=9 is out of range"):
        early_exit(model, encoded)


def test_mistakes() -> None:
    model, encoded = multi_exit_model(), random_texts(5, 30)
    batch = collate(encoded, range(5), 1)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for policy, parameters, message in (
        ("fixed_layer", {"layer": 4}, "layer=4 carries no exit"),
        ("learned", {"threshold": 0.5}, "needs the model's learned exit, which has not been"),
        (MaximumProbability(0.5), {"threshold": 0.5}, "threshold: parameters need a policy's name"),
    ):
        with pytest.raises(ValueError, match=message):
            early_exit(model, batch, policy, **parameters)
    engine = EarlyExit(model, "voting", votes=2)
    with pytest.raises(ValueError, match="its padding on the right"):
        engine(ids, mask.flip(1))
    with pytest.raises(ValueError, match="no rows"):
        engine(ids[:0], mask[:0])
    for inputs, message in (
        ({"input_ids": ids[0]}, r"input_ids has shape \[\d+\]: it must be \[texts, tokens\]"),
        ({"input_ids": ids[:, :0]}, r"input_ids has shape \[5, 0\]"),
        ({"input_ids": ids, "attention_mask": mask[:, 1:]}, r"attention_mask has shape \[5, "),
        ({"input_ids": ids, "attention_mask": mask[:1]}, r"attention_mask has shape \[1, "),
        ({"input_ids": ids, "token_type_ids": mask[0]}, r"token_type_ids has shape \[\d+\], in"),
    ):
        with pytest.raises(ValueError, match=message):
            model.early_exit(inputs, "voting", votes=2)
    with pytest.raises(ValueError, match="has no input_ids; it has attention_mask"):
        early_exit(model, {"attention_mask": mask}, "voting", votes=2)
    with pytest.raises(ValueError, match="not 'position_ids'"):
        early_exit(model, {"input_ids": ids, "position_ids": ids}, "voting", votes=2)
    single = multi_exit_model(exit_layers=(5,))
    with pytest.raises(ValueError, match="has one exit, on layer 5: nothing can leave early"):
        early_exit(single, batch, "voting", votes=1)
