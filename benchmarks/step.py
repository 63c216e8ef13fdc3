"""Time of a training step, MiniLM (6 layers, 384 wide) in float32 on the CPU.

    python -m fusedacl.benchmarks.step [--quick]

Our trainer with plain cross-entropy beside the Hugging Face Trainer on the same model class,
weights, texts, batch size and optimizer; then what CE+SCL, ACL-Embed and its gradient gate (a
second backward pass and the angle check) add to it. Every text has the same number of tokens. A
sample is the time from the end of one step to the end of the next, batching included; the
contestants take turns, several steps each. Before anything is timed, the mean cross-entropy of
both trainers' first steps must agree.
"""

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from ..engine.config import TrainingConfig
from ..engine.loading import load_tokenizer
from ..engine.modeling import MultiExitForSequenceClassification
from ..engine.quickstart import LABEL_NAMES, minilm_path, quickstart_splits
from ..engine.trainer import Trainer
from .measure import Result, command_line, interleave_samples, ratio, write

BATCH_SIZE = 32
NUM_TOKENS = 48
LEARNING_RATE = 1e-4
# The two trainers draw the texts in another order, so their losses agree roughly.
MAX_LOSS_DIFFERENCE = 0.1
VARIANTS: dict[str, dict[str, Any]] = {
    "fusedacl_ce": {"objective": "ce"},
    "fusedacl_scl": {"objective": "scl"},
    "fusedacl_acl_ungated": {"objective": "acl", "gate": "none"},
    "fusedacl_acl": {"objective": "acl", "gate": "angle"},
}
HUGGING_FACE = "hugging_face_ce"


def main() -> None:
    arguments = command_line(__doc__)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        rounds, steps = (1, 3) if arguments.quick else (3, 6)
        result = training_step(Path(directory), rounds=rounds, steps=steps)
    if not arguments.quick:
        write(result, arguments.output_dir / "step.json")


def training_step(directory: Path, rounds: int, steps: int) -> Result:
    rows = equally_long_texts()
    train_file = directory / "train.jsonl"
    train_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    contestants = {HUGGING_FACE: HuggingFace(rows, directory)} | {
        name: Ours(train_file, directory / name, options) for name, options in VARIANTS.items()
    }
    losses = check(contestants, num_steps=6)
    times = interleave_samples(
        # The first step of a turn warms up.
        {name: partial(contestant.run, steps + 1) for name, contestant in contestants.items()},
        rounds=rounds,
        skip=1,
    )
    result = {
        "shape": {"batch": BATCH_SIZE, "tokens": NUM_TOKENS, "model": "MiniLM, 6 x 384"},
        "mean_losses_of_6_steps": losses,
        "times": times,
        "throughput_over_hugging_face": ratio(times, HUGGING_FACE, "fusedacl_ce"),
        "scl_over_ce": ratio(times, "fusedacl_scl", "fusedacl_ce"),
        "acl_ungated_over_ce": ratio(times, "fusedacl_acl_ungated", "fusedacl_ce"),
        "acl_over_ce": ratio(times, "fusedacl_acl", "fusedacl_ce"),
    }
    print(
        f"{BATCH_SIZE} x {NUM_TOKENS} tokens, CE: {times['fusedacl_ce']['p50_ms']:.0f} ms a step, "
        f"{result['throughput_over_hugging_face']:.2f}x the throughput of the Hugging Face "
        f"Trainer; time over CE: CE+SCL {result['scl_over_ce']:.2f}, ACL without gate "
        f"{result['acl_ungated_over_ce']:.2f}, ACL {result['acl_over_ce']:.2f}"
    )
    return result


def equally_long_texts() -> list[dict[str, Any]]:
    """Labelled pairs, each so long that truncation leaves NUM_TOKENS tokens."""
    return [
        {
            "sentence1": f"{row['sentence1']} " * NUM_TOKENS,
            "sentence2": f"{row['sentence2']} " * NUM_TOKENS,
            "label": LABEL_NAMES[int(row["label"])],
        }
        for row in quickstart_splits(num_train=640)["train"]
    ]


class Ours:
    """Our trainer; every run starts from the pretrained weights."""

    def __init__(self, train_file: Path, output_dir: Path, options: dict[str, Any]) -> None:
        self.options = {
            "train_file": str(train_file),
            "model_name_or_path": str(minilm_path()),
            "output_dir": str(output_dir),
            "overwrite_output_dir": True,
            "max_seq_length": NUM_TOKENS,
            # The losses of all steps are compared.
            "logging_steps": 1,
            "per_device_train_batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "contrastive_reduction": "sum",
            "save_steps": 0,
            "disable_tqdm": True,
            "device": "cpu",
            **options,
        }
        self.loss = float("nan")

    def run(self, num_steps: int) -> list[float]:
        """Seconds of each step."""
        trainer = _TimedTrainer(TrainingConfig.create(**self.options, max_steps=num_steps))
        trainer.run()
        self.loss = sum(trainer.step_losses) / num_steps
        return trainer.step_seconds


class _TimedTrainer(Trainer):
    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(config)
        self.step_seconds: list[float] = []
        self.step_losses: list[float] = []
        self._last = time.perf_counter()

    def _train_step(self, *arguments: Any) -> None:
        super()._train_step(*arguments)
        now = time.perf_counter()
        self.step_seconds.append(now - self._last)
        self._last = now

    def _record(self, *arguments: Any) -> dict[str, Any]:
        record = super()._record(*arguments)
        self.step_losses.append(record["loss_ce"])
        return record


class HuggingFace(transformers.TrainerCallback):
    """The Hugging Face Trainer with the same model class; the loss is the model's own."""

    def __init__(self, rows: list[dict[str, Any]], directory: Path) -> None:
        self.tokenizer = load_tokenizer(str(minilm_path()))
        self.directory = directory
        self.features = [
            {
                **self.tokenizer(
                    row["sentence1"], row["sentence2"], truncation=True, max_length=NUM_TOKENS
                ),
                "labels": LABEL_NAMES.index(row["label"]),
            }
            for row in rows
        ]
        self.seconds: list[float] = []
        self.loss = float("nan")
        self._last = 0.0

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    def on_log(self, *arguments: Any, logs: dict[str, float] | None = None, **options: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def run(self, num_steps: int) -> list[float]:
        """Seconds of each step."""
        torch.manual_seed(42)
        arguments = transformers.TrainingArguments(
            output_dir=str(self.directory / "hugging_face"),
            max_steps=num_steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            warmup_steps=round(0.1 * num_steps),
            weight_decay=0.01,
            optim="adamw_torch_fused",
            use_cpu=True,
            save_strategy="no",
            logging_steps=num_steps,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=MultiExitForSequenceClassification.from_encoder(
                str(minilm_path()), label_names=LABEL_NAMES
            ),
            args=arguments,
            train_dataset=self.features,
            data_collator=transformers.DataCollatorWithPadding(self.tokenizer),
            callbacks=[self],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        self.seconds = []
        self._last = time.perf_counter()
        trainer.train()
        return self.seconds


def check(contestants: dict[str, Any], num_steps: int) -> dict[str, float]:
    """Refuses to time trainers that do not learn the same; returns their mean losses."""
    losses = {}
    for name in tqdm((HUGGING_FACE, "fusedacl_ce"), desc="check", leave=False):
        contestants[name].run(num_steps)
        losses[name] = contestants[name].loss
    difference = abs(losses[HUGGING_FACE] - losses["fusedacl_ce"])
    if not difference < MAX_LOSS_DIFFERENCE:
        raise SystemExit(f"the trainers' losses differ by {difference:.3f}: not timed")
    return losses


if __name__ == "__main__":
    main()
