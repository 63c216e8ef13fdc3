"""Learning-rate schedules; what is told to those who have the wrong apex."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from fusedacl.engine import TrainingConfig
from fusedacl.engine.backends.optimizers import ScheduledAdamW, apex_fused_adam
from fusedacl.engine.config.sections import SCHEDULES
from transformers import SchedulerType, get_scheduler

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a GPU, not cpu. Use optimizer=adamw"):
        apex_fused_adam(CPU)
    # The project of that name on PyPI: a package without apex.optimizers.
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("apex", "apex.optimizers"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ValueError, match="is not NVIDIA's; .*PyPI.*pip uninstall apex"):
        apex_fused_adam(GPU)
    (tmp_path / "apex" / "optimizers.py").write_text("class FusedAdam: pass\n")
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="amp_C is missing"):
        apex_fused_adam(GPU)
    (tmp_path / "amp_C.py").touch()
    importlib.invalidate_caches()
    assert apex_fused_adam(GPU).__name__ == "FusedAdam"


NEEDED = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 3},
}


def test_all_schedules_that_depend_on_the_step_alone_can_be_had() -> None:
    others = {"reduce_lr_on_plateau", "greedy"}
    assert {kind.value for kind in SchedulerType} - others == set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("may_skip", [False, True], ids=["host", "device"])
def test_the_learning_rate_is_that_of_transformers(name: str, may_skip: bool) -> None:
    """Also where the device counts the steps, and after a state was loaded."""
    arguments = NEEDED.get(name, {})
    config = TrainingConfig.create(
        lr_scheduler_type=name, lr_scheduler_kwargs=arguments or None, warmup_steps=2
    )
    weight = torch.nn.Parameter(torch.ones(2, 2))
    theirs = get_scheduler(name, torch.optim.AdamW([weight], lr=0.5), 2, 9, arguments)
    ours = ScheduledAdamW([weight], config, 0.5, 9, CPU, may_skip=may_skip)
    for step in range(9):
        assert float(ours.learning_rate) == pytest.approx(theirs.get_last_lr()[0])
        weight.grad = torch.ones_like(weight)
        ours.step(torch.tensor(False) if may_skip else None)
        theirs.optimizer.step()
        theirs.step()
        if step == 4:
            state = ours.state_dict()
            ours = ScheduledAdamW([weight], config, 0.5, 9, CPU, may_skip=may_skip)
            ours.load_state_dict(state)


def test_beta_and_epsilon_reach_adamw() -> None:
    config = TrainingConfig.create(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    made = ScheduledAdamW([torch.nn.Parameter(torch.ones(2))], config, 0.5, 9, CPU, may_skip=False)
    assert {(group["betas"], group["eps"]) for group in made.optimizer.param_groups} == {
        ((0.8, 0.95), 1e-6)
    }
