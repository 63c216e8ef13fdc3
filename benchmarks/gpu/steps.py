"""Time and memory of a training step with and without the gate, on a GPU.

    python -m fusedacl.benchmarks.gpu.steps --device cuda --output_dir DIRECTORY

A BERT-base of random weights with a linear classifier, 32 texts of 128 tokens, AdamW, autocast to
float16 with a loss scale, clipping: a loop in plain PyTorch, so that nothing but torch and
transformers is needed. The steps take turns; without the gate there is one backward pass.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.objectives.gate import GradientGate
from ...engine.runtime.text import text_table
from ...kernels import acl_loss
from ..measuring.clock import interleave_on
from ..measuring.memory import extra_device_memory
from ..measuring.result_file import ResultFile
from ..measuring.times_table import times_table
from ..suites.baselines import unscale_and_clip_

WEIGHT = 0.02
LOSS_SCALE = 1024.0
MAX_NORM = 1.0
NUM_LABELS = 2
CE, UNGATED, GATED = "CE", "CE + ACL, one backward pass", "CE + ACL, two and the gate"
KINDS = (CE, UNGATED, GATED)
ROUNDS = 12
SECONDS = 30.0
TINY: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip


class Run:
    """A model with its optimizer and one batch; `step` trains on it."""

    def __init__(self, kind: str, device: torch.device, *, tiny: bool) -> None:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        config = BertConfig(**(TINY if tiny else {}))
        self.kind, self.device = kind, device
        with device:
            self.backbone = BertModel(config, add_pooling_layer=False)
            self.classifier = nn.Linear(config.hidden_size, NUM_LABELS)
        self.parameters = [*self.backbone.parameters(), *self.classifier.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=device.type == "cuda")
        self.gate = GradientGate(self.parameters, weight=WEIGHT)
        self.batch, self.tokens = (4, 16) if tiny else (32, 128)
        self.texts = torch.randint(config.vocab_size, (self.batch, self.tokens), device=device)
        self.labels = torch.arange(self.batch, device=device) % NUM_LABELS
        self.inverse_scale = torch.full((1,), 1 / LOSS_SCALE, device=device)
        self.found_inf = torch.zeros(1, device=device)

    def losses(self) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the contrastive loss with the classifier's rows."""
        is_half = self.device.type == "cuda"
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=is_half):
            embeddings = self.backbone(self.texts).last_hidden_state[:, 0]
            logits = self.classifier(embeddings)
            main = nn.functional.cross_entropy(logits.float(), self.labels)
            if self.kind == CE:
                return main, main
            return main, acl_loss(embeddings, self.labels, self.classifier.weight)

    def step(self) -> None:
        main, auxiliary = (loss * LOSS_SCALE for loss in self.losses())
        if self.kind == GATED:
            self.gate.accumulate(main, auxiliary)
            self.gate.combine(loss_scale=LOSS_SCALE, max_norm=MAX_NORM)
        else:
            ((1 - WEIGHT) * main + WEIGHT * auxiliary).backward()
            gradients = [each.grad for each in self.parameters if each.grad is not None]
            unscale_and_clip_(gradients, self.inverse_scale, self.found_inf, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def words(self) -> str:
        shape = f"{self.batch} texts of {self.tokens} tokens"
        name = "a tiny BERT" if self.backbone.config.hidden_size < 768 else "BERT-base's shape"
        precision = "float16 with a loss scale" if self.device.type == "cuda" else "float32"
        return f"{name}, random weights, {shape}, {precision}"


def measure(device: torch.device, file: ResultFile, *, tiny: bool) -> None:
    """Time the steps in turns into the file; peak memory is beyond weights and optimizer state."""
    runs = {kind: Run(kind, device, tiny=tiny) for kind in KINDS}
    calls: dict[str, Callable[[], None]] = {kind: run.step for kind, run in runs.items()}
    # Warm up: the optimizer's state is created, and kernels are compiled.
    for call in (*calls.values(), *calls.values()):
        call()
    times = interleave_on(
        device, calls, rounds=2 if tiny else ROUNDS, sample_seconds=0.01 if tiny else 0.2,
        all_seconds=SECONDS,
    )  # fmt: skip
    for kind, call in calls.items():
        times[kind]["peak_bytes"] = extra_device_memory(call, device)
    found = {"words": runs[CE].words, "providers": times, "left_out": {}}
    file.result["cases"].append(found)
    file.save()
    print(found["words"])
    print(times_table(times, text_table))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIRECTORY")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the command")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    file = ResultFile(options.output_dir / "steps.json", "steps", "session", device, cases=[])
    measure(device, file, tiny=options.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
