"""The model in transformers' Trainer and pipelines, and what from_pretrained is asked for."""

from __future__ import annotations

import copy
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fusedacl.engine import MultiExitConfig, MultiExitForSequenceClassification
from tiny_runs import BERT_SIZES
from transformers import (
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    DistilBertConfig,
    ModernBertConfig,
    RobertaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

SIZES: dict[str, Any] = {
    **BERT_SIZES,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
INPUTS = torch.arange(5, 26).view(3, 7)
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])
BATCH = {"input_ids": INPUTS, "attention_mask": MASK}
NUM_TEXTS = 67
_random = random.Random(0)
_WORDS = "the red blue green old new big small dog cat bird house good bad".split()
TEXTS = [" ".join(_random.choices(_WORDS, k=_random.randint(2, 7))) for _ in range(NUM_TEXTS)]


@pytest.fixture(scope="module")
def directory(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a model with exits on both layers, and its tokenizer."""
    path = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = MultiExitForSequenceClassification.from_encoder(
        str(tiny_bert), label_names=["negative", "positive", "neither"], exit_layers=[], dropout=0.0
    )
    with torch.no_grad():
        # Else all answers are nearly alike.
        model.backbone.embeddings.word_embeddings.weight.mul_(30)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(path)
    return str(path)


def load(directory: str, **options: Any) -> MultiExitForSequenceClassification:
    return MultiExitForSequenceClassification.from_pretrained(directory, **options).eval()


def small_model(config_class: Any = BertConfig, **options: Any) -> Any:
    config = MultiExitConfig(
        config_class(**SIZES), exit_layers=[1, 3], id2label={0: "a", 1: "b"}, **options
    )
    return MultiExitForSequenceClassification(config).eval()


class Norms(TrainerCallback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if "grad_norm" in logs:
            self.found.append(float(logs["grad_norm"]))


def trainer_of(directory: str, output_dir: Path, batch_size: int = 32, **options: Any) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    labels = [index % 3 for index in range(NUM_TEXTS)]
    data = [{**tokenizer(text), "labels": label} for text, label in zip(TEXTS, labels, strict=True)]
    callbacks, scores = options.pop("callbacks", None), options.pop("compute_metrics", None)
    arguments = TrainingArguments(
        output_dir=str(output_dir), per_device_train_batch_size=batch_size, seed=0, use_cpu=True,
        per_device_eval_batch_size=16, logging_steps=1, report_to=[], disable_tqdm=True,
        **{"max_steps": 1, "save_strategy": "no", "max_grad_norm": 1e9, **options},
    )  # fmt: skip
    return Trainer(
        model=load(directory), args=arguments, train_dataset=data[:64], eval_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer), callbacks=callbacks,
        compute_metrics=scores,
    )  # fmt: skip


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_accumulated_gradients_are_those_of_the_whole_batch(directory: str, tmp_path: Path) -> None:
    norms = Norms()
    for steps, batch_size in ((1, 32), (4, 8)):
        options = {"gradient_accumulation_steps": steps, "learning_rate": 1e-9}
        trainer_of(directory, tmp_path, batch_size, callbacks=[norms], **options).train()
    assert norms.found[0] == pytest.approx(norms.found[1], rel=1e-4)


def test_trainer_predicts_logits(directory: str, tmp_path: Path) -> None:
    trainer = trainer_of(directory, tmp_path, compute_metrics=accuracy)
    predictions = trainer.predict(trainer.eval_dataset).predictions
    texts = AutoTokenizer.from_pretrained(directory)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = load(directory)(**texts)
    np.testing.assert_allclose(predictions, output.logits.numpy(), rtol=1e-4, atol=1e-5)
    # Asked for, the other exits' logits come with the texts first, too.
    trainer.compute_metrics = None
    everything = trainer.predict(trainer.eval_dataset, ignore_keys=["embeddings_by_text"])
    by_text = everything.predictions[1]
    assert by_text.shape == (NUM_TEXTS, 2, 3)
    np.testing.assert_allclose(
        by_text.transpose(1, 0, 2), output.exit_logits.numpy(), rtol=1e-4, atol=1e-5
    )


def test_trainer_keeps_the_best_model(directory: str, tmp_path: Path) -> None:
    trainer = trainer_of(
        directory, tmp_path, compute_metrics=accuracy, max_steps=4, eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, learning_rate=3e-3,
        load_best_model_at_end=True, metric_for_best_model="accuracy",
    )  # fmt: skip
    trainer.train()
    best = load(trainer.state.best_model_checkpoint)
    assert state_of(trainer.model).keys() == state_of(best).keys()
    for name, value in state_of(best).items():
        assert torch.equal(state_of(trainer.model)[name], value), name


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


@pytest.mark.parametrize("batch_size", [1, 4, NUM_TEXTS])
def test_pipeline(directory: str, batch_size: int) -> None:
    model, tokenizer = load(directory), AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        single = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    expected = torch.stack(single).softmax(dim=-1)
    classify = pipeline("text-classification", directory, batch_size=batch_size)
    answers = classify(TEXTS, top_k=None)
    for answer, wanted in zip(answers, expected, strict=True):
        found = {entry["label"]: entry["score"] for entry in answer}
        scores = [found[name] for name in ("negative", "positive", "neither")]
        torch.testing.assert_close(torch.tensor(scores), wanted, rtol=1e-4, atol=1e-5)
    assert len({answer[0]["label"] for answer in answers}) > 1
    best = classify(TEXTS)
    assert [entry["label"] for entry in best] == [answer[0]["label"] for answer in answers]


def test_pipeline_with_pairs(directory: str) -> None:
    pairs = [{"text": text, "text_pair": "a dog"} for text in TEXTS[:5]]
    classify = pipeline("text-classification", directory, batch_size=3)
    assert [entry["label"] for entry in classify(pairs)] == [
        classify(pair)["label"] for pair in pairs
    ]


def test_outputs_are_split_and_joined_by_text() -> None:
    """As DataParallel and accelerate do with the items of an output."""
    model = small_model()
    whole = model(INPUTS, MASK)
    whole = type(whole)(**{key: value.detach() for key, value in whole.items()})
    halves = [model(INPUTS[:1], MASK[:1]), model(INPUTS[1:], MASK[1:])]
    items = {key: torch.cat([half[key] for half in halves]) for key in whole}
    joined = type(whole)(items)
    for name in ("logits", "exit_logits", "exit_embeddings"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name))
        assert torch.equal(whole[name], getattr(whole, name))
    assert [tensor.shape for tensor in whole.to_tuple()] == [(3, 2), (2, 3, 2), (2, 3, 64)]
    for again in (pickle.loads(pickle.dumps(whole)), copy.copy(whole), type(whole)(**whole)):
        assert again.keys() == whole.keys()
        assert torch.equal(again.exit_logits, whole.exit_logits)
    whole.exit_logits = 2 * whole.exit_logits
    assert torch.equal(whole["logits_by_text"], 2 * again["logits_by_text"])


def test_accelerate_keeps_all_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # a process has one precision
    model = small_model()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    output = prepared(INPUTS, MASK)
    assert output.exit_logits.shape == (2, 3, 2)
    assert output.exit_logits.dtype == torch.float32
    assert torch.equal(output.logits, output.exit_logits[-1])


@pytest.mark.parametrize("config_class", [BertConfig, RobertaConfig, DistilBertConfig])
def test_hidden_states_attentions_and_tuples(config_class: Any) -> None:
    model = small_model(config_class, attn_implementation="eager")
    plain = model(INPUTS, MASK)
    output = model(INPUTS, MASK, output_hidden_states=True, output_attentions=True)
    assert torch.equal(output.exit_logits, plain.exit_logits)
    num_layers = model.config.backbone_config.num_hidden_layers
    assert len(output.hidden_states) == num_layers + 1
    assert len(output.attentions) == num_layers
    assert output.attentions[0].shape[0] == 3 and output.attentions[0].shape[2:] == (7, 7)
    labels = torch.tensor([0, 1, 1])
    loss, logits, exit_logits, embeddings = model(INPUTS, MASK, labels=labels, return_dict=False)
    assert loss.ndim == 0 and torch.equal(logits, plain.logits)
    assert torch.equal(exit_logits, plain.exit_logits)
    assert torch.equal(embeddings, plain.exit_embeddings)


def test_outputs_asked_for_in_the_configuration(directory: str) -> None:
    model = load(directory, output_hidden_states=True)
    assert len(model(INPUTS % 20, MASK).hidden_states) == 3
    assert isinstance(load(directory, return_dict=False)(INPUTS % 20, MASK), tuple)


def test_attentions_that_the_encoder_does_not_give(directory: str) -> None:
    with pytest.raises(ValueError, match='output_attentions=True.*attn_implementation="eager"'):
        load(directory, attn_implementation="sdpa")(INPUTS % 20, MASK, output_attentions=True)


@pytest.mark.parametrize(
    "labels", [torch.tensor([0.0, 1.0, 1.0]), torch.ones(3, 2), torch.ones(3, 1, dtype=torch.long)]
)
def test_labels_that_are_no_class_indices(labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="labels has shape .* one class index per text"):
        small_model()(INPUTS, MASK, labels=labels)


@pytest.mark.parametrize("config_class", [BertConfig, ModernBertConfig])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reaches_every_part(
    config_class: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = small_model(config_class, learned_exit=True)
    expected = model(INPUTS, MASK).logits
    model.save_pretrained(tmp_path / "float32")
    model.to(dtype).save_pretrained(tmp_path / "half")
    config = model.config
    models = {
        "asked for": load(str(tmp_path / "float32"), dtype=dtype),
        "as saved": load(str(tmp_path / "half"), dtype="auto"),
        "cast": load(str(tmp_path / "float32")).to(dtype),
        "configured": MultiExitForSequenceClassification._from_config(config, dtype=dtype),
    }
    for name, half in models.items():
        assert {parameter.dtype for parameter in half.parameters()} == {dtype}, name
        logits = half.eval()(INPUTS, MASK).logits
        assert logits.dtype == dtype
        if name != "configured":
            torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.05)
            assert half.early_exit(BATCH, "entropy", threshold=0.9).predictions.shape == (3,)
    restored = load(str(tmp_path / "half"), dtype=torch.float32)
    assert {parameter.dtype for parameter in restored.parameters()} == {torch.float32}


def test_exits_have_the_dtype_of_the_encoder_they_are_put_on() -> None:
    encoder = small_model().backbone.to(torch.bfloat16)
    config = MultiExitConfig(encoder.config, exit_layers=[1, 3])
    model = MultiExitForSequenceClassification(config, encoder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_attention_implementation_reaches_the_encoder(directory: str) -> None:
    model = load(directory, attn_implementation="eager")
    assert model.backbone.config._attn_implementation == "eager"
    default = load(directory)
    assert default.backbone.config._attn_implementation == "sdpa"
    # A configuration made from a loaded encoder's leaves the encoder as it is.
    MultiExitConfig(default.backbone.config, exit_layers=[1])
    assert default.backbone.config._attn_implementation == "sdpa"
    torch.testing.assert_close(default(INPUTS % 20, MASK).logits, model(INPUTS % 20, MASK).logits)
    model.set_attn_implementation("sdpa")
    assert model.backbone.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("config_class", [BertConfig, DistilBertConfig, ModernBertConfig])
def test_resized_embeddings_are_saved_and_loaded(config_class: Any, tmp_path: Path) -> None:
    model = small_model(config_class)
    model.resize_token_embeddings(71)
    assert model.get_input_embeddings().num_embeddings == 71
    assert model.config.backbone_config.vocab_size == 71
    model.save_pretrained(tmp_path)
    inputs = INPUTS + 45
    torch.testing.assert_close(load(str(tmp_path))(inputs, MASK).logits, model(inputs, MASK).logits)


@pytest.mark.parametrize("config_class", [BertConfig, ModernBertConfig])
def test_gradients_with_checkpointing(config_class: Any) -> None:
    model = small_model(config_class, exit_dropout=0.0)
    labels = torch.tensor([0, 1, 1])
    model(INPUTS, MASK, labels=labels).loss.backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()
    model(INPUTS, MASK, labels=labels).loss.backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, expected[name], msg=name)


@pytest.mark.parametrize(
    "code",
    [
        "import fusedacl.engine\nassert not {'torch', 'transformers'} & set(sys.modules)",
        "import fusedacl.engine\nfrom transformers import GenerationMixin, Trainer",
        "from transformers import AutoConfig\nimport fusedacl.engine",
    ],
    ids=["alone", "transformers is used first", "transformers was imported before"],
)
def test_auto_classes_after_the_import(code: str, directory: str) -> None:
    check_in_a_new_process(code, directory)


def test_auto_classes_and_a_pipeline_when_the_engine_is_used_first(directory: str) -> None:
    """A pipeline finds its model as the auto classes do; most that it imports is here already."""
    answer = f'pipeline("text-classification", {directory!r})("a dog")'
    check_in_a_new_process(
        "from fusedacl.engine import train", directory,
        f"from transformers import pipeline\nassert {answer}[0]['label']",
    )  # fmt: skip


def check_in_a_new_process(code: str, directory: str, further: str = "") -> None:
    uses = f"""
from transformers import AutoConfig, AutoModelForSequenceClassification

config = AutoConfig.from_pretrained({directory!r})
assert config.exit_layers == [1, 2], config
model = AutoModelForSequenceClassification.from_pretrained({directory!r})
from fusedacl.engine import MultiExitConfig, MultiExitForSequenceClassification
assert type(config) is MultiExitConfig and type(model) is MultiExitForSequenceClassification
assert type(AutoConfig.for_model("fusedacl_multi_exit", exit_head="linear")) is MultiExitConfig
"""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}{uses}{further}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_sentence_transformers(directory: str, tmp_path: Path) -> None:
    """A model for pairs is a CrossEncoder; the encoder alone makes sentence embeddings."""
    from sentence_transformers import CrossEncoder, SentenceTransformer

    pairs = [(text, random.Random(index).choice(TEXTS)) for index, text in enumerate(TEXTS[:9])]
    model, tokenizer = load(directory), AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    scores = CrossEncoder(directory, device="cpu").predict(pairs, batch_size=4, apply_softmax=True)
    with torch.no_grad():
        expected = model(**batch).logits.softmax(dim=-1)
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-4, atol=1e-5)
    model.backbone.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS[:3])
    batch = tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.backbone(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    means = (states * mask).sum(dim=1) / mask.sum(dim=1)
    np.testing.assert_allclose(rows, means.numpy(), rtol=1e-3, atol=1e-4)
