"""ACLTrainer and AngleMonitor on several processes, as one process on the batches of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine import AngleMonitor
from rank_pool import Ranks
from torch import Tensor, nn
from trainer_cases import exit_model, plain_model, steps, trainer_of

CLOSE = {"rel": 2e-4, "abs": 1e-5}
# Global negatives make the contrastive loss that of the batch of all ranks, so that one process
# with twice the batch does the same.
OPTIONS: dict[str, dict[str, Any]] = {
    "gate": {"negatives": "global"},
    "accumulation": {"negatives": "global", "gradient_accumulation_steps": 2, "max_steps": 2},
    "no gate": {"negatives": "global", "gate": "none"},
    "head": {"negatives": "global", "gate_scope": "head", "strategy": "single"},
    "joint": {"negatives": "global", "strategy": "joint"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_train_as_one_process_with_all_texts(
    two_ranks: Ranks, tiny_bert: Path, tmp_path: Path, name: str
) -> None:
    of_ranks = two_ranks.run(steps_of, str(tiny_bert), str(tmp_path), OPTIONS[name])
    options = {key: value for key, value in OPTIONS[name].items() if key != "negatives"}
    expected = run(str(tiny_bert), str(tmp_path), options, 6)
    for found in of_ranks:
        assert found == of_ranks[0]
        for step, wanted in zip(found, expected, strict=True):
            assert step["loss"] == pytest.approx(wanted["loss"], **CLOSE)
            assert step["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
            for key in wanted:
                if key.startswith("angle_degrees"):
                    assert step[key] == pytest.approx(wanted[key], abs=0.05)


def steps_of(rank: int, encoder: str, directory: str, options: dict[str, Any]) -> Any:
    return run(encoder, f"{directory}/{rank}", {**options, "ddp_backend": "gloo"}, 3)


def run(encoder: str, directory: str, options: dict[str, Any], size: int) -> list[dict[str, float]]:
    make = exit_model if "strategy" in options and options["strategy"] == "joint" else plain_model
    trainer = trainer_of(
        make(Path(encoder)),
        Path(directory),
        per_device_train_batch_size=size,
        train_sampling_strategy="sequential",
        **options,
    )
    trainer.train()
    return steps(trainer)


def two_losses(net: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    outputs = net(torch.randn(16, 5, generator=torch.Generator().manual_seed(seed)))
    return outputs.square().mean(), outputs.sin().mean()


def test_processes_measure_the_averaged_gradients(four_ranks: Ranks) -> None:
    torch.manual_seed(1)
    net = nn.Linear(5, 4)
    pairs = [two_losses(net, seed) for seed in range(4)]
    main, auxiliary = (torch.stack(kind).mean() for kind in zip(*pairs, strict=True))
    wanted = AngleMonitor(net.parameters()).measure(main, auxiliary)
    assert wanted is not None
    for found in four_ranks.run(angle_of_ranks):
        assert found == pytest.approx(float(wanted), abs=1e-3)


def angle_of_ranks(rank: int) -> float:
    torch.manual_seed(1)
    net = nn.Linear(5, 4)
    group = torch.distributed.group.WORLD
    angle = AngleMonitor(net.parameters(), process_group=group).measure(*two_losses(net, rank))
    assert angle is not None
    return float(angle)
