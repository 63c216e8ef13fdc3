"""Providers that do not fit, are not installed or compute a wrong result are not timed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fusedacl.benchmarks.floors.rates import Floor, Rates
from fusedacl.benchmarks.measuring import memory
from fusedacl.benchmarks.measuring.result_file import ResultFile, read_result
from fusedacl.benchmarks.suites import runner
from fusedacl.benchmarks.suites.gate import case as gate_case
from fusedacl.benchmarks.suites.gate import suite as angle
from fusedacl.benchmarks.suites.loss import case as loss_case
from fusedacl.benchmarks.suites.loss import providers as loss_providers
from fusedacl.benchmarks.suites.loss import suite as loss
from fusedacl.benchmarks.suites.runner import DeviceLost, Settings, plan, run_case
from fusedacl.benchmarks.suites.suite import Provider, bar, describe, missing, peak_bytes

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, rounds=3, case_seconds=1.0)


@dataclass(frozen=True)
class Case:
    size: int


def sums(*providers: Provider) -> Any:
    """A suite that sums a vector, with these providers."""
    return SimpleNamespace(
        providers=lambda case, device: list(providers),
        input_bytes=lambda case: 4 * case.size,
        check_bytes=lambda case: 0,
        inputs=lambda case, device, number: [
            torch.full((case.size,), float(index + 1)) for index in range(number)
        ],
        exact=lambda formula, case, inputs: float(inputs.double().sum()),
        error=lambda call, case, inputs, exact: abs(float(call(inputs)) - exact) / exact,
        max_error=lambda provider, case: 1e-5,
        rate_calls=lambda case: {"gemm": lambda: torch.ones(8).sum()},
        rates=lambda case, times: Rates("here", {}, times["gemm"]["p50_ms"], 1e9),
        floor=lambda rates, case: Floor(4 * case.size / rates.bytes, "memory"),
        shrunk=lambda case: Case(case.size // 2) if case.size > 1 else None,
        words=lambda case: f"sum of {case.size}",
        shared=lambda case: case.size > 10,
    )


def provider(name: str, function: Any = torch.sum, size: int = 0, **options: Any) -> Provider:
    return Provider(name, lambda case, device: function, "sum", lambda case: size, **options)


def wrong(x: torch.Tensor) -> torch.Tensor:
    return 1.01 * x.sum()


def raising(message: str) -> Callable[..., Any]:
    def broken(*_: Any) -> Any:
        raise RuntimeError(message)

    return broken


broken = raising("no kernel image\nand more")


def test_who_is_right_is_timed_and_the_others_are_named() -> None:
    suite = sums(
        provider("ours", is_ours=True),
        provider("wrong", wrong),
        provider("broken", broken),
        provider("nan", lambda x: x.sum() * torch.nan),
        provider("elsewhere", obstacle=lambda case, device: missing("no_such_module", "no-such")),
        provider("large", size=2**61),
    )
    found, failures = run_case(suite, Case(64), SETTINGS, None)
    assert failures == []
    assert list(found["providers"]) == ["ours"]
    assert found["left_out"].keys() == {"wrong", "broken", "nan", "elsewhere", "large"}
    reasons = found["left_out"]
    assert reasons["wrong"].endswith("1.0e-02 of the largest value, 1e-05 is the limit: not timed")
    assert reasons["broken"] == "failed: RuntimeError: no kernel image: not timed"
    assert reasons["nan"].startswith("wrong by nan")
    assert reasons["elsewhere"] == "no-such is not installed. Run: pip install no-such"
    assert reasons["large"].startswith("does not fit: about 2.1e+09 GiB by prediction")
    entry = found["providers"]["ours"]
    assert entry["p20_ms"] <= entry["p50_ms"] <= entry["p80_ms"]
    assert entry["samples"] == 3 and entry["formula"] == "sum"
    assert found["floor_ms"] == pytest.approx(4 * 64 / 1e6) and found["bound_by"] == "memory"
    assert entry["over_floor"] == pytest.approx(entry["p50_ms"] / found["floor_ms"])


def test_large_cases_are_timed_beside_a_busy_core_too() -> None:
    suite = sums(provider("ours", is_ours=True))
    for size, settings, expected in (
        (64, replace(SETTINGS, busy_core=True), True),
        (8, replace(SETTINGS, busy_core=True), False),
        (64, SETTINGS, False),
    ):
        found, _ = run_case(suite, Case(size), settings, None)
        assert ("busy_core" in found["providers"]["ours"]) == expected


@pytest.mark.parametrize(("function", "words"), [(wrong, "wrong by"), (broken, "failed: Runtime")])
def test_ours_wrong_or_broken_is_a_failure(function: Any, words: str) -> None:
    suite = sums(provider("ours", function, is_ours=True))
    found, (failure,) = run_case(suite, Case(8), SETTINGS, None)
    assert found["providers"] == {} and failure.startswith(f"sum of 8: ours {words}")


def test_inputs_take_turns_and_are_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "cache_bytes", lambda device: 1000)
    number = runner.num_input_sets(sums(), Case(25), CPU)
    assert 100 * number > 1000
    assert runner.num_input_sets(sums(), Case(10_000), CPU) == 1
    turn = runner.rotating(lambda x: float(x[0]), sums().inputs(Case(2), CPU, 3))
    assert [turn() for _ in range(4)] == [1, 2, 3, 1]


def test_a_preset_leaves_out_unless_it_is_named() -> None:
    suite = sums(provider("ours", is_ours=True), provider("slow"))
    settings = replace(SETTINGS, skipped={"slow": "compiling takes long"})
    for names, name, reasons in (((), "ours", settings.skipped), (("slow",), "slow", {})):
        fitting, left_out, _ = plan(suite, Case(4), replace(settings, providers=names))
        assert [each.name for each in fitting] == [name] and left_out == reasons


def test_a_size_that_fits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = sums(Provider("ours", lambda case, device: torch.sum, "sum", lambda case: case.size**2))
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1100)
    monkeypatch.setattr(memory, "cache_bytes", lambda device: 1)
    with pytest.raises(ValueError, match=r"sum of 100: ours does not fit: .* fit: sum of 25"):
        runner.refuse_what_cannot_fit(suite, [Case(100), Case(200)], SETTINGS)
    # One that fits is enough for the run to go on.
    runner.refuse_what_cannot_fit(suite, [Case(100), Case(5)], SETTINGS)
    found, failures = run_case(suite, Case(100), SETTINGS, None)
    assert found["providers"] == {} and "ours" in found["left_out"] and failures == []


def test_what_is_finished_is_kept_when_the_device_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(device: torch.device, error: Exception) -> None:
        raise DeviceLost(f"the device {device} does not answer any more: {error}")

    def breaks_later(x: torch.Tensor) -> torch.Tensor:
        if len(x) == 16:
            raise RuntimeError("unspecified launch failure")
        return x.sum()

    monkeypatch.setattr(runner, "refuse_lost", lost)
    file = ResultFile(tmp_path / "sums.json", "sums", "quick", cases=[])
    suite = sums(provider("ours", breaks_later, is_ours=True))
    (failure,) = runner.run_cases(suite, [Case(8), Case(16), Case(32)], SETTINGS, file, None)
    assert "unspecified launch failure; 1 of 3 cases are kept" in failure
    found = read_result(file.path)
    assert [case["words"] for case in found["cases"]] == ["sum of 8"]
    assert "does not answer" in found["stopped"]


def test_a_call_that_failed_on_a_living_device_is_not_a_lost_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner.refuse_lost(CPU, RuntimeError("x"))
    monkeypatch.setattr(runner, "synchronize", raising("no answer"))
    with pytest.raises(DeviceLost, match="does not answer any more: x"):
        runner.refuse_lost(CPU, RuntimeError("x\ny"))


def test_peaks_of_a_child_tell_dense_from_ours() -> None:
    """4 bytes per pair of 1500 rows are 9 MB; ours holds rows, not pairs."""
    if not memory.HighWaterMark.is_available():
        pytest.skip("no high-water mark that can be reset")
    case = loss_case.LossCase("supcon", 1500, 8, 16)
    with memory.Child(threads=1) as child:
        ours, dense = (
            child.measure(peak_bytes, loss.SUITE, name, case) for name in ("fusedacl", "dense")
        )
        assert isinstance(ours, int) and isinstance(dense, int)
        assert dense > 4 * 1500**2 and dense > 4 * ours
        answer = child.measure(peak_bytes, loss.SUITE, "nobody", case)
        assert answer == "KeyError: 'nobody'"


LOSS_CASES = [
    loss_case.LossCase("supcon", 40, 8, 16),
    loss_case.LossCase("supcon", 40, 8, 16, dtype="float16"),
    loss_case.LossCase("acl", 12, 8, 3),
    loss_case.LossCase("acl", 12, 8, 3, exits=2, dtype="bfloat16"),
    # More label embeddings than samples: some have no positive.
    loss_case.LossCase("acl", 6, 8, 20, exits=2),
    loss_case.LossCase("acl_cl", 12, 8, 3),
    loss_case.LossCase("acl_cl", 12, 8, 3, exits=2),
]
ANGLE_CASES = [
    gate_case.AngleCase(*kind)
    for kind in itertools.product(angle.TASKS, (3000,), ("float32", "float16"))
]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    # Few input sets, small rates; the Triton kernels under the interpreter take too long.
    monkeypatch.setattr(memory, "cache_bytes", lambda device=None: 4096)
    monkeypatch.setattr("fusedacl.benchmarks.floors.cpu.BLOCK", 8)
    monkeypatch.setattr("fusedacl.benchmarks.floors.cpu.RATE_CALLS", 1)
    monkeypatch.setattr(runner, "SAMPLE_SECONDS", 1e-9)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("case", [*LOSS_CASES, *ANGLE_CASES], ids=str)
def test_every_provider_of_the_suites_computes_what_it_says(case: Any) -> None:
    suite: Any = loss.SUITE if isinstance(case, loss_case.LossCase) else angle.SUITE
    settings = replace(SETTINGS, rounds=1, skipped={"dense torch.compile": "slow"})
    found, failures = run_case(suite, case, settings, None)
    assert failures == []
    assert "fusedacl" in found["providers"]
    # Whoever is left out is not installed here or does not run on a CPU, none is wrong.
    for name, reason in found["left_out"].items():
        assert "not timed" not in reason, f"{name}: {reason}"
    assert found["floor_ms"] > 0
    json.dumps(found, allow_nan=False)


def test_torch_compile_compiles_for_the_shape_of_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic: compiled.append(dynamic) or function
    )
    monkeypatch.setattr(loss_providers, "_compiler_obstacle", lambda case, device: None)
    settings = replace(SETTINGS, rounds=1, providers=("dense torch.compile",))
    found, _ = run_case(loss.SUITE, LOSS_CASES[0], settings, None)
    assert found["providers"].keys() == {"dense torch.compile"}
    assert compiled == [False]


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", raising("no working compiler"))
    settings = replace(SETTINGS, providers=("dense torch.compile",))
    reason = plan(loss.SUITE, LOSS_CASES[0], settings)[1]["dense torch.compile"]
    assert reason.endswith("a C++ compiler (install g++ or clang): no working compiler")


def test_gpu_kernels_name_what_they_need() -> None:
    left_out = plan(loss.SUITE, LOSS_CASES[0], SETTINGS)[1]
    left_out |= plan(angle.SUITE, ANGLE_CASES[0], SETTINGS)[1]
    assert left_out["inf-cl"] == "inf-cl runs on NVIDIA GPUs only: --device cuda"
    assert left_out["dense autocast"].startswith("float32 has nothing to cast")
    assert "NVIDIA GPUs only" in left_out["apex l2norm + dots"]
    if not torch.cuda.is_available():
        providers = loss.SUITE.providers(LOSS_CASES[0], CPU)
        (cut,) = [each for each in providers if each.name == "cut-cross-entropy"]
        assert "pip install" in str(cut.obstacle(LOSS_CASES[0], torch.device("cuda")))


def test_bert_has_as_many_parameters_as_published() -> None:
    """transformers' BertModel with its pooler."""
    base, large = gate_case.bert_shapes(12, 768), gate_case.bert_shapes(24, 1024)
    assert (len(base), gate_case.num_elements(base)) == (199, gate_case.BERT_BASE)
    assert (len(large), gate_case.num_elements(large)) == (391, 335_141_888)


def test_bars_are_reported_not_enforced() -> None:
    upper, lower = bar("x", 1.76, 1.75), bar("y", 10, 10.0, "at_least")
    assert upper == {"what": "x", "value": 1.76, "at_most": 1.75, "met": False}
    assert lower == {"what": "y", "value": 10.0, "at_least": 10.0, "met": True}
    assert bar("x", 1.75, 1.75)["met"] and not bar("y", 9.9, 10.0, "at_least")["met"]
    assert describe(upper) == "x: 1.76 (at most 1.75: no)"
    assert describe(lower) == "y: 10.00 (at least 10.0: yes)"
