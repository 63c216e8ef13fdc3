"""A real change is named; what the noise of a run or of the machine explains is not."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import bench_results
import pytest
from bench_results import case, rates, times
from fusedacl.benchmarks.comparing import commits
from fusedacl.benchmarks.comparing.files import (
    FASTER,
    NOT_JUDGED,
    SAME,
    SLOWER,
    changes,
    compare,
    judge,
    machine_drift,
    merged,
)
from fusedacl.benchmarks.measuring.result_file import noise


def result(gigaflops: float = 100.0, **providers: tuple[float, float]) -> dict[str, Any]:
    entries = {name: times(*value) for name, value in providers.items()}
    found = bench_results.result(
        case("supcon_loss M=64", entries), rates=rates(gigaflops, None, None)
    )
    found["noise"] = noise(found)
    return found


@pytest.mark.parametrize(
    ("old", "new", "drift", "verdict"),
    [
        ((100, 0.05), (70, 0.05), 0.0, FASTER),
        ((70, 0.05), (100, 0.05), 0.0, SLOWER),
        ((100, 0.05), (97, 0.01), 0.0, SAME),
        # As much as before, but the runs scatter.
        ((100, 0.5), (70, 0.5), 0.0, SAME),
        # The machine was that much faster itself.
        ((100, 0.05), (70, 0.05), 0.5, SAME),
        ((100, 0.0), (101, 0.0), 0.0, SAME),
    ],
)
def test_verdicts(
    old: tuple[float, float], new: tuple[float, float], drift: float, verdict: str
) -> None:
    assert judge(times(*old), times(*new), drift)["verdict"] == verdict


def test_results_side_by_side() -> None:
    old = result(fusedacl=(100, 0.02), dense=(300, 0.02))
    new = result(fusedacl=(60, 0.02), dense=(303, 0.02))
    text = compare(old, new)
    rows = [line for line in text.splitlines() if "supcon_loss" in line]
    assert "fusedacl" in rows[0] and "0.600" in rows[0] and rows[0].endswith(FASTER)
    assert "dense" in rows[1] and rows[1].endswith(SAME)
    assert "times scatter by 2.0% (old) and 2.0% (new)" in text
    assert "1 faster, 0 slower, 1 no change seen" in text


def test_what_moved_with_the_others_is_the_machine_s() -> None:
    """Ours and two others all take twice as long: nothing is said of ours; alone it is slower."""
    old = result(fusedacl=(100, 0.02), dense=(300, 0.02), peer=(500, 0.02))
    new = result(fusedacl=(195, 0.02), dense=(600, 0.02), peer=(1000, 0.02))
    alone = result(fusedacl=(195, 0.02), dense=(300, 0.02), peer=(500, 0.02))
    for each in (old, new, alone):
        for name, entry in each["cases"][0]["providers"].items():
            entry["ours"] = name == "fusedacl"
    assert [row["verdict"] for row in changes(old, new)] == [SAME, SAME, SAME]
    assert [row["verdict"] for row in changes(old, alone)] == [SLOWER, SAME, SAME]
    together = merged([old, old])
    assert [row["verdict"] for row in changes(together, merged([new]))] == [SAME, SAME, SAME]


def test_a_noisy_run_changes_nothing() -> None:
    old, new = result(fusedacl=(100, 0.02)), result(fusedacl=(60, 0.02))
    new["environment"]["load_average"] = [2.0, 2.0, 2.0]
    new["noise"] = noise(new)
    assert [row["verdict"] for row in changes(old, new)] == [NOT_JUDGED]
    text = compare(old, new)
    assert "new is noisy: load average 2.0 on 2 cores before the run." in text
    assert "1 not judged: noisy" in text


def test_another_machine_is_said_first() -> None:
    old, new = result(fusedacl=(100, 0.02)), result(gigaflops=130.0, fusedacl=(60, 0.02))
    new["environment"]["cpu"] = "y"
    text = compare(old, new)
    assert "cpu differs: x and y." in text
    assert "different machines or settings" in text
    assert machine_drift(old, new) == pytest.approx(0.3)


def test_what_cannot_be_compared() -> None:
    old, new = result(fusedacl=(1, 0.1)), result(dense=(1, 0.1))
    with pytest.raises(ValueError, match="no case in common"):
        compare(old, new)
    new["benchmark"] = "angle"
    with pytest.raises(ValueError, match="two files of one suite"):
        compare(old, new)


def test_several_runs_scatter_as_far_as_they_lie_apart() -> None:
    together = merged([result(fusedacl=(100, 0.02)), result(50.0, fusedacl=(140, 0.02))])
    assert together["rates"] == {"gigaflops": {"float32": 100.0}}
    (found,) = together["merged"].values()
    assert found["p50_ms"] == 120
    assert (found["p20_ms"], found["p80_ms"]) == pytest.approx((99, 141.4))
    (row,) = changes(together, merged([result(fusedacl=(100, 0.02))]))
    assert row["verdict"] == SAME
    (row,) = changes(together, merged([result(fusedacl=(50, 0.02))]))
    assert row["verdict"] == FASTER


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two commits whose kernels differ; nothing in it computes."""
    root = tmp_path / "checkout"
    for part in ("engine", "kernels", *commits.NEEDED):
        (root / part).mkdir(parents=True, exist_ok=True)
        (root / part / "__init__.py").touch()
    for name in commits.BUILD_FILES:
        (root / name).touch()
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    for number in (1, 2):
        (root / "kernels" / "__init__.py").write_text(f"NUMBER = {number}\n")
        commit(root)
    monkeypatch.setattr(commits, "CHECKOUT", root)
    return root


def commit(root: Path) -> None:
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "--no-verify", "-m", "x"], check=True)


def test_each_commit_is_laid_out_as_it_was(checkout: Path, tmp_path: Path) -> None:
    for name, number in (("HEAD~1", 1), ("HEAD", 2)):
        site = commits.lay_out(commits.commit_hash(name), tmp_path / name)
        kernels = (site / "fusedacl" / "kernels" / "__init__.py").read_text()
        assert kernels == f"NUMBER = {number}\n"
        assert (site / "fusedacl" / "benchmarks" / "comparing" / "commits.py").is_file()


def test_a_commit_whose_loops_were_not_compiled_is_refused(checkout: Path, tmp_path: Path) -> None:
    """It would run without them, and seem slower than it is."""
    (checkout / "kernels" / "sums.c").write_text("int x = ;\n")
    commit(checkout)
    with pytest.raises(ValueError, match="the C loops of .* in kernels were not compiled"):
        commits.lay_out(commits.commit_hash("HEAD"), tmp_path / "HEAD")


def test_an_unknown_commit_and_another_layout_are_refused(checkout: Path) -> None:
    for file in ("engine/runtime/__init__.py", "kernels/contrastive/__init__.py"):
        (checkout / file).unlink()
    with pytest.raises(ValueError, match="'no-such' is not a commit of the checkout"):
        commits.commit_hash("no-such")
    commit(checkout)
    with pytest.raises(ValueError, match="'HEAD' has no engine/runtime/: .* before they were spl"):
        commits.compare_commits(["HEAD~1", "HEAD"], "loss", [])


def test_two_commits_run_in_turns(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def run_from(site: Path, suite: str, options: list[str], output: Path) -> dict[str, Any]:
        text = (site / "fusedacl" / "kernels" / "__init__.py").read_text()
        number = int(text.split()[-1])
        order.append(number)
        assert suite == "loss" and options == ["--preset", "quick"]
        assert not output.exists()
        return result(fusedacl=(100 / number, 0.02))

    monkeypatch.setattr(commits, "run_from", run_from)
    text = commits.compare_commits(["HEAD~1", "HEAD"], "loss", ["--preset", "quick"], 2)
    assert order == [1, 2, 2, 1]
    assert "1 faster" in text
