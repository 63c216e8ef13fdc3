"""Work of one rank: steps under DistributedDataParallel and FSDP2, with and without the gate."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import AutoModel

from ....engine.objectives.gate import GradientGate
from ....kernels import acl_loss
from ...measuring.clock import interleave_samples
from ...measuring.environment import Result

CHECK_STEPS, WARM_UP_STEPS = 3, 1
NUM_LABELS, LEARNING_RATE = 3, 2e-5


@dataclass(frozen=True)
class Case:
    """Texts of each rank and their tokens; steps of a turn, and turns of each loop."""

    model: Path
    batch: int
    tokens: int
    rounds: int
    steps: int


class Classifier(nn.Module):
    def __init__(self, model: Path) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(
            model,
            add_pooling_layer=False,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.classifier = nn.Linear(self.encoder.config.hidden_size, NUM_LABELS)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embeddings = self.encoder(input_ids=ids).last_hidden_state[:, 0].clone()
        return embeddings, self.classifier(embeddings), self.classifier.weight * 1.0


class Loop:
    """A model of its own, and its steps; angles: of every gated step."""

    def __init__(self, net: Classifier, case: Case, rank: int, sharded: bool, gated: bool) -> None:
        self.gated = gated
        self.angles: list[float] = []
        self.model: Any = copy.deepcopy(net)
        if sharded:
            from torch.distributed.fsdp import fully_shard

            mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
            for layer in self.model.encoder.encoder.layer:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        else:
            self.model = nn.parallel.DistributedDataParallel(self.model)
        self.averages = gated and not sharded
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
        group = distributed.group.WORLD if self.averages else None
        self.gate = GradientGate(parameters, process_group=group)
        self.batches = batches(case, net.encoder.config.vocab_size, rank)

    def step(self) -> Tensor:
        ids, labels = next(self.batches)
        with self.model.no_sync() if self.averages else contextlib.nullcontext():
            embeddings, logits, label_embeddings = self.model(ids)
            main = nn.functional.cross_entropy(logits, labels)
            if self.gated:
                decision = self.gate.backward(main, acl_loss(embeddings, labels, label_embeddings))
                self.angles.append(float(decision.angle))
            else:
                main.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return main.detach()

    def turn(self, steps: int) -> list[float]:
        """Seconds of each step, which all ranks begin together."""
        made = []
        for _ in range(steps):
            distributed.barrier()
            start = time.perf_counter()
            self.step()
            made.append(time.perf_counter() - start)
        return made


def batches(case: Case, vocabulary: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    while True:
        shape = (case.batch, case.tokens)
        ids = torch.randint(5, vocabulary, shape, generator=generator)
        yield ids, torch.randint(NUM_LABELS, (case.batch,), generator=generator)


# Name -> (sharded, gated).
LOOPS = {
    "ddp_ce": (False, False),
    "ddp_gate": (False, True),
    "fsdp2_ce": (True, False),
    "fsdp2_gate": (True, True),
}


def measure(rank: int, case: Case) -> Result:
    """Losses and angles of the first steps of each loop, and times in turns."""
    torch.manual_seed(0)
    net = Classifier(case.model)
    loops = {name: Loop(net, case, rank, *kind) for name, kind in LOOPS.items()}
    first = {}
    for name, loop in loops.items():
        losses = [loop.step() for _ in range(CHECK_STEPS)]
        total = torch.stack(losses)
        distributed.all_reduce(total)
        first[name] = {"losses": total.tolist(), "angles": list(loop.angles)}
    turns: dict[str, Callable[[], list[float]]] = {
        name: partial(loop.turn, case.steps + WARM_UP_STEPS) for name, loop in loops.items()
    }
    times = interleave_samples(turns, rounds=case.rounds, skip=WARM_UP_STEPS)
    return {"first": first, "times": times}
