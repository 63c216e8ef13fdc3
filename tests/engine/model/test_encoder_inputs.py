"""Inputs that a tokenizer gives and an encoder does not take: token types, padding on the left."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_zoo import SIZES, write_encoder
from fusedacl.engine import MultiExitConfig, MultiExitForSequenceClassification
from fusedacl.engine.model import encoder
from fusedacl.engine.model.encoder import check_encoder, examine
from fusedacl.engine.model.saved import load_tokenizer
from tiny_runs import options_of, run
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel, pipeline

TEXTS = ["the red dog", "a big old cat sleeps near the green river", "good"]


def model_of(model_type: str, **options: Any) -> MultiExitForSequenceClassification:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **options})
    return MultiExitForSequenceClassification(MultiExitConfig(config, exit_layers=[1, 2, 3])).eval()


def inputs_of(tiny_bert: Path) -> dict[str, Tensor]:
    """Pairs, of which the second texts have token type 1."""
    tokenizer = load_tokenizer(str(tiny_bert))
    inputs = tokenizer(TEXTS, TEXTS[::-1], padding=True, return_tensors="pt")
    assert inputs["token_type_ids"].max() == 1
    return dict(inputs)


# Encoders without token types, with one type only, and one that would look types up as words.
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("distilbert", {"dim": 32, "hidden_dim": 48}),
        ("mpnet", {}),
        ("roberta", {"type_vocab_size": 1}),
        ("deberta-v2", {"type_vocab_size": 0}),
        ("xlm", {}),
        ("bart", {"decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}),
    ],
)
def test_token_types_that_an_encoder_does_not_take_are_left_out_everywhere(
    model_type: str, options: dict[str, Any], tiny_bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder._note_left_out.cache_clear()
    model = model_of(model_type, **options)
    inputs = inputs_of(tiny_bert)
    bare = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    with caplog.at_level(logging.INFO, "fusedacl"):
        assert torch.equal(model(**inputs).exit_logits, model(**bare).exit_logits)
        answers = model.early_exit(inputs, "max_probability", threshold=1.0)
    torch.testing.assert_close(answers.probabilities, model(**bare).logits.softmax(-1))
    assert sum("token types are left out" in line for line in caplog.messages) == 1


@pytest.mark.parametrize(
    ("model_type", "options"), [("bert", {}), ("roberta", {}), ("albert", {}), ("xlnet", {})]
)
def test_token_types_reach_an_encoder_that_tells_them_apart(
    model_type: str, options: dict[str, Any], tiny_bert: Path
) -> None:
    if model_type == "xlnet":
        config = AutoConfig.for_model("xlnet", d_model=32, n_layer=3, n_head=2, vocab_size=28)
        model = MultiExitForSequenceClassification(MultiExitConfig(config, exit_layers=[1, 3]))
        model.eval()
    else:
        model = model_of(model_type, **options)
    inputs = inputs_of(tiny_bert)
    expected = model(**inputs).logits
    assert not torch.equal(expected, model(inputs["input_ids"], inputs["attention_mask"]).logits)
    answers = model.early_exit(inputs, "max_probability", threshold=1.0)
    torch.testing.assert_close(answers.probabilities, expected.softmax(-1), rtol=0, atol=2e-5)


def test_a_tokenizer_with_types_serves_an_encoder_without(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    encoder = tmp_path / "encoder"
    write_encoder("distilbert", encoder, tiny_bert)
    # As on the hub: no file names the class of the tokenizer, and AutoTokenizer takes BERT's.
    for file in encoder.glob("*token*"):
        file.unlink()
    shutil.copy(tiny_bert / "vocab.txt", encoder)
    (encoder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    options = options_of(encoder, tiny_data, tmp_path / "run", strategy="joint")
    run(options, max_steps=1, save_steps=0)
    tokenizer = load_tokenizer(str(tmp_path / "run"))
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert "token_type_ids" in batch
    model = MultiExitForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    answers = model.early_exit(batch, "max_probability", threshold=1.0)
    serve = pipeline("text-classification", model=model, tokenizer=tokenizer)
    scores = [answer["score"] for answer in serve(TEXTS)]
    assert scores == pytest.approx(answers.probabilities.amax(-1).tolist(), abs=1e-5)


def test_padding_on_the_left_is_refused() -> None:
    model = model_of("bert")
    ids = torch.arange(5, 15).view(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    words = r"attention_mask: .*on the right \(tokenizer.padding_side"
    with pytest.raises(ValueError, match=words):
        model(ids, mask)
    with pytest.raises(ValueError, match=words):
        model.early_exit({"input_ids": ids, "attention_mask": mask}, "patience", patience=1)


def causal_bert() -> PreTrainedModel:
    """An encoder by its configuration, whose attention has been made causal."""
    model = AutoModel.from_config(AutoConfig.for_model("bert", **SIZES)).eval()
    forward = model.forward

    def masked(attention_mask: Tensor, **inputs: Any) -> Any:
        width = attention_mask.shape[1]
        causal = torch.ones(width, width).tril() * attention_mask[:, None, :]
        return forward(attention_mask=causal[:, None].bool(), **inputs)

    model.forward = masked
    return model


def test_a_causal_mask_is_found_whatever_the_type() -> None:
    with pytest.raises(ValueError, match="A bert model cannot be trained here: its first token"):
        check_encoder(causal_bert(), early_exits=False)


def test_random_numbers_and_weights_stay() -> None:
    bert = AutoModel.from_config(AutoConfig.for_model("bert", **SIZES)).train()
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in bert.state_dict().items()}
    assert examine(bert).problem is None
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in bert.state_dict().items())
    assert bert.training


def test_a_thread_of_its_own_is_not_steered(tiny_bert: Path) -> None:
    """While one thread serves early exits, another may run the whole model."""
    model = model_of("albert")
    inputs = inputs_of(tiny_bert)
    expected = model(**inputs).logits.detach()
    wrong = []
    end = threading.Event()

    def whole() -> None:
        while not end.is_set():
            with torch.no_grad():
                if not torch.equal(model(**inputs).logits, expected):
                    wrong.append(1)

    thread = threading.Thread(target=whole)
    thread.start()
    for _ in range(20):
        answers = model.early_exit(inputs, "max_probability", threshold=1.0)
        torch.testing.assert_close(answers.probabilities, expected.softmax(-1))
    end.set()
    thread.join()
    assert not wrong
    assert not any("forward" in vars(module) for module in model.modules())
