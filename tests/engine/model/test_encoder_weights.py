"""Weights of an encoder: complete, under a wrapper's names, in every file format, or refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fusedacl.engine import MultiExitForSequenceClassification
from fusedacl.engine.model.saved import check_vocabulary, load_tokenizer, load_trained
from safetensors.torch import load_file, save_file
from tiny_runs import run
from torch import Tensor

Weights = dict[str, Tensor]


def write(directory: Path, weights: Weights, file_format: str) -> None:
    for old in directory.glob("*.safetensors*"):
        old.unlink()
    if file_format == "bin":
        torch.save(weights, directory / "pytorch_model.bin")
    elif file_format == "safetensors":
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
    else:
        names = sorted(weights)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in parts.items():
            save_file({name: weights[name] for name in part}, directory / file, {"format": "pt"})
        places = {name: file for file, part in parts.items() for name in part}
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def changed(tiny_bert: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of `tiny_bert` with other weights."""

    def make(change: Callable[[Weights], Weights], file_format: str = "safetensors") -> Path:
        directory = tmp_path / "encoder"
        shutil.copytree(tiny_bert, directory, dirs_exist_ok=True)
        write(directory, change(load_file(tiny_bert / "model.safetensors")), file_format)
        return directory

    return make


def encoder_of(directory: Path) -> Weights:
    model = MultiExitForSequenceClassification.from_encoder(
        str(directory), label_names=["a", "b"], exit_layers=[1, 2]
    )
    return dict(model.backbone.state_dict())


@pytest.mark.parametrize("file_format", ["safetensors", "bin", "sharded"])
@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "0.auto_model.", "base_model.model.", "module._orig_mod."],
)
@pytest.mark.parametrize("with_head", [True, False])
def test_the_prefix_of_a_wrapper_is_understood_and_told(
    changed: Callable[..., Path],
    tiny_bert: Path,
    prefix: str,
    file_format: str,
    with_head: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def renamed(weights: Weights) -> Weights:
        plain = {name.removeprefix("bert."): value for name, value in weights.items()}
        chosen = weights if with_head else plain
        return {prefix + name: value for name, value in chosen.items()}

    with caplog.at_level(logging.INFO, "fusedacl"):
        loaded = encoder_of(changed(renamed, file_format))
    expected = encoder_of(tiny_bert)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())
    told = [line for line in caplog.messages if "are named with the prefix" in line]
    assert len(told) == bool(prefix)
    assert not prefix or repr(prefix) in told[0]


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {
        name: value for name, value in weights.items() if not any(part in name for part in parts)
    }


@pytest.mark.parametrize("file_format", ["safetensors", "bin", "sharded"])
def test_an_absent_layer_is_refused(changed: Callable[..., Path], file_format: str) -> None:
    directory = changed(without("layer.1."), file_format)
    words = r"16 of the model's 37 weights are not in the file: encoder\.layer\.1\..* and more"
    with pytest.raises(ValueError, match=f"model_name_or_path=.*{words}"):
        encoder_of(directory)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: {f"text.{k}": v for k, v in weights.items()}, r"37 of .*text\.bert\.emb"),
        (lambda weights: {f"module.x.{k}": v for k, v in weights.items()}, r"37 of .*x\.bert\.emb"),
        (without("word_embeddings"), r"1 of .*: embeddings\.word_embeddings\.weight\. "),
        (lambda weights: {"a.lora_A.weight": torch.ones(1)}, "merge it into its encoder first"),
    ],
    ids=["unknown prefix", "known before unknown", "one", "adapter"],
)
def test_other_names_are_refused(
    changed: Callable[..., Path], change: Callable[[Weights], Weights], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        encoder_of(changed(change))


def test_a_pooler_and_a_head_may_be_absent(changed: Callable[..., Path]) -> None:
    encoder_of(changed(without("pooler", "cls.")))


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_a_model_of_ours_as_encoder(tiny_bert: Path, tmp_path: Path, file_format: str) -> None:
    model = MultiExitForSequenceClassification.from_encoder(str(tiny_bert), label_names=["a", "b"])
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    write(tmp_path, {f"_orig_mod.{name}": value for name, value in weights.items()}, file_format)
    assert torch.equal(
        encoder_of(tmp_path)["embeddings.word_embeddings.weight"],
        weights["backbone.embeddings.word_embeddings.weight"],
    )
    # Its exits are not needed; a layer is.
    write(tmp_path, without("exits.")(weights), file_format)
    if file_format == "bin":
        write(tmp_path, without("layer.0.")(weights), file_format)
        with pytest.raises(ValueError, match=r"16 of .*: backbone\.encoder\.layer\.0"):
            encoder_of(tmp_path)
    else:
        encoder_of(tmp_path)


@pytest.mark.parametrize("option", ["model_name_or_path", "stage1_model"])
def test_an_empty_name_is_refused(option: str, tiny_options: dict[str, object]) -> None:
    del tiny_options["model_name_or_path"]
    with pytest.raises(ValueError, match=f"{option}.* is empty"):
        run(tiny_options, **{option: "", "strategy": "two_stage"})


def test_a_trained_model_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="model_name_or_path='' is empty"):
        load_trained("")


@pytest.mark.parametrize("added", [["zebra", "lion"], []])
def test_a_vocabulary_beyond_the_embeddings_is_refused_before_training(
    added: list[str], tiny_bert: Path, tmp_path: Path, tiny_options: dict[str, object]
) -> None:
    directory = tmp_path / "encoder"
    shutil.copytree(tiny_bert, directory)
    tokenizer = load_tokenizer(str(directory))
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(directory)
    if not added:
        model = MultiExitForSequenceClassification.from_encoder(str(directory), label_names=["a"])
        check_vocabulary(model, tokenizer)
        return
    with pytest.raises(ValueError, match="28 tokens, and its tokenizer has 2 more, .*'zebra'"):
        run(tiny_options, model_name_or_path=str(directory))
    assert not Path(str(tiny_options["output_dir"])).exists()
