"""The model under PEFT, quantisation, torch.export, torch.compile and ONNX."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from fusedacl.engine import MultiExitConfig, MultiExitForSequenceClassification, early_exit
from fusedacl.engine.inference.calibration.learned_exit import fit_learned_exit
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, DistilBertConfig

INPUTS = torch.arange(5, 26).view(3, 7)
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])
BATCH = {"input_ids": INPUTS, "attention_mask": MASK}
LABELS = torch.tensor([0, 1, 1])
TARGETS = {BertConfig: ["query", "value"], DistilBertConfig: ["q_lin", "v_lin"]}


def small_model(config_class: Any = BertConfig, head: str = "mha") -> Any:
    config = config_class(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        vocab_size=60, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    if config_class is DistilBertConfig:
        config = DistilBertConfig(dim=32, n_layers=3, n_heads=2, hidden_dim=48, vocab_size=60)
    made = MultiExitConfig(config, exit_layers=[1, 3], exit_head=head, num_labels=2)
    model = MultiExitForSequenceClassification(made).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
    return model


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(**BATCH).exit_logits


def steps(model: nn.Module) -> None:
    """Train long enough for every trained weight to move."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(**BATCH, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
@pytest.mark.parametrize(
    ("config_class", "head"),
    [(BertConfig, "mha"), (BertConfig, "linear"), (DistilBertConfig, "mha")],
)
def test_adapters_are_trained_and_saved_with_the_exits(
    config_class: Any, head: str, task_type: str | None, tmp_path: Path
) -> None:
    model = small_model(config_class, head)
    model.save_pretrained(tmp_path / "base")
    model = MultiExitForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    base = logits_of(model)
    settings = LoraConfig(
        task_type=task_type, target_modules=TARGETS[config_class], modules_to_save=["exits"]
    )
    adapted = get_peft_model(model, settings)
    trained = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert all("lora_" in name or ".exits.modules_to_save.default." in name for name in trained)
    assert sum(".exits." in name for name in trained) == len(
        list(small_model(head=head).exits.parameters())
    )
    before = {name: value.detach().clone() for name, value in adapted.named_parameters()}
    steps(adapted)
    moved = {
        name for name, value in adapted.named_parameters() if not torch.equal(value, before[name])
    }
    assert moved <= trained
    assert {name for name in trained if name.endswith("classifier.weight")} <= moved
    expected = logits_of(adapted)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits_of(adapted), base)

    everyone_stays = adapted.early_exit(BATCH, "max_probability", threshold=1.0)
    assert everyone_stays.exit_layers.tolist() == [3, 3, 3]
    torch.testing.assert_close(everyone_stays.probabilities, expected[-1].softmax(dim=-1))

    adapted.save_pretrained(tmp_path / "adapter")
    again = MultiExitForSequenceClassification.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(
        logits_of(PeftModel.from_pretrained(again, tmp_path / "adapter").eval()), expected
    )
    if task_type is not None:
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(logits_of(loaded.eval()), expected)

    merged = adapted.merge_and_unload()
    assert type(merged) is MultiExitForSequenceClassification
    assert merged.state_dict().keys() == small_model(config_class, head).state_dict().keys()
    torch.testing.assert_close(logits_of(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(plain), expected)


def test_adapters_without_the_exits() -> None:
    """PEFT's default for the task trains the classifiers alone."""
    adapted = get_peft_model(
        small_model(), LoraConfig(task_type="SEQ_CLS", target_modules=["key", "dense"])
    )
    trained = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert {name for name in trained if ".exits." in name} == {
        f"base_model.model.exits.{index}.classifier.modules_to_save.default.weight"
        for index in range(2)
    }
    steps(adapted)
    expected = logits_of(adapted)
    torch.testing.assert_close(logits_of(adapted.merge_and_unload()), expected)


def test_adapters_with_gradient_checkpointing() -> None:
    model = small_model().train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    adapted = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=["exits"]))
    adapted(**BATCH, labels=LABELS).loss.backward()
    for name, value in adapted.named_parameters():
        assert (value.grad is not None) == value.requires_grad, name


@pytest.mark.parametrize(
    ("config_class", "head"),
    [(BertConfig, "mha"), (BertConfig, "linear"), (DistilBertConfig, "mha")],
)
def test_int8_weights(config_class: Any, head: str) -> None:
    model = small_model(config_class, head)
    with warnings.catch_warnings():  # deprecated in favour of torchao
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    torch.testing.assert_close(logits_of(quantised), logits_of(model), rtol=0.1, atol=0.1)
    for policy in (
        {"policy": "max_probability", "threshold": 1.0},
        {"policy": "fixed_layer", "layer": 1},
    ):
        answers, exact = early_exit(quantised, BATCH, **policy), early_exit(model, BATCH, **policy)
        torch.testing.assert_close(answers.probabilities, exact.probabilities, rtol=0.1, atol=0.05)
        assert torch.equal(answers.exit_layers, exact.exit_layers)
        assert torch.equal(answers.flops, exact.flops)


def test_int8_weights_of_the_learned_exit(exit_model: Any, exit_readings: Any) -> None:
    exit_model.learned_exit = fit_learned_exit(exit_readings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(exit_model, {nn.Linear})
    answers = early_exit(quantised, BATCH, "learned", threshold=0.99)
    assert answers.predictions.shape == (3,)


@pytest.mark.parametrize("config_class", [BertConfig, DistilBertConfig])
def test_exported_graphs_take_any_batch(config_class: Any, tmp_path: Path) -> None:
    model = small_model(config_class)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {name: dynamic for name in BATCH}
    others = {
        "input_ids": torch.arange(5, 57).view(4, 13),
        "attention_mask": torch.ones(4, 13).long(),
    }
    others["attention_mask"][1, 4:] = 0
    names = ["logits", "exit_logits", "exit_embeddings"]

    program = torch.export.export(
        model, (), {**BATCH, "return_dict": False}, dynamic_shapes={**shapes, "return_dict": None}
    )
    file = tmp_path / "model.onnx"
    # As for the model itself, which it would trace once more.
    torch.onnx.export(
        program, (), str(file), kwargs=dict(BATCH), dynamo=True, input_names=list(BATCH),
        output_names=names, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == names
    assert [taken.name for taken in session.get_inputs()] == list(BATCH)
    for batch in (BATCH, others):
        with torch.no_grad():
            expected = model(**batch).to_tuple()
            exported = program.module()(**batch, return_dict=False)
        found = session.run(names, {name: value.numpy() for name, value in batch.items()})
        for name, want, graph, onnx in zip(names, expected, exported, found, strict=True):
            torch.testing.assert_close(graph, want, rtol=1e-4, atol=1e-5, msg=name)
            np.testing.assert_allclose(onnx, want.numpy(), rtol=1e-3, atol=1e-4, err_msg=name)


def test_an_exported_output_keeps_its_type() -> None:
    model = small_model()
    output = torch.export.export(model, (), dict(BATCH)).module()(**BATCH)
    torch.testing.assert_close(output.exit_logits, logits_of(model))


def test_compiled() -> None:
    model = small_model()
    logits_of(model)  # transformers installs its hooks for hidden states in the first forward pass
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(logits_of(compiled), logits_of(model))
    compiled(**BATCH, labels=LABELS).loss.backward()


def test_files_of_a_model_keep_their_names(tmp_path: Path) -> None:
    """Keys and weights that the first version wrote."""
    from safetensors import safe_open

    model = small_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {"backbone_config", "exit_layers", "exit_head", "exit_width"} <= config.keys()
    assert config["backbone_config"]["model_type"] == "bert"
    head = ("classifier.weight", "down_projection.bias", "key_value.weight", "output.weight")
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert {f"exits.{index}.{name}" for index in range(2) for name in head} <= names
        assert "backbone.encoder.layer.2.output.dense.weight" in names
    loaded = MultiExitForSequenceClassification.from_pretrained(tmp_path).eval()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
