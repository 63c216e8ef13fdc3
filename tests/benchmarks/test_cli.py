"""`fusedacl bench`: mistakes are reported before any work; tiny runs write their files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.benchmarks import cli
from fusedacl.benchmarks.floors.rates import Rates
from fusedacl.benchmarks.measuring import clock, memory
from fusedacl.benchmarks.measuring.result_file import ResultFile, read_result
from fusedacl.benchmarks.options import (
    BenchConfig,
    ExitsConfig,
    LoopsConfig,
    ScalingConfig,
    StepConfig,
    WiderConfig,
    output_directory,
    sizes,
)
from fusedacl.benchmarks.suites import growth
from fusedacl.benchmarks.suites.suite import WrongResult
from fusedacl.engine.cli.main import main as fusedacl
from fusedacl.engine.config.fields import build

TINY = ["--rows", "24", "--widths", "8", "--samples", "6", "--classes", "2", "--exits", "1,2"]
TINY += ["--parameters", "2000", "--rounds", "1", "--peaks", "false", "--threads", "1"]
# The suites that `bench all` runs for real here, and those that it does not.
OWN = ("loss", "angle", "growth")
CPU_SUITES = ("step", "loops", "wider", "exits", "scaling")


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Invented rates and few input sets: these tests do not measure anything."""
    rates = Rates("here", {torch.float32: 1e9}, 1e9, 1e9, overlaps_units=False)
    monkeypatch.setattr("fusedacl.benchmarks.floors.cpu.measured", lambda: rates)
    monkeypatch.setattr(memory, "cache_bytes", lambda device=None: 4096)
    monkeypatch.setattr("fusedacl.benchmarks.floors.cpu.BLOCK", 8)
    monkeypatch.setattr(clock, "MAX_REPEATS", 1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FUSEDACL_DATA", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["los"], "There is no suite 'los'. Did you mean 'loss'?"),
        (["loss", "--provders", "dense"], "Unknown flag '--provders'. Did you mean 'providers'?"),
        (["loss", "--providers", "SupKontrast"], "none named 'SupKontrast'. Did you mean 'SupCon"),
        (["angle", "--providers", "SupContrast"], "providers: there is none named 'SupContrast'."),
        (["loss", "--rows", "1024,x"], "rows='1024,x': 'x' is not a whole number above 0"),
        (["loss", "--rows", "0"], "not a whole number above 0"),
        (["loss", "--dtypes", "float8"], "dtypes: there is none named 'float8'."),
        (["loss", "--losses", "supcn"], "Did you mean 'supcon'?"),
        (["angle", "--tasks", "dot_nrm"], "Did you mean 'dot_norm'?"),
        (["loss", "--preset", "quik"], "Did you mean 'quick'?"),
        (["loss", "--rounds", "0"], "rounds=0 is out of range"),
        (["step", "--providers", "fusedacl_c"], "Did you mean 'fusedacl_ce'?"),
        (["step", "--cases", "minlm"], "cases: there is none named 'minlm'. Did you mean 'minilm'"),
        (["step", "--quick", "--cases", "bert-base"], "no case of this preset, which has minilm"),
        (["growth", "--rows", "64"], "rows='64': growth has series of its own"),
        (["growth", "--dtypes", "float32,float16"], "growth measures one data type a run"),
        (["growth", "--providers", "SupContrast"], "none named 'SupContrast'"),
        (["compare", "--commits", "a", "b", "--output_dir", "x"], "leave no files; leave it out"),
        (["exits", "--data_dirs", "x"], "Did you mean 'data_dir'?"),
        (["scaling", "--link_gb_s", "2"], "also needs --matrix_tflops"),
        (["compare", "one.json"], "1 file(s) given: name two result files"),
        (["compare", "a.json", "b.json"], "'a.json' does not exist"),
        (["compare", "a.json", "b.json", "--rows", "2"], "the options of a suite need --commits"),
        (["compare", "--commits", "HEAD", "HEAD", "x.json"], "file 'x.json' does not exist"),
        (["compare", "--commits", "HEAD", "HEAD", "--rowz", "4"], "Did you mean 'rows'?"),
        (["compare", "--commits", "HEAD", "HEAD", "--repeats", "0"], "must run once at least"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""


def test_commits_are_measured_with_a_relative_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value of an option stays as it is, even where a file has its name."""
    monkeypatch.chdir(tmp_path)
    for name in ("bench.yaml", "dense"):
        Path(name).write_text("preset: quick\n")
    heard: list[list[str]] = []
    monkeypatch.setattr(
        "fusedacl.benchmarks.comparing.commits.compare_commits",
        lambda commits, suite, options, repeats: heard.append(options),
    )
    words = ["bench.yaml", "--providers", "dense"]
    assert cli.main(["compare", "--commits", "a", "b", *words]) == 0
    assert heard == [[str(tmp_path / "bench.yaml"), "--providers", "dense"]]


def test_without_a_gpu_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["loss", "--device", "cuda"]) == 2
    assert "finds no CUDA device here. Use --device cpu" in capsys.readouterr().err


def test_what_cannot_fit_ends_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**30)
    options = ["--losses", "supcon", "--rows", "60000", "--widths", "64", "--providers", "dense"]
    assert cli.main(["loss", *options, "--output_dir", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "supcon_loss M=60000 d=64 float32: dense does not fit: about " in printed
    assert "1 GiB can be used. This would fit: supcon_loss M=3750 d=64 float32." in printed
    assert not list(tmp_path.iterdir())


def test_presets_and_options() -> None:
    quick = sizes(build(BenchConfig, {"preset": "quick"}))
    full = sizes(build(BenchConfig, {"rows": "7,7,9", "rounds": 2}))
    assert max(quick["rows"]) <= 1024 < max(sizes(BenchConfig())["rows"])
    assert (full["rows"], full["rounds"]) == ([7, 9], 2)
    assert full["widths"] == sizes(BenchConfig())["widths"]


def test_help_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert fusedacl(["bench"]) == 0
    assert "fusedacl bench <suite>" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        fusedacl(["bench", "loss", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--providers" in text and "--case_seconds" in text and "(default: 32)" in text


def test_loss_leaves_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = "fusedacl,SupContrast"
    status = fusedacl(
        ["bench", "loss", "--preset", "quick", *TINY, "--providers", names,
         "--output_dir", str(tmp_path)]
    )  # fmt: skip
    assert status == 0
    found = read_result(tmp_path / "loss.json")
    assert [case["words"] for case in found["cases"]] == [
        "supcon_loss M=24 d=8 float32",
        "acl_loss E=1 N=6 K=2 d=8 float32",
        "acl_loss E=2 N=6 K=2 d=8 float32",
        "acl_cl_loss E=1 N=6 K=2 d=8 float32",
        "acl_cl_loss E=2 N=6 K=2 d=8 float32",
    ]
    for case in found["cases"]:
        assert list(case["providers"]) == names.split(",")
        assert case["floor_ms"] > 0 and case["rates"]["gigaflops"]["float32"] > 0
    assert found["rates"]["name"] == "here" and found["noise"]["spread"] >= 0
    printed = capsys.readouterr().out
    assert "written: " in printed and "SupContrast" in printed


def test_wrong_results_of_ours_are_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fusedacl.benchmarks.suites.loss import providers as loss_providers

    loss = loss_providers.supcon_loss
    monkeypatch.setattr(
        loss_providers, "supcon_loss", lambda *rows, **options: 1.01 * loss(*rows, **options)
    )
    options = ["--losses", "supcon", "--providers", "fusedacl", "--output_dir", str(tmp_path)]
    assert cli.main(["loss", *TINY, *options]) == 1
    assert "fusedacl wrong by 1.0e-02" in capsys.readouterr().err
    (case,) = read_result(tmp_path / "loss.json")["cases"]
    assert case["providers"] == {} and "not timed" in case["left_out"]["fusedacl"]


def test_all_runs_every_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """step, loops, wider, exits and scaling get the preset, the directory and the threads."""
    heard: list[tuple[type, str, str | None, int]] = []

    def stand_in(config: Any) -> int:
        how = config.how
        heard.append((type(config), how.preset, how.output_dir, how.threads))
        return int(isinstance(config, StepConfig))

    for suite in CPU_SUITES:
        monkeypatch.setitem(cli.RUNS, suite, (cli.RUNS[suite][0], stand_in))
    monkeypatch.setitem(growth.SIZES["cpu", "quick"], "E", (1, 2, 3))
    all_series = growth.all_series
    monkeypatch.setattr(
        growth, "all_series", lambda *options: [s for s in all_series(*options) if s.axis == "E"]
    )
    options = ["--quick", "--output_dir", str(tmp_path), "--providers", "fusedacl"]
    assert cli.main(["all", *TINY, *options, "--threads", "3"]) == 1
    # loops and scaling count threads per rank.
    assert heard == [
        (cls, "quick", str(tmp_path), threads)
        for cls, threads in (
            (StepConfig, 3), (LoopsConfig, 1), (WiderConfig, 3), (ExitsConfig, 3),
            (ScalingConfig, 1),
        )
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.json" for name in OWN}
    found = read_result(tmp_path / "growth.json")
    assert [(case["axis"], case["size"]) for case in found["cases"]] == [
        ("E", 1), ("E", 2), ("E", 3)
    ]  # fmt: skip
    assert found["growth"][0]["provider"] == "fusedacl" and found["growth"][0]["time"] is not None
    printed = capsys.readouterr().out
    assert "exponent of time" in printed and "BENCH SCALING" in printed


@pytest.mark.parametrize("suite", CPU_SUITES)
def test_a_wrong_result_is_status_1(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file names the threads that were asked for."""

    def wrong(*arguments: Any, **options: Any) -> None:
        (file,) = (each for each in arguments if isinstance(each, ResultFile))
        assert file.result["environment"]["threads"] == 3
        raise WrongResult("losses differ: not timed")

    monkeypatch.setattr(f"fusedacl.benchmarks.suites.{suite}.suite.run", wrong)
    assert cli.main([suite, "--quick", "--threads", "3", "--output_dir", str(tmp_path)]) == 1
    assert f"fusedacl bench {suite}: losses differ: not timed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_gpu_run_of_all_leaves_out_what_measures_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run: list[str] = []

    def stand_in(suite: str, *_: Any) -> int:
        run.append(suite)
        return 0

    for suite, (cls, _) in cli.RUNS.items():
        monkeypatch.setitem(cli.RUNS, suite, (cls, partial(stand_in, suite)))
    assert cli.main(["all", "--device", "cuda", "--providers", "inf-cl"]) == 0
    printed = capsys.readouterr().out
    assert run == ["loss"]
    for suite in ("angle", "growth"):
        assert f"bench {suite}: none of the named providers takes part" in printed
    assert "bench scaling measures the CPU: left out with --device cuda" in printed


@pytest.mark.parametrize(
    ("cls", "options", "may_be_committed"),
    [
        (BenchConfig, {}, True),
        (BenchConfig, {"rows": "64"}, False),
        (BenchConfig, {"preset": "quick"}, False),
        # A file of some cases has their names, so it replaces nothing.
        (StepConfig, {"cases": "minilm"}, True),
        (StepConfig, {"providers": "fusedacl_ce"}, False),
        (BenchConfig, {"rounds": 1}, False),
        (WiderConfig, {"threads": 1}, False),
        (ScalingConfig, {"world_sizes": "1,2"}, False),
        (ScalingConfig, {"memory_budget_gb": 1.0}, False),
    ],
)
def test_a_part_of_the_sizes_does_not_replace_the_committed_file(
    cls: type, options: dict[str, str], may_be_committed: bool
) -> None:
    parts = output_directory(build(cls, options)).parts
    folder = ("benchmarks", "results") if may_be_committed else ("runs", "bench")
    assert parts[-3:-1] == folder
