"""The services that receive a run's metrics, all of them on this machine, without a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fusedacl.engine.config.run_options import RunOptions, named_services
from fusedacl.engine.training.logs import services
from fusedacl.engine.training.logs.metrics_log import MetricsLog
from fusedacl.engine.training.logs.services import open_services, require_services


def send(directory: Path, name: str, **options: Any) -> None:
    """A run of two steps that is resumed after the first one."""
    made = RunOptions(output_dir=str(directory), report_to=name, **options)
    directory.mkdir(exist_ok=True)
    for resume_step, steps in ((None, (1, 2)), (1, (2, 3))):
        opened = open_services(made, {"seed": 7}, directory, resume_step)
        with MetricsLog(directory, opened, resume_step) as log:
            for step in steps:
                log.write({"step": step, "split": "train", "loss": 1 / step})
                scores = {"f1": 0.25 * step}
                log.write({"step": step, "split": "validation", "exit": 6, "metrics": scores})


class Failing(services.Service):
    """A service whose server is away from the second step on."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def log(self, values: Any, step: int) -> None:
        self.calls.append(f"log {step}")
        if step > 1:
            raise ConnectionError("the server does not answer")

    def close(self, status: str) -> None:
        self.calls.append(status)


def test_a_service_that_fails_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failing, other = Failing(), Failing()
    other.log = lambda values, step: other.calls.append(f"log {step}")  # type: ignore[method-assign]
    with (
        caplog.at_level("WARNING", logger="fusedacl"),
        MetricsLog(tmp_path, [failing, other]) as log,
    ):
        for step in (1, 2, 3):
            log.write({"step": step, "split": "train", "loss": 1.0})
    assert failing.calls == ["log 1", "log 2"]
    assert other.calls == ["log 1", "log 2", "log 3", "FINISHED"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert caplog.messages == ["Failing receives no more metrics: the server does not answer"]


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name, values in {"train/loss": [1, 1 / 2, 1 / 3], "validation/exit6/f1": [1, 2, 3]}.items():
        scale = 1 if name == "train/loss" else 0.25
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [pytest.approx((s, scale * v)) for s, v in zip((1, 2, 3), values, strict=True)]
        assert found == expected


def test_wandb_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    require_services(RunOptions(report_to="wandb"))
    send(tmp_path / "run", "wandb", project="mine")
    run_id = json.loads((tmp_path / "run" / "services.json").read_text())["wandb"]
    files = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))
    assert files
    assert any(b"validation/exit6/f1" in file.read_bytes() for file in files)


def test_mlflow_in_the_output_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    send(tmp_path / "run", "mlflow", project="mine", run_name="first")
    client = MlflowClient(f"sqlite:///{tmp_path / 'run'}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "7"
    history = client.get_metric_history(run.info.run_id, "validation/exit6/f1")
    assert {(value.step, value.value) for value in history} == {(1, 0.25), (2, 0.5), (3, 0.75)}


def test_trackio_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the functions of trackio 0.43, whose requirements contradict the tested set."""
    calls: list[Any] = []

    def init(project: str, name: str, config: dict[str, Any], resume: str, embed: bool) -> None:
        calls.append((project, name, config, resume))

    def log(metrics: dict[str, float], step: int) -> None:
        calls.append((step, metrics))

    made = SimpleNamespace(init=init, log=log, finish=lambda: calls.append("finish"))
    monkeypatch.setitem(sys.modules, "trackio", made)
    send(tmp_path / "run", "trackio")
    name = json.loads((tmp_path / "run" / "services.json").read_text())["trackio"]
    begun = ("fusedacl", name, {"seed": 7}, "allow")
    assert calls[0] == begun and calls.count(begun) == 2 and calls.count("finish") == 2
    assert calls[1] == (1, {"train/loss": 1.0})
    assert name.startswith("run-")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_services(RunOptions(report_to="none"))
    monkeypatch.setattr(services, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "trackio", "mlflow"):
        with pytest.raises(ValueError, match=rf"report_to={name}: .*'fusedacl\[{name}\]'"):
            require_services(RunOptions(report_to=name))
    with pytest.raises(ValueError, match="report_to=all: none of tensorboard, wandb"):
        require_services(RunOptions(report_to="all"))


def test_all_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = ("tensorboard", "mlflow")
    monkeypatch.setattr(services, "find_spec", lambda name: True if name in installed else None)
    assert services.chosen_services(RunOptions(report_to="all")) == list(installed)
    assert named_services("wandb, TensorBoard,wandb") == ["wandb", "tensorboard"]
    with pytest.raises(ValueError, match="'tensorbord' is no service. Did you mean 'tensorboard'"):
        named_services("wandb,tensorbord")


def test_wandb_without_a_login_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr("wandb.login", lambda prompt, verify: False)
    with pytest.raises(ValueError, match="nobody is logged in.*WANDB_MODE=offline"):
        require_services(RunOptions(report_to="wandb"))


def test_a_server_that_fails_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(prompt: bool, verify: bool) -> bool:
        if verify:
            raise RuntimeError("no network")
        return True

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("wandb.login", refuse)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://there")
    for name, words in (
        ("wandb", "no network. Check WANDB_API_KEY and the network, set WANDB_MODE=offline, or "),
        ("mlflow", "Check MLFLOW_TRACKING_URI, or leave mlflow out of report_to"),
    ):
        with pytest.raises(ValueError, match=f"^report_to={name}: the server cannot .*{words}"):
            require_services(RunOptions(report_to=name))
    # The other processes of a run send nothing.
    monkeypatch.setattr(services.processes, "rank", lambda: 1)
    require_services(RunOptions(report_to="wandb,mlflow"))


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_a_damaged_list_of_runs_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "services.json").write_text(content)
    with pytest.raises(ValueError, match=r"services.json' is damaged: .*Delete it, and they begin"):
        open_services(RunOptions(report_to="tensorboard"), {}, tmp_path, 1)


def test_a_service_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://there")
    with pytest.raises(ValueError, match="report_to=mlflow: the run cannot be begun: "):
        send(tmp_path / "run", "mlflow")


def test_a_service_that_fails_closes_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that were begun are recorded, so that resuming continues them."""
    first = Failing()

    def begin(settings: Any, runs: dict[str, str], directory: Path) -> Failing:
        runs["wandb"] = "1"
        return first

    monkeypatch.setattr(services, "WandB", begin)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://there")
    with pytest.raises(ValueError, match="report_to=mlflow"):
        send(tmp_path / "run", "wandb,mlflow")
    assert first.calls == ["FAILED"]
    assert json.loads((tmp_path / "run" / "services.json").read_text()) == {"wandb": "1"}


@pytest.mark.parametrize(
    ("error", "status"), [(FloatingPointError(), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_how_the_run_ended(error: BaseException, status: str, tmp_path: Path) -> None:
    service = Failing()
    with pytest.raises(type(error)), MetricsLog(tmp_path, [service]):
        raise error
    assert service.calls == [status]
