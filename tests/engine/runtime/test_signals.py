"""Which signals after the first one end a run at once."""

import signal
import time

import pytest
from fusedacl.engine.runtime.signals import ECHO_SECONDS, SignalsNoted


def test_only_a_later_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher sends SIGTERM to processes that the terminal has sent SIGINT."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with SignalsNoted() as noted:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        now += ECHO_SECONDS + 1
        signal.raise_signal(signal.SIGTERM)
        assert noted.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        noted.patient = True
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("number", "patient", "told"),
    [(signal.SIGINT, False, True), (signal.SIGINT, True, False), (signal.SIGTERM, False, False)],
)
def test_the_log_says_how_to_end_at_once(
    number: signal.Signals, patient: bool, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with SignalsNoted("saving …", patient=patient):
        signal.raise_signal(number)
    more = " (Ctrl-C again after 3 s ends without saving)" if told else ""
    assert caplog.messages == [f"{number.name}: saving …{more}"]
