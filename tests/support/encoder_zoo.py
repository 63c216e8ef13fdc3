"""Every kind of model that could be taken for an encoder of texts, tiny, random and tried out.

    python -m encoder_zoo docs/encoders.md     (with tests/support on PYTHONPATH)

writes what happened to each into the table of the page.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine import EarlyExit, EvaluationConfig, evaluate
from fusedacl.engine.config.commands import InferenceOptions
from fusedacl.engine.config.fields import build
from fusedacl.engine.data.batching import EncodedSplit
from fusedacl.engine.data.columns import TextSplit
from fusedacl.engine.inference.logits import predict_logits
from fusedacl.engine.model.generic_layers import GenericLayers
from fusedacl.engine.model.multi_exit import MultiExitForSequenceClassification
from fusedacl.engine.model.saved import TrainedModel
from tiny_runs import options_of, run
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

NUM_LAYERS = 3
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 28,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
}
BART = {
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_layers": 1,
}
T5 = {"d_kv": 16, "d_ff": 48, "num_decoder_layers": 1, "num_experts": 2}
GROUPED = {"num_key_value_heads": 1, "head_dim": 16}
# Model type -> what its configuration takes beside SIZES; None leaves a size out.
CONFIGS: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "bart": BART,
    "bert": {},
    "bert-generation": {},
    "big_bird": {},
    "bigbird_pegasus": BART,
    "blenderbot": BART,
    "blenderbot-small": BART,
    "bloom": {},
    "camembert": {},
    "canine": {"num_hash_buckets": 64},
    "clip_text_model": {},
    "convbert": {"embedding_size": 32},
    "cpmant": {"dim_ff": 48, "dim_head": 16},
    "ctrl": {"dff": 48},
    "data2vec-text": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "distilbert": {"dim": 32, "hidden_dim": 48},
    "electra": {"embedding_size": 16},
    "ernie": {},
    "esm": {"position_embedding_type": "rotary", "mask_token_id": 4},
    "eurobert": {"num_key_value_heads": 2},
    "falcon": {},
    "flaubert": {},
    "fnet": {},
    "fsmt": {**BART, "langs": ["en", "de"], "src_vocab_size": 28, "tgt_vocab_size": 28},
    "funnel": {
        "num_hidden_layers": None, "block_sizes": [1, 2], "block_repeats": [1, 1], "d_model": 32,
        "n_head": 2, "d_head": 16, "d_inner": 48, "num_decoder_layers": 1,
        "architectures": ["FunnelModel"],
    },
    "gpt2": {},
    "gpt_neox": {},
    "ibert": {},
    "layoutlm": {"max_2d_position_embeddings": 32},
    "led": {**BART, "attention_window": 4, "max_encoder_position_embeddings": 64},
    "llama": {},
    "longformer": {"attention_window": 4},
    "longt5": T5,
    "lxmert": {},
    "m2m_100": BART,
    "mamba": {},
    "marian": {**BART, "decoder_vocab_size": 28},
    "markuplm": {"xpath_unit_hidden_size": 4},
    "mbart": BART,
    "megatron-bert": {},
    "mistral": GROUPED,
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2},
    "mpnet": {},
    "mra": {},
    "mt5": T5,
    "mvp": BART,
    "nomic_bert": {},
    "nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "pegasus": BART,
    "pegasus_x": {**BART, "block_size": 4, "num_global_tokens": 2},
    "plbart": BART,
    "prophetnet": {
        "num_hidden_layers": None, "num_encoder_layers": NUM_LAYERS, "num_decoder_layers": 1,
        "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    },
    "qwen3": GROUPED,
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "roberta": {},
    "roberta-prelayernorm": {},
    "roc_bert": {
        "pronunciation_vocab_size": 28, "shape_vocab_size": 28, "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "roformer": {"embedding_size": 32},
    "splinter": {},
    "squeezebert": {"embedding_size": 32, **dict.fromkeys(
        ("q_groups", "k_groups", "v_groups", "post_attention_groups", "intermediate_groups",
         "output_groups"), 1,
    )},
    "switch_transformers": T5,
    "t5": T5,
    "umt5": T5,
    "visual_bert": {"visual_embedding_dim": 8},
    "xglm": {"ffn_dim": 48, "attention_heads": 2},
    "xlm": {},
    "xlm-roberta": {},
    "xlm-roberta-xl": {},
    "xlnet": {"max_position_embeddings": None, "d_inner": 48, "d_head": 16},
    "xmod": {"default_language": "en_XX"},
    "yoso": {},
}  # fmt: skip
TEXTS = TextSplit(
    ["the red dog", "a big old cat sleeps near the green river", "bad", "good bird sings"], None
)


def write_encoder(model_type: str, directory: Path, tokenizer: Path) -> None:
    """Write a tiny encoder of this type beside the tokenizer of another directory."""
    chosen = {**SIZES, **CONFIGS[model_type]}
    options = {name: value for name, value in chosen.items() if value is not None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **options)
    AutoModel.from_config(config).save_pretrained(directory)
    # The type's own class of tokenizers would want files of its own.
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    PreTrainedTokenizerFast(
        tokenizer_object=loaded.backend_tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **loaded.special_tokens_map,
    ).save_pretrained(directory)


def try_encoder(model_type: str, tokenizer: Path, data: Path, directory: Path) -> list[str]:
    """Train, evaluate, predict and leave early; return the cells of the table's row.

    Raises:
        AssertionError: an answer is wrong, or a refusal came after training had begun.
    """
    write_encoder(model_type, directory / "encoder", tokenizer)
    refusals = {}
    for strategy in ("single", "two_stage"):
        output_dir = directory / strategy
        options = options_of(directory / "encoder", data, output_dir, strategy=strategy)
        try:
            results = run(options, max_steps=2, save_steps=0)
        except ValueError as error:
            assert not output_dir.exists(), f"{model_type} was refused after its training had begun"
            refusals[strategy] = str(error)
            continue
        config = {
            "model_name_or_path": str(output_dir), "task_name": "opinions", "data_dir": str(data),
            "disable_tqdm": True,
        }  # fmt: skip
        again, told = evaluate(build(EvaluationConfig, config)), results["metrics"]
        for layer, scores in told["validation"].items():
            assert again["validation"][layer] == pytest.approx(scores, abs=1e-5), model_type
    if "single" in refusals:
        assert refusals.keys() == {"single", "two_stage"}
        return [f"`{model_type}`", "refused", _reason(refusals["single"])]
    if refusals:
        return [f"`{model_type}`", "last layer only", _reason(refusals["two_stage"])]
    return [f"`{model_type}`", *_leave_early(directory / "two_stage")]


def _leave_early(path: Path) -> tuple[str, str]:
    """How texts leave early, after comparing the answers with those of the full model."""
    trained = TrainedModel(InferenceOptions(model_name_or_path=str(path)), None)
    model, encoded = trained.model, trained.encode(TEXTS, "texts")
    assert isinstance(model, MultiExitForSequenceClassification)
    pad = trained.tokenizer.pad_token_id
    probabilities = predict_logits(model, encoded, 4, pad_token_id=pad).softmax(-1)  # [E, n, K]
    certainties = probabilities[:-1].amax(-1)
    # Nobody leaves early; some do, with a threshold that rounding does not reach; all do.
    ordered = certainties.flatten().sort().values
    widest = ordered.diff().argmax()
    for threshold in (1.0, float(ordered[widest : widest + 2].mean()), 0.0):
        engine = EarlyExit(model, "max_probability", threshold=threshold)
        for batch_size in (1, 4) if not engine.layers.depends_on_batch else (4,):
            _compare(engine, encoded, batch_size, pad, probabilities, certainties > threshold)
    served = model.early_exit(
        trained.tokenizer(TEXTS.first, padding=True, return_tensors="pt"),
        "max_probability",
        threshold=1.0,
    )
    torch.testing.assert_close(served.probabilities, probabilities[-1], rtol=0, atol=2e-5)
    notes = "its answers depend on the batch" if engine.layers.depends_on_batch else ""
    if not isinstance(engine.layers, GenericLayers):
        return "layer by layer", notes
    return ("steered" if engine.layers.plan.steered else "all layers run"), notes


def _compare(
    engine: EarlyExit,
    encoded: EncodedSplit,
    batch_size: int,
    pad_token_id: int,
    probabilities: torch.Tensor,
    leaves: torch.Tensor,
) -> None:
    last = torch.ones_like(leaves[:1])
    chosen = torch.cat([leaves, last]).int().argmax(0)  # [n], the first exit that accepts
    answers = engine.predict(encoded, batch_size, pad_token_id=pad_token_id)
    assert answers.exit_layers.tolist() == (chosen + 1).tolist()
    expected = probabilities[chosen, torch.arange(len(chosen))]
    torch.testing.assert_close(answers.probabilities, expected, rtol=0, atol=2e-5)


def _reason(error: str) -> str:
    """The part of a refusal that says why."""
    return error.split("cannot be trained here: ")[-1].split(" Choose an encoder")[0]


def table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def main(page: Path) -> None:
    """Replace the rows of the page's table."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from conftest import opinion_rows, write_bert, write_jsonl

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder in ("tokenizer", "data/opinions"):
            (root / folder).mkdir(parents=True)
        write_bert(root / "tokenizer", num_layers=2)
        write_jsonl(root / "data/opinions/train.jsonl", opinion_rows(64, seed=1))
        write_jsonl(root / "data/opinions/validation.jsonl", opinion_rows(24, seed=2))
        rows = []
        for model_type in CONFIGS:
            print(model_type, flush=True)
            cells = try_encoder(model_type, root / "tokenizer", root / "data", root / model_type)
            rows.append(table_row(cells))
            shutil.rmtree(root / model_type)
    text = page.read_text(encoding="utf-8")
    head, rule, old = text.partition("| --- | --- | --- |\n")
    after = old[len("".join(line for line in old.splitlines(True) if line.startswith("| `"))) :]
    page.write_text(f"{head}{rule}" + "\n".join(rows) + "\n" + after, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
