"""ACLTrainer and AngleMonitor on several processes, as one process on the batches of all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.engine import AngleMonitor
from rank_pool import Ranks
from torch import Tensor, nn
from trainer_cases import exit_model, plain_model, steps, trainer_of

CLOSE = {"rel": 2e-4, "abs": 1e-5}
# How processes share the work, and options. Global negatives make the contrastive loss that of the
# batch of all ranks, so that one process with twice the batch does the same.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gate": ("ddp", {}),
    "accumulation": ("ddp", {"gradient_accumulation_steps": 2, "max_steps": 2}),
    "no gate": ("ddp", {"gate": "none"}),
    "head": ("ddp", {"gate_scope": "head", "strategy": "single"}),
    "joint": ("ddp", {"strategy": "joint"}),
    "fsdp2": ("fsdp2", {"strategy": "joint", "gradient_accumulation_steps": 2, "max_steps": 2}),
    "fsdp2, no gate": ("fsdp2", {"gate": "none", "max_steps": 2}),
    "zero 2": ("zero 2", {"strategy": "joint", "gradient_accumulation_steps": 2, "max_steps": 2}),
    "zero 3": ("zero 3", {"max_steps": 2}),
    "zero 3, no gate": ("zero 3", {"gate": "none", "max_steps": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_ranks_train_as_one_process_with_all_texts(
    two_ranks: Ranks, tiny_bert: Path, tmp_path: Path, name: str
) -> None:
    how, options = CASES[name]
    of_ranks = two_ranks.run(steps_of, str(tiny_bert), str(tmp_path), how, options)
    expected = run(tiny_bert, tmp_path, {**options, "per_device_train_batch_size": 6})
    for found in of_ranks:
        assert found == of_ranks[0]
        for step, wanted in zip(found, expected, strict=True):
            assert step["loss"] == pytest.approx(wanted["loss"], **CLOSE)
            assert step["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
            for key in wanted:
                if key.startswith("angle_degrees"):
                    assert step[key] == pytest.approx(wanted[key], abs=0.05)


def run(encoder: Path, directory: Path, options: dict[str, Any]) -> list[dict[str, float]]:
    make = exit_model if options.get("strategy") == "joint" else plain_model
    given = {"train_sampling_strategy": "sequential", **options}
    trainer = trainer_of(make(encoder), directory, **given)
    trainer.train()
    return steps(trainer)


def steps_of(rank: int, encoder: str, directory: str, how: str, options: dict[str, Any]) -> Any:
    given = {**options, "negatives": "global", "per_device_train_batch_size": 3}
    where = (Path(encoder), Path(directory) / str(rank))
    if how == "fsdp2":
        with pytest.MonkeyPatch.context() as patch:
            shard_on_the_cpu(patch)
            return run(*where, {**given, "ddp_backend": "gloo"})
    if how.startswith("zero"):
        return run_zero(int(how[-1]), *where, given)
    return run(*where, {**given, "ddp_backend": "gloo"})


def shard_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """Make Trainers use accelerate's FSDP2, which it offers on GPUs only."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from transformers import Trainer

    create = Trainer.create_accelerator_and_postprocess

    def create_sharding(self: Trainer) -> None:
        AcceleratorState._reset_state()
        create(self)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BertLayer"],
            cpu_ram_efficient_loading=False,
        )
        self.is_fsdp_enabled = True

    patch.setattr(Trainer, "create_accelerator_and_postprocess", create_sharding)
    kind = PartialState._shared_state.get("distributed_type", DistributedType.MULTI_CPU)
    patch.setitem(PartialState._shared_state, "distributed_type", kind)


def run_zero(
    stage: int, encoder: Path, directory: Path, options: dict[str, Any]
) -> list[dict[str, float]]:
    import deepspeed.ops
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # Used on a CPU only, where compiling it takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **dict.fromkeys(
            ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping"), "auto"
        ),
        "gradient_accumulation_steps": "auto",
    }
    given = {**options, "deepspeed": settings, "optim": "adamw_torch", "use_cpu": False}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # accelerate starts several processes of DeepSpeed on GPUs only.
            kind = ("gloo", DistributedType.MULTI_CPU)
            patch.setattr(PartialState, "_prepare_backend", lambda *args, **kwargs: kind)
            return run(encoder, directory, given)
    finally:
        unset_hf_deepspeed_config()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        AcceleratorState._reset_state(reset_partial_state=True)


def two_losses(net: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    outputs = net(torch.randn(16, 5, generator=torch.Generator().manual_seed(seed)))
    return outputs.square().mean(), outputs.sin().mean()


def test_processes_measure_the_averaged_gradients(two_ranks: Ranks) -> None:
    torch.manual_seed(1)
    net = nn.Linear(5, 4)
    pairs = [two_losses(net, seed) for seed in range(2)]
    main, auxiliary = (torch.stack(kind).mean() for kind in zip(*pairs, strict=True))
    wanted = AngleMonitor(net.parameters()).measure(main, auxiliary)
    assert wanted is not None
    for found in two_ranks.run(angle_of_ranks):
        assert found == pytest.approx(float(wanted), abs=1e-3)


def angle_of_ranks(rank: int) -> float:
    torch.manual_seed(1)
    net = nn.Linear(5, 4)
    group = torch.distributed.group.WORLD
    angle = AngleMonitor(net.parameters(), process_group=group).measure(*two_losses(net, rank))
    assert angle is not None
    return float(angle)
