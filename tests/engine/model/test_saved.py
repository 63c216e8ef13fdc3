"""Required files of a model directory, and the length limit of its texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from fusedacl.engine.config.commands import InferenceOptions
from fusedacl.engine.model.multi_exit import MultiExitConfig, MultiExitForSequenceClassification
from fusedacl.engine.model.saved import TrainedModel, length_limit, load_tokenizer, load_trained
from fusedacl.engine.runtime.manifest import seal_model
from transformers import MPNetConfig


@pytest.mark.parametrize(("directory", "limit"), [("tiny_bert", 64), ("tiny_roberta", 64)])
def test_length_limit(directory: str, limit: int, request: pytest.FixtureRequest) -> None:
    # RoBERTa counts positions from pad_token_id + 1, so 66 positions hold 64 tokens.
    path = str(request.getfixturevalue(directory))
    model = MultiExitForSequenceClassification.from_encoder(path, label_names=["a", "b"])
    tokenizer = load_tokenizer(path)
    assert length_limit(model, tokenizer) == limit
    inputs = tokenizer(["a dog " * 100], truncation=True, max_length=limit, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == limit
    model(inputs["input_ids"], inputs["attention_mask"])


def test_length_limit_of_another_kin_of_roberta(tiny_bert: Path) -> None:
    config = MPNetConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=42,
    )
    model = MultiExitForSequenceClassification(MultiExitConfig(config))
    tokenizer = load_tokenizer(str(tiny_bert))
    assert length_limit(model, tokenizer) == 40
    model(torch.ones(1, 40, dtype=torch.int64) + 4)
    tokenizer.model_max_length = 32
    assert length_limit(model, tokenizer) == 32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no config.json: name the output_dir of a finished run"),
        ("{", "config.json is damaged"),
        ('{"model_type": "bert"}', "is a bert model, not one that `fusedacl train`"),
        ('{"model_type": "fusedacl_multi_exit"}', "cannot be loaded"),
    ],
)
def test_not_a_trained_model(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        TrainedModel(InferenceOptions(model_name_or_path=str(tmp_path)), None)


@pytest.mark.parametrize("option", ["model_name_or_path", "stage1_model"])
def test_a_plain_classifier_is_told_what_to_do(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    words = "an exit in place of its classifier.*`fusedacl train --model_name_or_path"
    then = f"then {option} is runs/mine"
    with pytest.raises(ValueError, match=f"^{option}=.*is a bert.*{words} {tmp_path} .*{then}"):
        load_trained(str(tmp_path), option)
    # A stand-in for the hub, which is asked for the configuration only.
    told = {"model_type": "roberta"}
    monkeypatch.setattr(MultiExitConfig, "get_config_dict", lambda name: (told, {}))
    with pytest.raises(ValueError, match=f"^{option}=.*is a roberta.*{words} some/model .*{then}"):
        load_trained("some/model", option)


def test_truncated_weights(tiny_bert: Path, tmp_path: Path) -> None:
    model = MultiExitForSequenceClassification.from_encoder(str(tiny_bert), label_names=["a", "b"])
    model.save_pretrained(tmp_path)
    load_tokenizer(str(tiny_bert)).save_pretrained(tmp_path)
    TrainedModel(InferenceOptions(model_name_or_path=str(tmp_path)), None)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model_name_or_path=.* cannot be loaded"):
        TrainedModel(InferenceOptions(model_name_or_path=str(tmp_path)), None)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_changed_file_of_a_final_model_is_refused(
    name: str, tiny_bert: Path, tmp_path: Path
) -> None:
    model = MultiExitForSequenceClassification.from_encoder(str(tiny_bert), label_names=["a", "b"])
    model.save_pretrained(tmp_path)
    load_tokenizer(str(tiny_bert)).save_pretrained(tmp_path)
    seal_model(tmp_path)
    # Options and the card may change, as when a policy is stored.
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + "\n")
    load_trained(str(tmp_path))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{name} is not what was saved.*delete manifest.json"):
        load_trained(str(tmp_path))


def test_a_tokenizer_of_an_unknown_kind(tiny_bert: Path, tmp_path: Path) -> None:
    load_tokenizer(str(tiny_bert)).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model": {"type": "Novel"}}))
    with pytest.raises(ValueError, match="^tokenizer_name=.* has no tokenizer that can be loaded"):
        load_tokenizer(str(tmp_path), "tokenizer_name")


def test_model_is_missing() -> None:
    with pytest.raises(ValueError, match="model_name_or_path is missing"):
        TrainedModel(InferenceOptions(), None)


def test_a_model_whose_weights_are_incomplete(tiny_bert: Path, tmp_path: Path) -> None:
    """Not filled with random numbers, as transformers would."""
    model = MultiExitForSequenceClassification.from_encoder(
        str(tiny_bert), label_names=["no", "yes"], exit_layers=[1, 2]
    )
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    kept = {name: value for name, value in weights.items() if not name.startswith("exits.0.")}
    safetensors.torch.save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is damaged: its weights lack exits\.0\..* and more"):
        load_trained(str(tmp_path))
