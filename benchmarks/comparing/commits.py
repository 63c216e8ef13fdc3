"""Run a suite from two commits in turns and compare the results.

The engine/ and kernels/ of each commit are laid out in a temporary directory with the benchmarks of
this checkout, so that only the code under test differs. Their C loops are compiled there.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..measuring.environment import Result
from ..measuring.result_file import read_result
from .files import compare, merged

BENCHMARKS = Path(__file__).resolve().parents[1]
CHECKOUT = BENCHMARKS.parent
# Taken from the commit; the benchmarks are those of this checkout.
PARTS = ("engine", "kernels")
BUILD_FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
# Packages that these benchmarks import and that commits with flat folders do not have.
NEEDED = ("engine/runtime", "kernels/contrastive")


def compare_commits(
    commits: Sequence[str], suite: str, options: Sequence[str], repeats: int = 2
) -> str:
    """Run `bench suite options` from both commits in the order A B B A …, and compare.

    ValueError for an unknown commit, one with another layout, or a run that failed.
    """
    hashes = [commit_hash(name) for name in commits]
    for name, commit in zip(commits, hashes, strict=True):
        check_layout(name, commit)
    with tempfile.TemporaryDirectory(prefix="fusedacl_bench_") as directory:
        sites = [
            lay_out(commit, Path(directory) / f"tree{index}") for index, commit in enumerate(hashes)
        ]
        runs: list[list[Result]] = [[], []]
        for number in range(repeats):
            for index in (0, 1) if number % 2 == 0 else (1, 0):
                print(f"run {number + 1} of {repeats}, {commits[index]}", flush=True)
                output = Path(directory) / f"run{number}_{index}"
                found = run_from(sites[index], suite, options, output)
                found["environment"]["commit"] = hashes[index]
                runs[index].append(found)
    return compare(merged(runs[0]), merged(runs[1]), names=(commits[0], commits[1]))


def commit_hash(name: str) -> str:
    try:
        found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    except FileNotFoundError:
        raise ValueError(
            "commits: git is not installed, so no commit can be checked out."
        ) from None
    if found.returncode != 0:
        raise ValueError(
            f"commits: {name!r} is not a commit of the checkout in {str(CHECKOUT)!r}: name a hash, "
            "a branch or HEAD~1, or compare two result files."
        )
    return found.stdout.decode().strip()


def check_layout(name: str, commit: str) -> None:
    """Refuse a commit whose engine/ and kernels/ these benchmarks cannot import (ValueError)."""
    missing = [
        folder
        for folder in NEEDED
        if _git("cat-file", "-e", f"{commit}:{folder}/__init__.py").returncode != 0
    ]
    if missing:
        raise ValueError(
            f"commits: {name!r} has no {missing[0]}/: its engine/ and kernels/ are from before "
            "they were split into folders, so these benchmarks cannot import them. Measure that "
            "commit with its own fusedacl bench and compare the two result files."
        )


def lay_out(commit: str, tree: Path) -> Path:
    """Lay out a commit; returns the directory that holds fusedacl/{engine,kernels,benchmarks}."""
    tree.mkdir(parents=True)
    archive = _git("archive", "--format=tar", commit, *PARTS, *BUILD_FILES)
    if archive.returncode != 0:
        raise ValueError(f"commits: {commit} cannot be laid out: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as packed:
        packed.extractall(tree, filter="data")
    site = tree / "site" / "fusedacl"
    site.mkdir(parents=True)
    for part in PARTS:
        (site / part).symlink_to(tree / part, target_is_directory=True)
    # setup.py looks for the benchmarks beside itself.
    for folder in (site, tree):
        (folder / "benchmarks").symlink_to(BENCHMARKS, target_is_directory=True)
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree, capture_output=True, text=True,
    )  # fmt: skip
    # setup.py goes on where a loop cannot be compiled.
    for folder in sorted({file.parent for file in (tree / "kernels").rglob("*.c")}):
        if not any(folder.glob("*.so")):
            raise ValueError(
                f"commits: the C loops of {commit} in {folder.relative_to(tree)} were not "
                f"compiled, without which it is slower:\n{built.stderr.strip()}"
            )
    return site.parent


def run_from(site: Path, suite: str, options: Sequence[str], output: Path) -> Result:
    """Result of `bench suite` with the packages of a tree; ValueError if the run failed.

    output: directory of the result file.
    """
    environment = os.environ | {"PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import fusedacl.kernels as k; print(k.__file__)"],
        cwd=site, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if not where.stdout.startswith(str(site)):
        raise ValueError(
            f"commits: fusedacl was imported from {where.stdout.strip()!r} and not from the "
            f"commit's tree {where.stderr.strip()[-300:]}"
        )
    arguments = [suite, *options, "--output_dir", str(output)]
    command = [sys.executable, "-m", "fusedacl.benchmarks", *arguments]
    done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip()[-2000:]
        raise ValueError(f"commits: {' '.join(command[1:])} failed there: {words}")
    return read_result(output / f"{suite}.json")


def _git(*arguments: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True)
