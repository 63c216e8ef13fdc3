"""The compiled call for many rows on the CPU, on small batches that have several tiles.

Its results on every kind of input are tested in test_implementations.py.
"""

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contrastive_cases import DENOMINATORS, KINDS, LABELS, check_error, combine, make_inputs, run
from fusedacl.kernels import supcon_loss
from fusedacl.kernels.contrastive.tiled import cpu_loop, cpu_triangle
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

if cpu_loop.compiled_loop() is None:
    pytest.skip(
        "the compiled loop was not built: no C compiler at installation", allow_module_level=True
    )

TILE_BYTES = 4 * cpu_triangle.TILE_ELEMENTS


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch, poison: None) -> Iterator[list[int]]:
    """Use it for batches of any size, without memory of earlier calls, and count its calls."""
    monkeypatch.setattr(cpu_loop, "MAX_ROWS", 0)
    monkeypatch.setattr(cpu_loop, "WORTH_THREADS", 0)
    monkeypatch.setattr(cpu_triangle, "spare", [])
    calls: list[int] = []
    for name in ("loss_and_gradient", "run_pass"):
        compute = getattr(cpu_triangle, name)

        def counting(*args: Any, compute: Any = compute, **options: Any) -> Any:
            calls.append(1)
            return compute(*args, **options)

        monkeypatch.setattr(cpu_triangle, name, counting)
    yield calls
    assert calls


@pytest.mark.parametrize("vectors", cpu_triangle.VECTORS)
def test_every_kind_of_vectors(monkeypatch: pytest.MonkeyPatch, vectors: str) -> None:
    """Whole and partial tiles, one and several chunks of the width; also what a machine lacks.

    A kind that this processor lacks is replaced by the widest that it has.
    """
    monkeypatch.setenv(cpu_triangle.VARIABLE, vectors)
    for num_samples, width, exits, kind, denominator, reduction, layout in combine(
        (1, 96, 191, 300), (5, 64, 150, 257), (None, 2), KINDS, DENOMINATORS, ("mean", "none"),
        ("random", "ignored"),
    ):  # fmt: skip
        inputs = make_inputs(num_samples, width=width, exits=exits, dtype=torch.float32, **kind)
        labels = LABELS[layout](num_samples, kind["num_labels"] or 9)
        inputs["embeddings"][..., labels == -100, :] = torch.nan
        check_error(
            inputs, labels, impl="tiled", denominator=denominator, reduction=reduction,
            temperature=0.1, leeway=5.0 if reduction == "none" else 1.0,
        )  # fmt: skip


def test_an_unknown_kind_of_vectors_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_triangle.VARIABLE, "avx51")
    with pytest.raises(ValueError, match=r"FUSEDACL_CPU_VECTORS is 'avx51'.*mean 'avx512'"):
        supcon_loss(torch.randn(4, 3), torch.zeros(4).long())


def bits_of(pair_memory: int = 2**20, rows: int = 500) -> list[Tensor]:
    """Loss and gradients with several groups of tiles in memory, one after the other."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for exits, teacher, reduction in (((), False, "mean"), ((2,), True, "sum"), ((), True, "none")):
        parts = [torch.randn(*exits, count, 40, generator=generator) for count in (rows, 7)]
        inputs = dict(zip(("embeddings", "label_embeddings"), parts, strict=True))
        if teacher:
            inputs |= {
                f"teacher_{name}": part.view(-1, *part.shape[-2:])[0] + 1
                for name, part in inputs.items()
            }
        found += run(
            inputs, torch.arange(rows) % 7, None, reduction=reduction, pair_memory=pair_memory
        )
    return found


@pytest.fixture
def any_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedacl.kernels.contrastive import checks

    monkeypatch.setattr(checks, "MIN_PAIR_MEMORY", TILE_BYTES)


def test_bits_depend_neither_on_threads_nor_on_memory(
    monkeypatch: pytest.MonkeyPatch, any_memory: None
) -> None:
    expected = bits_of()
    for num_threads, num_tiles in itertools.product((1, 2, 7), (1, 5, 18, 1000)):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
        for wanted, got in zip(expected, bits_of(num_tiles * TILE_BYTES), strict=True):
            assert torch.equal(wanted, got)


def test_groups_of_blocks_share_partial_sums() -> None:
    """Groups have more than two blocks from 128 blocks on; the last group is not whole.

    A row's gradient is the difference of two means of unit vectors, over N temperature |x|: each
    row is right to 8 units of such a mean, however much of it cancels.
    """
    rows = 128 * cpu_triangle.TILE + 100
    x = torch.randn(rows, 5, requires_grad=True)
    labels = torch.arange(rows) % 3
    temperature = 0.5
    options: dict[str, Any] = {"denominator": "others", "temperature": temperature}
    loss = supcon_loss(x, labels, pair_memory=2**20, **options)
    (gradient,) = torch.autograd.grad(loss, x)
    exact = x.detach().double().requires_grad_()
    wanted = supcon_loss(exact, labels, impl="tiled", **options)
    (expected,) = torch.autograd.grad(wanted, exact)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    lengths = torch.linalg.vector_norm(exact.detach(), dim=1, keepdim=True)
    means = 1 / (rows * temperature * lengths)
    error = (gradient.double() - expected).abs()
    assert (error <= 8 * torch.finfo(torch.float32).eps * means).all()


def test_tiny_halves_where_denormal_floats_are_zero() -> None:
    torch.set_flush_denormal(True)
    try:
        x = (torch.randn(300, 8) * 2.0**-20).half()
        labels = torch.arange(300) % 3
        found, wanted = (run({"embeddings": rows}, labels, None) for rows in (x, x.float()))
        for ours, exact in zip(found, wanted, strict=True):
            assert torch.equal(ours, exact.to(ours.dtype))
    finally:
        torch.set_flush_denormal(False)


def test_another_default_device() -> None:
    x, labels = torch.randn(120, 8), torch.arange(120) % 3
    wanted = supcon_loss(x, labels)
    with torch.device("meta"):
        assert torch.equal(supcon_loss(x, labels), wanted)


def test_memory_is_kept_for_the_next_call_and_replaced_by_a_larger_one() -> None:
    sizes = []
    for rows in (100, 200, 100):
        bits_of(2**30, rows)
        sizes.append([memory.numel() for memory in cpu_triangle.spare])
    assert [len(of_call) for of_call in sizes] == [1, 1, 1]
    assert sizes[0] < sizes[1] == sizes[2]


def test_more_memory_than_usual_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_triangle, "PAIR_MEMORY", 3 * TILE_BYTES)
    for rows, kept in ((500, 0), (100, 1)):
        run(make_inputs(rows, dtype=torch.float32), torch.arange(rows) % 3, None, impl="tiled")
        assert len(cpu_triangle.spare) == kept


@pytest.mark.parametrize(
    "value, error",
    [(2**20 - 1, "must be at least 1048576"), (1e9, "not float"), (True, "not bool")],
)
def test_bad_memory_is_named(few_rows: list[int], value: Any, error: str) -> None:
    few_rows.append(1)
    with pytest.raises((ValueError, TypeError), match=f"pair_memory .*{error}"):
        supcon_loss(torch.randn(4, 3), torch.zeros(4).long(), pair_memory=value)


@pytest.mark.parametrize("exits", [None, 3])
def test_a_label_out_of_range_is_named(exits: int | None) -> None:
    inputs = make_inputs(4, 3, exits=exits, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"labels holds 9, .*K = 3 .*\[0, 3\)"):
        run(inputs, torch.tensor([0, -100, 9, -5]), None)


def test_tiny_and_huge_rows() -> None:
    """Denormal numbers have no direction; a row of any other length has its own."""
    x = torch.randn(120, 20)
    labels = torch.arange(120) % 4
    lengths = torch.logspace(-11, 11, 120)[:, None]
    loss, gradient = run({"embeddings": x * lengths}, labels, None)
    wanted, expected = run({"embeddings": x}, labels, None)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient * lengths, expected, rtol=1e-4, atol=1e-7)
    x[7] = 1e-40
    x[9] = 0
    *_, gradient = run({"embeddings": x}, labels, None)
    assert gradient.isfinite().all()
    assert (gradient[[7, 9]] == 0).all()


def test_two_python_threads_at_once() -> None:
    expected = bits_of()
    found: list[list[Tensor]] = []

    def work() -> None:
        found.extend(bits_of() for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for of_call in found:
        assert all(torch.equal(*pair) for pair in zip(expected, of_call, strict=True))


class Losses(Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return bits_of()[1]


def test_in_the_workers_of_a_data_loader() -> None:
    """They are forked from a process whose threads have run, and have one thread each."""
    expected = bits_of()[1]
    loader = DataLoader(Losses(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert all(torch.equal(found, expected) for found in loader)


# Prints the bits of a gradient.
PROCESS = """
import os, torch
from fusedacl.kernels import supcon_loss
from fusedacl.kernels.contrastive.tiled import cpu_loop
cpu_loop.MAX_ROWS = cpu_loop.WORTH_THREADS = 0
x = torch.sin(torch.arange(300 * 20.0)).view(300, 20).requires_grad_()
supcon_loss(x, torch.arange(300) % 3).backward()
"""
PRINT = "print(x.grad.flatten().view(torch.int32).tolist())"
# All threads begin on one core, which they may leave or not; the cores they may use stay the same.
ON_ONE_CORE = """
threads, every = [int(name) for name in os.listdir("/proc/self/task")], os.sched_getaffinity(0)
for allowed in ({min(every)}, every):
    for thread in threads:
        os.sched_setaffinity(thread, {min(every)})
        os.sched_setaffinity(thread, allowed)
    for _ in range(3):
        expected, x.grad = x.grad, None
        supcon_loss(x, torch.arange(300) % 3).backward()
        assert torch.equal(x.grad, expected)
    assert all(os.sched_getaffinity(thread) == allowed for thread in threads)
"""


@pytest.mark.parametrize(
    ("num_threads", "code"),
    [
        (1, "assert torch.get_num_threads() == 1\n"),
        pytest.param(
            2, ON_ONE_CORE, marks=pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
        ),
    ],
    ids=["one thread", "two threads on one core"],
)
def test_a_process_of_its_own(num_threads: int, code: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    command = [sys.executable, "-c", PROCESS + code + PRINT]
    run_there = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert run_there.returncode == 0, run_there.stderr
    x = torch.sin(torch.arange(300 * 20.0)).view(300, 20)
    _, gradient = run({"embeddings": x}, torch.arange(300) % 3, None)
    assert run_there.stdout.strip() == str(gradient.flatten().view(torch.int32).tolist())
