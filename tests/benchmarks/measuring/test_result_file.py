"""Result files: other schemas are refused, and a busy machine marks its results as noisy."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from bench_results import case, result, times
from fusedacl.benchmarks.measuring import environment
from fusedacl.benchmarks.measuring import result_file as results
from fusedacl.benchmarks.measuring.result_file import ResultFile, noise, read_result, timings


def test_a_quiet_machine_is_not_noisy() -> None:
    found = noise(result(case("one", {"a": times(100, 0.04), "b": times(100, 0.06)}), load=0.9))
    assert found["spread"] == pytest.approx(0.05)
    assert not found["noisy"] and found["why"] == []


@pytest.mark.parametrize(
    ("spread", "load", "words"),
    [(0.6, 0.0, "times scatter by 60%"), (0.02, 1.5, "load average 1.5")],
)
def test_a_busy_machine_is_marked(spread: float, load: float, words: str) -> None:
    found = noise(result(case("one", {"a": times(100, spread)}), load=load))
    assert found["noisy"]
    assert len(found["why"]) == 1 and words in found["why"][0]


def test_what_this_program_did_itself_is_no_noise() -> None:
    """A load average from the program's own earlier run, while no other program is busy."""
    quiet = result(case("one", {"a": times(100, 0.02)}), load=2.0)
    quiet["environment"]["busy_cores"] = 0.1
    assert not noise(quiet)["noisy"]
    quiet["environment"]["busy_cores"] = 1.0
    assert noise(quiet)["why"] == ["others kept 1.0 of 2 cores busy before the run"]


def test_results_do_not_count_as_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite that runs after another one finds its new results."""
    for part in ("measuring", "results"):
        (tmp_path / "benchmarks" / part).mkdir(parents=True)
        (tmp_path / "benchmarks" / part / "file").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "--no-verify", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "benchmarks" / "measuring" / "x"))
    (tmp_path / "benchmarks" / "results" / "file").write_text("new")
    committed = environment._commit()
    assert len(committed) == 40
    (tmp_path / "benchmarks" / "measuring" / "file").write_text("new")
    assert environment._commit() == f"{committed}+changes"


def test_busy_cores_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.75 s of idle and waiting time in half a second, two cores: half a core is busy."""
    counts = tmp_path / "stat"
    counts.write_text("cpu  10 20 30 4000 500 6 7 8 9 10\ncpu0 1 2\n")
    ticks_a_second = results.os.sysconf("SC_CLK_TCK")
    assert results._idle_seconds(counts) == pytest.approx(4500 / ticks_a_second)
    idle, clock = iter([0.0, 0.75]), iter([0.0, 0.5])
    monkeypatch.setattr(results, "_idle_seconds", lambda counts: next(idle))
    monkeypatch.setattr(results.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(results.time, "perf_counter", lambda: next(clock))
    if Path("/proc/stat").is_file():
        assert results.busy_cores() == pytest.approx(0.5)


def test_times_are_named_by_case_and_provider() -> None:
    found = dict(timings(result(case("one", {"a": times(2)}), case("two", {"a": times(4)}))))
    assert {path: times["p50_ms"] for path, times in found.items()} == {
        ("one", "a"): 2, ("two", "a"): 4
    }  # fmt: skip


def test_a_file_is_whole_after_every_save(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "machine" / "loss.json", "loss", "quick", cases=[])
    file.result["cases"].append(case("one", {"a": times(2, 1.0)}))
    file.save()
    found = read_result(file.path)
    assert (found["schema"], found["benchmark"], found["preset"]) == (1, "loss", "quick")
    assert {"commit", "torch", "cpu", "load_average"} <= found["environment"].keys()
    assert found["cases"] == file.result["cases"]
    assert found["noise"]["spread"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"schema": 2, "environment": {}}), "has schema 2, this version reads schema 1"),
        (json.dumps({"environment": {}}), "has schema 0, .* measure it again"),
        (json.dumps([1]), "is not a file that fusedacl bench wrote"),
        ("{", "is not a JSON file"),
    ],
)
def test_other_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "loss.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_result(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_result(tmp_path / "none.json")
