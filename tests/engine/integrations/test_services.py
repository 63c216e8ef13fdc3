"""ACLTrainer with what Trainer reports to, pushes to and is searched by."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fusedacl.engine import MultiExitForSequenceClassification
from trainer_cases import exit_model, plain_model, rows, trainer_of


class LocalHub:
    """A stand-in for the client of the hub, whose repositories are folders."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def create_repo(self, name: str, **options: Any) -> Any:
        (self.directory / name).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> str:
        shutil.copytree(folder_path, self.directory / repo_id, dirs_exist_ok=True)
        return repo_id


def test_the_model_is_pushed_with_its_options(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = LocalHub(tmp_path / "hub")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    trainer = trainer_of(
        exit_model(tiny_bert),
        tmp_path / "run",
        max_steps=1,
        push_to_hub=True,
        hub_model_id="me/exits",
        hub_strategy="end",
    )
    trainer.train()
    trainer.push_to_hub()
    pushed = hub.directory / "me" / "exits"
    found = MultiExitForSequenceClassification.from_pretrained(pushed)
    assert found.exit_layers == [1, 2]
    assert (pushed / "README.md").exists()


def test_our_options_are_searched(tiny_bert: Path, tmp_path: Path) -> None:
    seen = []

    def make() -> Any:
        model = plain_model(tiny_bert)
        seen.append(model)
        return model

    trainer = trainer_of(
        None, tmp_path, model_init=make, max_steps=1, objective="scl", eval_dataset=rows(6)
    )
    weights = []

    def space(trial: Any) -> dict[str, Any]:
        weights.append(trial.suggest_float("aux_weight", 0.1, 0.9))
        return {"aux_weight": weights[-1], "gate": trial.suggest_categorical("gate", ["angle"])}

    best = trainer.hyperparameter_search(space, n_trials=2, backend="optuna")
    assert best.hyperparameters["aux_weight"] in weights
    assert "angle_degrees" in trainer.state.log_history[0]
    assert not any(model.classifier._forward_hooks or model._forward_hooks for model in seen)


def test_tensorboard_gets_the_angles(tiny_bert: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(plain_model(tiny_bert), tmp_path, report_to="tensorboard")
    trainer.train()
    (events,) = tmp_path.rglob("events.out.tfevents*")
    found = EventAccumulator(str(events))
    found.Reload()
    assert {"train/angle_degrees", "train/gate_kept", "train/loss_aux"} <= set(
        found.Tags()["scalars"]
    )
