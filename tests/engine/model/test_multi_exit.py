"""The multi-exit model over BERT and RoBERTa: outputs, saving, loading, AutoClasses, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fusedacl.engine import MultiExitConfig, MultiExitForSequenceClassification
from fusedacl.engine.model.encoder import set_dropout
from fusedacl.engine.model.saved import load_trained
from tiny_runs import BERT_SIZES
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    FunnelConfig,
    LongformerConfig,
    ModernBertConfig,
    PretrainedConfig,
    RobertaConfig,
)

INPUTS = torch.arange(5, 26).view(3, 7)
MODERN_SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "pad_token_id": 0,
}  # fmt: skip
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])


@pytest.mark.parametrize("config_class", [BertConfig, RobertaConfig])
@pytest.mark.parametrize("exit_head", ["mha", "linear"])
@pytest.mark.parametrize("exit_layers", [None, [1, 3], [1, 2, 3]])
def test_random_configurations(config_class, exit_head: str, exit_layers) -> None:
    config = MultiExitConfig(
        config_class(**BERT_SIZES), exit_layers=exit_layers, exit_head=exit_head, num_labels=4
    )
    model = MultiExitForSequenceClassification(config).eval()
    labels = torch.tensor([0, 3, 1])
    output = model(INPUTS, MASK, labels=labels)
    num_exits = len(exit_layers or [3])
    width = 64 if exit_head == "mha" else 32
    assert output.exit_logits.shape == (num_exits, 3, 4)
    assert output.exit_embeddings.shape == (num_exits, 3, width)
    assert model.label_embeddings.shape == (num_exits, 4, width)
    assert torch.equal(output.logits, output.exit_logits[-1])
    expected = sum(functional.cross_entropy(logits, labels) for logits in output.exit_logits)
    torch.testing.assert_close(output.loss, expected)
    assert not any("pooler" in name for name, _ in model.named_parameters())


def test_other_encoders_are_taken_by_their_configuration() -> None:
    backbone = DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=60)
    model = MultiExitForSequenceClassification(MultiExitConfig(backbone, exit_layers=[1, 2]))
    assert model(INPUTS, MASK).exit_logits.shape == (2, 3, 2)


def test_an_exit_reads_its_layer() -> None:
    config = MultiExitConfig(BertConfig(**BERT_SIZES), exit_layers=[2, 3], exit_head="linear")
    model = MultiExitForSequenceClassification(config).eval()
    states = model.backbone(INPUTS, MASK, output_hidden_states=True)
    output = model(INPUTS, MASK)
    assert torch.equal(output.exit_embeddings[0], states.hidden_states[2][:, 0])
    assert torch.equal(output.exit_embeddings[1], states.last_hidden_state[:, 0])


def test_one_exit_shares_its_label_embeddings() -> None:
    model = MultiExitForSequenceClassification(MultiExitConfig(BertConfig(**BERT_SIZES)))
    weight = model.exits[0].classifier.weight
    assert model.label_embeddings.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("directory", ["tiny_bert", "tiny_roberta"])
def test_pretrained_weights_arrive_unchanged(
    directory: str, request: pytest.FixtureRequest
) -> None:
    path = str(request.getfixturevalue(directory))
    model = MultiExitForSequenceClassification.from_encoder(path, label_names=["a", "b"])
    pretrained = AutoModel.from_pretrained(path, add_pooling_layer=False)
    ours = model.backbone.state_dict()
    for name, value in pretrained.state_dict().items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("directory", ["tiny_bert", "tiny_roberta"])
def test_saved_and_loaded(directory: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = str(request.getfixturevalue(directory))
    model = MultiExitForSequenceClassification.from_encoder(
        path, label_names=["no", "yes", "perhaps"], exit_layers=[1, 2], exit_width=16, dropout=0.3
    ).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "fusedacl_multi_exit"
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is MultiExitForSequenceClassification
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(INPUTS % 20, MASK).exit_logits, model(INPUTS % 20, MASK).exit_logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    assert config.exit_layers == [1, 2]
    assert config.exit_dropout == config.backbone_config.hidden_dropout_prob == 0.3


def test_a_trained_model_can_be_the_encoder_of_the_next(tiny_bert: Path, tmp_path: Path) -> None:
    first = MultiExitForSequenceClassification.from_encoder(str(tiny_bert), label_names=["a", "b"])
    with torch.no_grad():
        first.backbone.embeddings.word_embeddings.weight.add_(1)
    first.save_pretrained(tmp_path)
    second = MultiExitForSequenceClassification.from_encoder(
        str(tmp_path), label_names=["x", "y", "z"]
    )
    assert torch.equal(
        second.backbone.embeddings.word_embeddings.weight,
        first.backbone.embeddings.word_embeddings.weight,
    )
    assert second.num_labels == 3


def dropout_probabilities(model: torch.nn.Module) -> set[float]:
    """Of nn.Dropout modules, and of attention modules that hold a number."""
    found = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    for module in model.modules():
        found |= {v for k, v in vars(module).items() if "dropout" in k and isinstance(v, float)}
    return found


@pytest.mark.parametrize("again", [False, True])
def test_dropout_reaches_every_module(tiny_bert: Path, tmp_path: Path, again: bool) -> None:
    model = MultiExitForSequenceClassification.from_encoder(
        str(tiny_bert), label_names=["a", "b"], dropout=0.2 if again else 0.37
    )
    if again:
        model.save_pretrained(tmp_path)
        model = MultiExitForSequenceClassification.from_encoder(
            str(tmp_path), label_names=["a", "b"], dropout=0.37
        )
    assert dropout_probabilities(model) == {0.37}


def test_an_encoder_whose_attention_holds_a_number(tmp_path: Path) -> None:
    config = ModernBertConfig(**MODERN_SIZES)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    model = MultiExitForSequenceClassification.from_encoder(
        str(tmp_path), label_names=["a", "b"], dropout=0.37
    )
    assert model.backbone.config.attention_dropout == 0.37
    assert 0.0 not in dropout_probabilities(model)


@pytest.mark.parametrize(
    "config",
    [
        ModernBertConfig(**MODERN_SIZES),
        LongformerConfig(**BERT_SIZES, attention_window=[4, 4, 4]),
    ],
)
def test_fewer_layers_are_saved_and_loaded(config: PretrainedConfig, tmp_path: Path) -> None:
    AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    model = MultiExitForSequenceClassification.from_encoder(
        str(tmp_path / "encoder"), label_names=["a", "b"], num_hidden_layers=2
    )
    model.save_pretrained(tmp_path / "model")
    loaded = load_trained(str(tmp_path / "model")).eval()
    assert loaded.exit_layers == [2]
    assert torch.equal(loaded(INPUTS, MASK).logits, model.eval()(INPUTS, MASK).logits)


def test_layers_that_no_number_counts(tmp_path: Path) -> None:
    FunnelConfig(vocab_size=60).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"num_hidden_layers=1: the layers of a funnel.*Leave it"):
        MultiExitForSequenceClassification.from_encoder(
            str(tmp_path), label_names=["a", "b"], num_hidden_layers=1
        )


def test_a_configuration_that_could_not_be_read_again(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = {"backbone_config": {"model_type": "bert", "num_hidden_layers": 1}, "exit_layers": [2]}
    monkeypatch.setattr(MultiExitConfig, "to_dict", lambda self: saved)
    with pytest.raises(
        ValueError, match=r"A bert model.*could not be read again once saved \(exit"
    ):
        MultiExitForSequenceClassification.from_encoder(str(tiny_bert), label_names=["a", "b"])


def test_every_dropout_of_a_configuration_is_set() -> None:
    config = BartConfig()
    set_dropout(config, 0.37)
    read = {"dropout", "attention_dropout", "activation_dropout"}
    assert {getattr(config, name) for name in read} == {0.37}


def test_damaged_weights(tiny_bert: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_bert / name).read_bytes()[:2000])
    with pytest.raises(ValueError, match="the weights cannot be loaded"):
        MultiExitForSequenceClassification.from_encoder(str(tmp_path), label_names=["a", "b"])


def test_a_wrong_field_of_a_configuration(tiny_bert: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_bert / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": "384"}))
    with pytest.raises(ValueError, match=r"^model_name_or_path=.*(can be used|cannot be loaded):"):
        MultiExitForSequenceClassification.from_encoder(str(tmp_path), label_names=["a", "b"])


def test_a_misspelt_directory_offers_the_nearest(tiny_bert: Path) -> None:
    misspelt = str(tiny_bert)[:-1] + "x"
    with pytest.raises(ValueError, match=f"Did you mean '{tiny_bert}'"):
        MultiExitForSequenceClassification.from_encoder(misspelt, label_names=["a", "b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_layers": [4]}, r"exit_layers=\[4\]: the backbone has layers 1 to 3 only"),
        ({"exit_layers": [0, 1]}, "layers 1 to 3 only"),
        ({"exit_layers": [2, 1]}, "ascending layers without repetition"),
        ({"exit_layers": []}, "ascending layers without repetition"),
        ({"exit_head": "mah"}, "exit_head='mah'. Did you mean 'mha'?"),
        ({"exit_pooling": "mean"}, "exit_pooling=mean is for linear exits"),
        ({"exit_head": "linear", "exit_pooling": "max"}, "exit_pooling='max' is none of first, m"),
    ],
)
def test_bad_configurations(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiExitConfig(BertConfig(**BERT_SIZES), **options)


def test_unknown_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    missing = str(tmp_path / "absent")
    with pytest.raises(ValueError, match="model_name_or_path=.*absent.* cannot be loaded"):
        MultiExitForSequenceClassification.from_encoder(missing, label_names=["a", "b"])
