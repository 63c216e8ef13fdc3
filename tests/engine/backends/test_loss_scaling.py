"""The loss scale after overflows and good steps, on the device and in a checkpoint."""

import pytest
import torch
from fusedacl.engine.backends import loss_scaling
from fusedacl.engine.backends.loss_scaling import LossScaler

CPU = torch.device("cpu")
OVERFLOW, GOOD = torch.tensor(True), torch.tensor(False)


@pytest.fixture
def scaler(monkeypatch: pytest.MonkeyPatch) -> LossScaler:
    monkeypatch.setattr(loss_scaling, "INITIAL_SCALE", 16.0)
    monkeypatch.setattr(loss_scaling, "GROWTH_INTERVAL", 3)
    return LossScaler(CPU, enabled=True)


def test_scale_halves_on_overflow_and_doubles_after_good_steps(scaler: LossScaler) -> None:
    scales = []
    for overflow in (OVERFLOW, GOOD, GOOD, OVERFLOW, GOOD, GOOD, GOOD, GOOD):
        scaler.update(overflow)
        scales.append(float(scaler.scale))
    assert scales == [8, 8, 8, 4, 4, 4, 8, 8]


def test_overflow_that_no_scale_can_mend_is_an_error(scaler: LossScaler) -> None:
    scaler.check(2.0**-13, overflow=True)
    with pytest.raises(FloatingPointError, match="overflows float16 even at a loss scale"):
        scaler.check(2.0**-14, overflow=True)


def test_without_scaling_every_overflow_is_an_error() -> None:
    scaler = LossScaler(CPU, enabled=False)
    scaler.update(OVERFLOW)
    assert scaler.scale == 1
    scaler.check(1.0, overflow=False)
    with pytest.raises(FloatingPointError, match="The gradient is NaN or infinite"):
        scaler.check(1.0, overflow=True)


def test_state_goes_on_in_another_scaler(scaler: LossScaler) -> None:
    scaler.update(GOOD)
    other = LossScaler(CPU, enabled=True)
    other.load_state_dict(scaler.state_dict())
    for each in (scaler, other):
        each.update(GOOD)
        each.update(GOOD)
    assert float(scaler.scale) == float(other.scale) == 32
