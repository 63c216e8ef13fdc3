"""Learned temperatures and memories by the compiled loops of plain batches."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contrastive_cases import DENOMINATORS, combine
from fusedacl.kernels import supcon_loss
from fusedacl.kernels.contrastive import checks
from fusedacl.kernels.contrastive.tiled import cpu_loop, cpu_triangle
from fusedacl.kernels.contrastive.wider import compiled
from wider_cases import check, make_problem, results

if not cpu_triangle.can_run(torch.empty(1, 1)):
    pytest.skip(
        "the compiled loop was not built: no C compiler at installation", allow_module_level=True
    )

# Small batches and, with no rows for them, tiles.
LOOPS = {"small batches": cpu_loop.MAX_ROWS, "tiles": 0}


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch, poison: None) -> Iterator[list[int]]:
    """Require every test here to reach the compiled loops, with NaN in unfilled buffers."""
    found: list[int] = []
    compute = compiled.contrastive_loss

    def counting(wider: Any) -> Any:
        found.append(1)
        return compute(wider)

    monkeypatch.setattr(compiled, "contrastive_loss", counting)
    monkeypatch.setattr(cpu_triangle, "spare", [])
    yield found
    assert found


@pytest.mark.parametrize("loop", LOOPS)
def test_learning_a_temperature_changes_no_bit(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_loop, "MAX_ROWS", LOOPS[loop])
    for exits, labels, reduction, denominator, num_samples in combine(
        (None, 3), ("integers", "ignored"), ("mean", "sum"), DENOMINATORS, (1, 40, 200)
    ):
        problem = make_problem(
            num_samples, labels, exits=exits, width=70, reduction=reduction, denominator=denominator
        )
        check(problem | {"temperature": torch.tensor(0.3)}, "tiled")
        learned = problem | {"temperature": torch.tensor(0.3, dtype=torch.float64)}
        found = results(learned, "tiled")
        assert found.pop("temperature").dtype == torch.float64
        for name, wanted in results(problem, "tiled").items():
            assert torch.equal(found[name], wanted)


def test_a_temperature_alone_is_trained() -> None:
    x, labels = torch.randn(30, 8), torch.arange(30) % 4
    temperature = torch.tensor(0.3, requires_grad=True)
    (found,) = torch.autograd.grad(supcon_loss(x, labels, temperature=temperature), temperature)
    (wanted,) = torch.autograd.grad(
        supcon_loss(x.double(), labels, temperature=temperature, impl="reference"), temperature
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_without_autograd_no_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for loop in (cpu_loop, cpu_triangle):
        compute = loop.loss_and_gradient

        def noting(batch: Any, *options: Any, compute: Any = compute) -> Any:
            asked.append(options[:2])
            return compute(batch, *options)

        monkeypatch.setattr(loop, "loss_and_gradient", noting)
    x, labels = torch.randn(30, 8, requires_grad=True), torch.arange(30) % 4
    learned = {"temperature": torch.tensor(0.3, requires_grad=True)}
    memory = {"memory_embeddings": torch.randn(20, 8), "memory_labels": labels[:20]}
    for disabled in (torch.no_grad, torch.inference_mode):
        with disabled():
            supcon_loss(x, labels, **learned)
            supcon_loss(x, labels, **learned, **memory)
    assert asked == [(False, False)] * 4
    supcon_loss(x, labels, **memory).backward()
    assert asked[4] == (True, False)


@pytest.mark.parametrize("vectors", cpu_triangle.VECTORS)
def test_memories(vectors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_triangle.VARIABLE, vectors)
    kinds = ({"label_embeddings": False}, {}, {"teacher": True}, {"exits": 2, "teacher": True})
    for num_samples, memory, kind, labels, denominator, width, reduction in combine(
        (1, 50, 96, 210), (0, 1, 97, 300), kinds, ("integers", "ignored"), DENOMINATORS,
        (5, 64, 130), ("mean", "sum"),
    ):  # fmt: skip
        problem = make_problem(
            num_samples, labels, memory=memory, width=width, **kind,
            denominator=denominator, reduction=reduction,
        )  # fmt: skip
        for name in ("embeddings", "memory_embeddings"):
            ignored = problem["labels" if name == "embeddings" else "memory_labels"] == -100
            problem[name][..., ignored, :] = torch.nan
        check(problem, "tiled")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_memories_of_16_bits(dtype: torch.dtype) -> None:
    problem = make_problem(40, memory=200, width=64)
    for name in ("embeddings", "label_embeddings", "memory_embeddings"):
        problem[name] = problem[name].to(dtype)
    check(problem, "tiled")


def test_labels_of_memories_are_any_integers() -> None:
    """Without label embeddings; classes that no sample has are negatives."""
    values = torch.tensor([-7, 2**40, 5, 123456789])
    problem = make_problem(30, label_embeddings=False, memory=100)
    for name in ("labels", "memory_labels"):
        problem[name] = values[problem[name]]
    problem["labels"][problem["labels"] == 5] = -7
    check(problem, "tiled")


def test_bits_depend_neither_on_threads_nor_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tile_bytes = 4 * cpu_triangle.TILE_ELEMENTS
    monkeypatch.setattr(checks, "MIN_PAIR_MEMORY", tile_bytes)
    problem = make_problem(200, memory=400, width=40, exits=2)
    expected = results(problem, "tiled")
    for num_threads, num_tiles in itertools.product((1, 2, 7), (1, 5, 1000)):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
        found = results(problem | {"pair_memory": num_tiles * tile_bytes}, "tiled")
        for name, wanted in expected.items():
            assert torch.equal(found[name], wanted)
