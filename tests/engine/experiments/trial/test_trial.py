"""Trials: time, resuming, failures, with stand-in runs; once with real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.cli.main import main
from fusedacl.engine.experiments.sweep import SweepStopped
from fusedacl.engine.experiments.trial.answer import answer
from fusedacl.engine.experiments.trial.setting import Setting
from fusedacl.engine.experiments.trial.trial import Trial

Start = Callable[..., Trial]


def cells(directory: Path) -> list[dict[str, object]]:
    return json.loads((directory / "sweep.json").read_text())["cells"]


def test_as_many_draws_as_fit(world: Any, setting: Setting, start: Start, tmp_path: Path) -> None:
    trial = start(world, setting, tmp_path / "try", minutes=5)
    assert trial.run() == []
    # A fourth draw would end after 342 s.
    assert trial.draws == [70, 70, 70] and world.now == 62 + 3 * 70
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "try/pilot").exists()
    # The same command has nothing left to do; more minutes add draws.
    assert start(world, setting, tmp_path / "try", minutes=5).run() == []
    assert world.now == 272
    more = start(world, setting, tmp_path / "try", minutes=6)
    assert more.run() == [] and len(more.draws) == 4 and world.now == 342
    assert len({str(cell["seed"]) for cell in cells(tmp_path / "try")}) == 4


def test_the_longest_draw_says_whether_another_fits(
    world: Any, setting: Setting, start: Start, tmp_path: Path
) -> None:
    # Six draws would fit by the steps that were timed.
    trial = start(world, setting, tmp_path / "try", minutes=8)
    trial._measure()
    world.other_seconds = 80
    assert trial.run() == [] and trial.draws == [280]
    world.other_seconds = 10
    assert start(world, setting, tmp_path / "try", minutes=8).run() == []
    assert world.now == 62 + 280


def test_no_more_draws_than_asked_for(
    world: Any, setting: Setting, start: Start, tmp_path: Path
) -> None:
    trial = start(world, setting, tmp_path / "try", minutes=60, draws=2)
    assert trial.run() == [] and len(trial.draws) == 2


def test_too_short_a_time_says_how_much_it_takes(
    world: Any, setting: Setting, start: Start, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="minutes=1 is too short: one draw of CE, CE.SCL") as told:
        start(world, setting, tmp_path / "try", minutes=1).run()
    words = str(told.value)
    assert "about 1.2 minutes here (10 steps of 1 s for CE, 1 s for CE+SCL, 2 s for ACL" in words
    assert "30 s to start and evaluate" in words
    assert "--minutes 3 for one draw, 4 for two" in words
    assert not (tmp_path / "try" / "cells").exists() and world.now == 62
    # What it named is enough, although the steps are timed again, once.
    for minutes in (3, 4):
        trial = start(world, setting, tmp_path / "try", minutes=minutes)
        assert trial.run() == [] and len(trial.draws) == minutes - 2
        one_draw = "in a single draw, which has no interval: not clear. For a second one: "
        is_there = any(one_draw + "--minutes 4." in line for line in answer(trial, 0.5))
        assert is_there == (minutes == 3)
    assert world.now == 2 * 62 + 2 * 70


@pytest.mark.parametrize("runs", [0, 1, 3, 4, 6, 8])
def test_an_interrupted_trial_ends_like_another(
    world: Any, make_world: Any, setting: Setting, start: Start, tmp_path: Path, runs: int
) -> None:
    """Interrupted while steps are timed, which is repeated, within draws and between them."""
    stopped = tmp_path / "stopped"
    world.stop_after = runs
    first = start(world, setting, stopped)
    with pytest.raises(SweepStopped, match=r"SIGINT.*go on in .*/stopped\.$") as told:
        first.run()
    assert told.value.exit_code == 130
    # The complete draws already have an answer; of the 8 runs, three timed the methods.
    so_far = answer(first, 0.5)
    assert len(so_far) == (6 if runs >= 6 else 0)
    if runs == 8:
        assert so_far[0].startswith("opinions: 1 draw of") and "in a single draw" in so_far[2]
    resumed = start(world, setting, stopped, minutes=5 if runs > 2 else 5.3)
    assert resumed.run() == []
    whole = make_world(scores=world.scores)
    other = start(whole, setting, tmp_path / "whole")
    assert other.run() == []
    assert cells(stopped) == cells(tmp_path / "whole")
    if runs > 2:
        assert resumed.draws == other.draws and answer(resumed, 0.5) == answer(other, 0.5)
        assert len(set(world.trained)) == len(world.trained)  # nothing twice


def test_a_failed_run_ends_the_trial_and_is_tried_again(
    world: Any, setting: Setting, start: Start, tmp_path: Path
) -> None:
    trial = start(world, setting, tmp_path / "try", draws=1)
    trial._measure()
    world.failing = ("ACL",)
    assert trial.run() == ["opinions, ACL, seed 1: exit status 1: no memory"]
    assert trial.draws == [] and answer(trial, 0.5) == []
    world.failing = ()
    again = start(world, setting, tmp_path / "try", minutes=10, draws=2)
    assert again.run() == [] and len(again.draws) == 2
    assert world.trained.count("opinions, CE, seed 1") == 1


def test_what_the_first_runs_refuse_is_a_mistake(
    world: Any, setting: Setting, start: Start, tmp_path: Path
) -> None:
    world.failing, world.failure = ("CE",), "exit status 2: fusedacl train: no such encoder"
    with pytest.raises(ValueError, match="no such encoder"):
        start(world, setting, tmp_path / "try").run()
    world.failure = "exit status 1: no memory"
    assert start(world, setting, tmp_path / "try").run() == [
        "opinions, CE, seed 0: exit status 1: no memory"
    ]


def test_the_largest_set_that_leaves_time_for_four_draws(
    world: Any, start: Start, tmp_path: Path
) -> None:
    options = {"task_name": "mine", "model_name_or_path": "bert"}
    setting = Setting(options, frozenset(), 3500, 200, (3000, 500), 0.5, "0")
    for minutes, per_class in ((92, None), (91, 1000), (40, 500), (32, 200)):
        trial = start(world, setting, tmp_path / str(minutes), minutes=minutes)
        trial._measure()
        trial._choose_size()
        left = 60 * minutes - 62
        assert trial.record["per_class"] == per_class
        assert 4 * trial.draw_seconds(trial.size) <= left
    # Less than four draws of the shortest runs: as many as fit.
    few = start(world, setting, tmp_path / "few", minutes=18)
    few._measure()
    few._choose_size()
    assert 2 * few.draw_seconds(few.size) <= 18 * 60 - 62 < 3 * few.draw_seconds(few.size)


def test_texts_that_the_pilot_is_not_evaluated_on_take_time_too(
    world: Any, setting: Setting, start: Start, tmp_path: Path
) -> None:
    trial = start(world, replace(setting, num_evaluated=1300), tmp_path / "try")
    trial._measure()
    # 800 more texts, of which cross-entropy trains 32 in a second.
    assert trial.record["other_seconds"] == dict.fromkeys(("CE", "CE+SCL", "ACL"), 10 + 25.0)
    assert trial.draw_seconds(trial.setting.size(None)) == 3 * 35 + 40 and world.now == 62


def test_a_draw_that_just_fitted_and_no_longer_does_is_told(
    world: Any, setting: Setting, start: Start, tmp_path: Path
) -> None:
    trial = start(world, setting, tmp_path / "try", minutes=2.2)
    trial._measure()
    trial._choose_size()
    world.now += 0.001
    with pytest.raises(ValueError, match="minutes=2.2 is too short: .* --minutes 3 for one draw"):
        trial.run()
    again = start(world, setting, tmp_path / "try", minutes=3)
    assert again.run() == [] and len(again.draws) == 1


def test_the_directory_of_something_else_is_refused(
    world: Any, setting: Setting, start: Start, opinions: Any, tmp_path: Path
) -> None:
    (tmp_path / "pilot").mkdir()
    with pytest.raises(ValueError, match="holds something else than a trial"):
        start(world, setting, tmp_path)
    directory = tmp_path / "try"
    start(world, setting, directory).run()
    changed = opinions(learning_rate=1e-3)
    with pytest.raises(ValueError, match="or data .learning_rate: None then, 0.001 now"):
        start(world, changed, directory)
    with pytest.raises(ValueError, match="texts and labels: '.*' then, 'another' now"):
        start(world, replace(setting, content="another"), directory)
    (directory / "trial.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the record of a trial"):
        start(world, setting, directory)
    for minutes, draws, message in ((0, 1, "minutes=0"), (float("nan"), 1, "nan"), (1, 0, "draws")):
        with pytest.raises(ValueError, match=message):
            start(world, setting, tmp_path / "new", minutes, draws)


def test_a_real_trial(
    tiny_bert: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command with real runs whose warm-up is longer than the pilot, and its page."""
    directory, config = tmp_path / "try", tmp_path / "config.yaml"
    config.write_text(f"task_name: opinions\ndata_dir: {tiny_data}\nmax_steps: 9\n")
    arguments = ["try", str(config), "--model_name_or_path", str(tiny_bert)]
    arguments += ["--max_seq_length", "16", "--output_dir", str(directory), "--draws", "1"]
    arguments += ["--warmup_steps", "9", "--disable_tqdm"]
    assert main([*arguments, "--minutes", "60"]) == 0
    shown = capsys.readouterr().out
    assert "opinions: 1 draw of 64 training texts, 9 steps a run, evaluated on 24 texts." in shown
    assert "ACL over CE: " in shown and "in a single draw, which has no interval" in shown
    assert "Price: a step of ACL " in shown and "contrastive gradients; mean angle" in shown
    page = (directory / "report" / "index.html").read_text()
    assert f"page: {directory / 'report' / 'index.html'}" in shown
    assert "in a single draw, which has no interval" in page and "Gate angles: opinions" in page
