"""Counts equal the accepted ones in expected.json, and each kind of waste changes one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fusedacl.benchmarks.counts import __main__ as counts
from fusedacl.benchmarks.counts import kernel_cases
from fusedacl.benchmarks.counts.kernel_cases import Case
from fusedacl.benchmarks.measuring.counting import Counts, count
from fusedacl.engine.model.multi_exit import MultiExitForSequenceClassification
from fusedacl.engine.objectives.gate import GradientGate
from fusedacl.kernels.contrastive.tiled import loss as tiled
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

CASES = {case.name: case for case in counts.cases()}
STEP = CASES["step: acl"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("counts")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return counts.read_expected()


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_accepted(name: str, directory: Path, expected: dict[str, Any]) -> None:
    reason = CASES[name].obstacle()
    if reason is not None:
        pytest.skip(reason)
    found, _ = counts.measure(CASES[name], directory)
    changes = counts.compare(expected, {name: found.record()})
    assert not changes, counts.explain(changes)


def test_the_file_has_these_cases_and_no_others(expected: dict[str, Any]) -> None:
    assert list(expected["cases"]) == list(CASES)


@pytest.fixture
def changed(expected: dict[str, Any], directory: Path) -> Callable[[Case], dict[str, str]]:
    """A function from a case to its changed counts, each with the line about it."""

    def compare(case: Case) -> dict[str, str]:
        found, _ = counts.measure(case, directory)
        lines = counts.compare(expected, {case.name: found.record()})
        return {line.removeprefix(f"{case.name}: ").partition(":")[0]: line for line in lines}

    return compare


def test_a_read_in_the_gate_is_found(monkeypatch: pytest.MonkeyPatch, changed: Any) -> None:
    combine = GradientGate.combine

    def and_look(gate: GradientGate, **options: Any) -> Any:
        decision = combine(gate, **options)
        decision.grad_norm.item()
        return decision

    monkeypatch.setattr(GradientGate, "combine", and_look)
    (line,) = changed(STEP).values()
    # It is charged to who called the gate, for it is not the gate's own.
    assert "host_reads: " in line
    assert line.endswith("LocalBackend.step: _local_scalar_dense 0 -> 1)")


def test_a_second_pass_through_the_backbone_is_found(
    monkeypatch: pytest.MonkeyPatch, changed: Any
) -> None:
    states = MultiExitForSequenceClassification.exit_states

    def twice(*args: Any, **options: Any) -> list[Tensor]:
        with torch.no_grad():
            states(*args, **options)
        return states(*args, **options)

    monkeypatch.setattr(MultiExitForSequenceClassification, "exit_states", twice)
    line = changed(STEP)["passes"]
    assert "backbone 1 -> 2" in line and "exits" not in line


def test_a_copy_of_each_tile_is_found(monkeypatch: pytest.MonkeyPatch, changed: Any) -> None:
    exponentials = tiled.exponentials
    monkeypatch.setattr(
        tiled, "exponentials", lambda *args, **more: exponentials(*args, **more) + 0
    )
    lines = changed(CASES["scl tiled, N 1500, float64"])
    assert set(lines) == {"operations", "allocated_bytes", "peak_bytes"}
    assert "add" in lines["operations"]


def test_a_kernel_for_each_size_is_found(monkeypatch: pytest.MonkeyPatch, changed: Any) -> None:
    pytest.importorskip("triton")
    from fusedacl.kernels.contrastive.gpu import small_batches

    case = next(case for name, case in CASES.items() if name.startswith("acl triton, 6 sizes, N 9"))
    monkeypatch.setitem(small_batches.supcon_small_kernel.kwargs, "do_not_specialize", ())
    assert set(changed(case)) == {"binaries"}


def of(call: Callable[[], object]) -> Counts:
    return count(call)[0]


def test_every_way_to_read_a_value_counts_once() -> None:
    x = torch.ones(3)
    reads: tuple[Callable[[], object], ...] = (
        lambda: x[0].item(), lambda: bool(x.any()), lambda: x.tolist(), lambda: x.cpu(),
        lambda: x.numpy(), lambda: x[x > 0], lambda: x.nonzero(), lambda: torch.equal(x, x),
    )  # fmt: skip
    for read in reads:
        assert sum(of(read).host_reads.values()) == 1
        with torch.inference_mode():
            assert sum(of(read).host_reads.values()) == 1
    assert not of(lambda: x[torch.tensor([0, 1])] + x.sum()).host_reads


def test_bytes_are_those_of_new_storages_while_they_live() -> None:
    x = torch.ones(1000)

    def call() -> Tensor:
        kept = x + 1  # 4000 bytes
        (kept * 2).view(10, 100)[1].add_(1)  # and 4000, gone at once: views hold nothing
        return torch.cat([kept, kept])  # and 8000

    found = of(call)
    assert found.allocated_bytes == 16000
    assert found.peak_bytes == 12000
    assert of(lambda: torch.tensor([1.0, 2.0])).allocated_bytes == 8


def test_flops_are_those_of_pytorchs_own_counter() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    x = torch.ones(2, 11, 7, requires_grad=True)

    def call() -> None:
        y = model(x)
        (y @ y.mT).sum().backward()

    with FlopCounterMode(display=False) as counter:
        call()
    assert of(call).flops == counter.get_total_flops() > 0
    with torch.inference_mode():
        assert of(lambda: model(x)).flops == 2 * 22 * (7 * 5 + 5 * 3)


def test_flops_of_an_attention_are_its_products() -> None:
    q, k = torch.randn(1, 2, 6, 4, requires_grad=True), torch.randn(1, 2, 10, 4)

    def call() -> None:
        nn.functional.scaled_dot_product_attention(q, k, k).sum().backward()

    # Scores and values; then the scores again and the gradients of scores and of three inputs.
    assert of(call).flops == 2 * (2 + 5) * (2 * 6 * 10 * 4)


def test_other_versions_may_take_a_few_other_operations(expected: dict[str, Any]) -> None:
    record = expected["cases"][STEP.name]
    few = {**record, "operations": {**record["operations"], "mm": record["operations"]["mm"] + 9}}
    many = {**record, "operations": {**record["operations"], "mm": 10_000}}
    read = {**record, "host_reads": {**record["host_reads"], "kernels.rows: item": 1}}
    larger = {**record, "allocated_bytes": round(1.05 * record["allocated_bytes"])}
    here = {"versions": counts.versions(), "cases": {STEP.name: record}}
    elsewhere = {**here, "versions": {"torch": "2.6", "transformers": "4.56"}}
    for other, *lines in ((few, 1, 0), (many, 1, 1), (read, 1, 1), (larger, 1, 0), (record, 0, 0)):
        assert [
            len(counts.compare(known, {STEP.name: other})) for known in (here, elsewhere)
        ] == lines
    (line,) = counts.compare(here, {STEP.name: few})
    number = record["operations"]["mm"]
    assert line.endswith(f"(mm {number} -> {number + 9})")
    assert "counts --write" in counts.explain([line])


def test_the_command_compares_and_accepts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "counts.json"
    monkeypatch.setattr(counts, "EXPECTED", file)
    small = [case for case in kernel_cases.kernel_cases() if case.name.endswith(", N 32")]
    monkeypatch.setattr(counts, "cases", lambda: small)
    with pytest.raises(ValueError, match="no such file.*--write"):
        counts.main(["--only", "scl tiled"])
    assert counts.main(["--write"]) == 0
    assert counts.main(["--only", "scl tiled", "--places"]) == 0
    shown = capsys.readouterr().out
    assert "kernels.contrastive.tiled.cpu_loop.floats: " in shown
    record = json.loads(file.read_text())
    assert list(record["cases"]) == [case.name for case in small]

    record["cases"]["scl tiled, N 32"]["flops"] += 1
    file.write_text(json.dumps(record))
    assert counts.main([]) == 1
    assert "scl tiled, N 32: flops: expected" in capsys.readouterr().err
    # The other case's counts stay, unless they are another version's.
    assert counts.main(["--only", "scl tiled", "--write"]) == 0
    assert counts.main([]) == 0
    file.write_text(json.dumps({**record, "versions": {"torch": "2.6"}}))
    with pytest.raises(ValueError, match="accept all cases together"):
        counts.main(["--only", "scl tiled", "--write"])
    with pytest.raises(SystemExit):
        counts.main(["--only", "no such case"])


def test_what_does_not_repeat_is_refused(directory: Path) -> None:
    sizes = iter((1, 1, 2))
    case = Case("grows", lambda _: kernel_cases.Subject(lambda: torch.ones(next(sizes))))
    with pytest.raises(RuntimeError, match="grows: allocated_bytes: expected 4, found 8"):
        counts.measure(case, directory, calls=3)
