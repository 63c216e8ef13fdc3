"""Values on their way to the host, time on the device, and masks that the host knows."""

import time
from typing import Any

import pytest
import torch
from fusedacl.engine.training import transfers
from fusedacl.engine.training.forward.padding import KnownPadding
from fusedacl.engine.training.transfers import PendingValues, Stopwatch, to_device

CPU = torch.device("cpu")


def test_values_arrive_in_their_order_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    pending, found = PendingValues(CPU), []
    arrived: set[float] = set()
    monkeypatch.setattr(
        transfers._Parcel, "has_arrived", lambda parcel: float(parcel.packed[0]) in arrived
    )
    changed = torch.tensor(1.0)
    pending.send({"number": changed, "name": "first"}, found.append)
    # The value at the time of sending counts.
    changed += 5
    rows = torch.tensor([2, 3])
    pending.send({"rows": rows, "flag": torch.tensor(True), "none": None}, found.append)
    arrived |= {2.0}
    pending.collect()
    assert found == []
    arrived |= {1.0}
    pending.collect()
    first, second = found
    assert first == {"number": 1.0, "name": "first"}
    assert second == {"rows": [2.0, 3.0], "flag": 1.0, "none": None}
    pending.send({"number": torch.tensor(7.0)}, found.append)
    pending.collect()
    assert len(found) == 2
    pending.collect(wait=True)
    assert found[2] == {"number": 7.0}


def test_an_error_leaves_what_came_after_it() -> None:
    pending, found = PendingValues(CPU), []

    def refuse(values: dict[str, Any]) -> None:
        raise FloatingPointError("Step 3")

    pending.send({"x": torch.zeros(())}, refuse)
    pending.send({"x": torch.ones(())}, found.append)
    with pytest.raises(FloatingPointError, match="Step 3"):
        pending.collect()
    assert found == []


def test_a_stopwatch_on_the_host() -> None:
    watch = Stopwatch(CPU)
    time.sleep(0.01)
    watch.stop()
    time.sleep(0.01)
    assert 0.01 <= watch.seconds() < time.monotonic() - watch._start


def test_a_tensor_of_the_cpu_stays() -> None:
    tensor = torch.ones(3)
    assert to_device(tensor, CPU) is tensor


@pytest.mark.parametrize("is_full", [True, False])
def test_the_host_answers_for_the_mask_alone(is_full: bool) -> None:
    mask = torch.tensor([[1, 0], [1, 1]])
    with KnownPadding(mask, is_full):
        assert mask.all() is is_full
        assert torch.all(mask.bool()) is mask.to(device=CPU, dtype=torch.bool).all() is is_full
        # torch answers for other tensors, of the same shape too, and along one dimension.
        assert not mask.clone().bool().all() and not mask[:1].all()
        assert mask.all(dim=1).tolist() == [False, True]
        assert torch.ones(2, 2, dtype=torch.bool).all()
    assert not mask.all()
