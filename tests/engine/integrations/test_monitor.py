"""AngleMonitor in a plain loop and in a Trainer whose loss calls it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fusedacl.engine import AngleMonitor, GradientGate
from torch import Tensor, nn
from trainer_cases import collate, losses_of, plain_model, rows, steps, trainer_of
from transformers import Trainer, TrainingArguments


def two_losses(net: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    outputs = net(torch.randn(16, 5, generator=torch.manual_seed(seed)))
    return outputs.square().mean(), outputs.sin().mean()


def test_the_angle_is_that_of_the_gate_and_nothing_else_changes() -> None:
    net = nn.Linear(5, 4)
    monitor = AngleMonitor(net.parameters(), every=2)
    found = []
    for seed in range(4):
        pair = two_losses(net, seed)
        found.append(monitor.measure(*pair))
        assert all(p.grad is None for p in net.parameters())
        wanted = GradientGate(net.parameters()).backward(*pair).angle[0]
        net.zero_grad()
        if seed % 2 == 0:
            torch.testing.assert_close(found[-1], wanted, rtol=1e-5, atol=1e-3)
    assert [angle is None for angle in found] == [False, True, False, True]


def test_mistakes_are_refused() -> None:
    net = nn.Linear(5, 4)
    with pytest.raises(ValueError, match="every=0 steps"):
        AngleMonitor(net.parameters(), every=0)
    with pytest.raises(ValueError, match="none has requires_grad=True"):
        AngleMonitor([nn.Parameter(torch.zeros(2), requires_grad=False)])
    with pytest.raises(ValueError, match=r"pass model.parameters\(\)"):
        AngleMonitor().measure(*two_losses(net, 0))
    with pytest.raises(ValueError, match="neither loss depends on its parameters"):
        AngleMonitor(nn.Linear(5, 4).parameters()).measure(*two_losses(net, 0))
    with pytest.raises(ValueError, match="a loss has no graph"):
        AngleMonitor(net.parameters()).measure(two_losses(net, 0)[0], torch.zeros(()))


def test_each_training_has_the_parameters_of_its_model() -> None:
    arguments, state = SimpleNamespace(world_size=1), SimpleNamespace(global_step=0)
    monitor = AngleMonitor(every=1)
    for seed in range(2):
        net = nn.Linear(5, 4)
        monitor.on_train_begin(arguments, state, None, model=net)
        pair = two_losses(net, seed)
        wanted = GradientGate(net.parameters()).backward(*pair).angle[0]
        monitor.measure(*two_losses(net, seed))
        assert monitor.take()["angle_degrees"] == pytest.approx(wanted.item(), abs=1e-3)
    kept = AngleMonitor([net.bias], every=1)
    kept.on_train_begin(arguments, state, None, model=net)
    assert kept.parameters == [net.bias]
    with pytest.raises(ValueError, match="none of those given to AngleMonitor is in the model"):
        kept.on_train_begin(arguments, state, None, model=nn.Linear(5, 4))


def test_an_overflow_has_no_part_in_the_mean() -> None:
    net, monitor = nn.Linear(5, 4), AngleMonitor(every=1)
    monitor.on_train_begin(SimpleNamespace(world_size=1), SimpleNamespace(global_step=0), None, net)
    first, second = two_losses(net, 0)
    monitor.measure(first * float("inf"), second)
    monitor.on_step_end(None, SimpleNamespace(global_step=1), None)
    angle = monitor.measure(*two_losses(net, 0))
    assert angle is not None
    assert monitor.take()["angle_degrees"] == pytest.approx(angle.item())


class TwoLosses(Trainer):
    """A Trainer of somebody else, whose `compute_loss` tells a monitor its two losses."""

    monitor: AngleMonitor

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        main, auxiliary = (x.sum() for x in losses_of(model, inputs, "plain"))
        self.monitor.measure(main, auxiliary)
        loss = main + 0.1 * auxiliary
        return (loss, {}) if return_outputs else loss


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_logs_it(tiny_bert: Path, tmp_path: Path, accumulation: int) -> None:
    """The evaluations between, whose losses have no graph, neither count nor get it."""
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=accumulation,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        eval_strategy="steps",
        eval_steps=1,
        logging_strategy="steps",
    )
    monitor = AngleMonitor(every=3)
    trainer = TwoLosses(
        plain_model(tiny_bert), arguments, train_dataset=rows(24), data_collator=collate,
        callbacks=[monitor], eval_dataset=rows(6),
    )  # fmt: skip
    trainer.monitor = monitor
    trainer.train()
    history = trainer.state.log_history
    logged = [entry["step"] for entry in history if "angle_degrees" in entry]
    assert logged == [2, 4] and all("loss" in e for e in history if "angle_degrees" in e)
    assert sum("eval_loss" in entry for entry in history) == 4


def test_a_compiled_model_is_measured_after_steps_between(tiny_bert: Path, tmp_path: Path) -> None:
    """The second step, which is not measured, compiles anew for its shorter texts."""
    found = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.reset()
        monitor = AngleMonitor(every=2)
        lengths = iter((7, 6, 6))

        def shorter(features: Any, lengths: Any = lengths) -> Any:
            length = next(lengths, 6)
            batch = collate(features)
            return {k: v[:, :length] if v.dim() == 2 else v for k, v in batch.items()}

        options |= {"gate": "none", "callbacks": [monitor], "data_collator": shorter}
        trainer = trainer_of(plain_model(tiny_bert), tmp_path, **options)
        trainer.train()
        found.append([step.get("angle_degrees") for step in steps(trainer)])
    torch._dynamo.reset()
    for eager, compiled in zip(*found, strict=True):
        assert compiled == (eager and pytest.approx(eager, abs=0.05))


def test_a_model_compiled_for_one_backward_pass_is_refused() -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4))
    call: Any = torch.compile(net, backend="aot_eager")
    two_losses(call, 0)[0].backward()
    with pytest.raises(ValueError, match="donated_buffer = False before its first"):
        AngleMonitor(net.parameters()).measure(*two_losses(call, 0))
    torch._dynamo.reset()
