"""The compiled call for small batches on the CPU: its error is that of float32 rounding."""

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contrastive_cases import DENOMINATORS, KINDS, check_error, make_inputs, run
from fusedacl.kernels import acl_loss, supcon_loss
from fusedacl.kernels.contrastive.batch import Batch
from fusedacl.kernels.contrastive.tiled import cpu_loop

SOURCE = Path(cpu_loop.__file__).with_name("cpu_loop.c")


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch, poison: None) -> Iterator[list[int]]:
    """Require every test here to reach the compiled call, with NaN in unfilled buffers."""
    if cpu_loop.compiled_loop() is None:
        pytest.skip("the compiled loop was not built: no C compiler at installation")
    calls: list[int] = []
    compute = cpu_loop.loss_and_gradient

    def counting(*args: Any) -> Any:
        calls.append(1)
        return compute(*args)

    monkeypatch.setattr(cpu_loop, "loss_and_gradient", counting)
    yield calls
    assert calls


def set_threads(monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    monkeypatch.setattr(cpu_loop, "WORTH_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)


def test_up_to_the_most_rows(counted: list[int]) -> None:
    for num_samples in (cpu_loop.MAX_ROWS - 7, cpu_loop.MAX_ROWS - 6):
        inputs = make_inputs(num_samples, 7, width=24, dtype=torch.float32)
        check_error(inputs, torch.randint(7, (num_samples,)), impl="tiled")
        assert len(counted) == 1


@pytest.mark.parametrize("exits", [None, 2, 5])
def test_bits_do_not_depend_on_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, exits: int | None
) -> None:
    inputs = make_inputs(50, 5, width=33, exits=exits, teacher=True, dtype=torch.float32)
    labels = torch.randint(5, (50,))
    expected = run(inputs, labels, None, impl="tiled")
    for num_threads in (1, 2, 3, 40):
        set_threads(monkeypatch, num_threads)
        for wanted, got in zip(expected, run(inputs, labels, None, impl="tiled"), strict=True):
            assert torch.equal(wanted, got)


@pytest.mark.parametrize("exits", [None, 3])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_label_out_of_range_is_named(
    monkeypatch: pytest.MonkeyPatch, num_threads: int, exits: int | None
) -> None:
    set_threads(monkeypatch, num_threads)
    inputs = make_inputs(4, 3, exits=exits, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"labels holds 9, .*K = 3 .*\[0, 3\)"):
        acl_loss(labels=torch.tensor([0, -100, 9, -5]), **inputs)


def test_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch, counted: list[int]) -> None:
    batch = Batch(torch.randn(4, 3), torch.zeros(4), None, None, None, 0.5, "all", "mean", -100)
    takes = cpu_loop.takes
    assert takes(batch, torch.float32)
    assert not takes(batch._replace(reduction="none"), torch.float32)
    assert not takes(batch, torch.float64)
    assert not takes(batch._replace(embeddings=batch.embeddings.to("meta")), torch.float32)
    inputs = make_inputs(19, 3, width=20, dtype=torch.float32)
    at_once = run(inputs, torch.arange(19) % 3, None, impl="tiled")
    assert len(counted) == 1
    monkeypatch.setattr(cpu_loop, "compiled_loop", lambda: None)
    assert not takes(batch, torch.float32)
    # Without the loop tiles give the same result.
    by_tiles = run(inputs, torch.arange(19) % 3, None, impl="tiled")
    assert len(counted) == 1
    for wanted, got in zip(by_tiles, at_once, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_machine_without_fused_multiply_add(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The code of the loop that this machine would not run."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    built = tmp_path / "supcon_loop.so"
    options = ["-O3", "-fopenmp", "-shared", "-fPIC", "-DANY_MACHINE"]
    subprocess.run([compiler, *options, str(SOURCE), "-o", str(built), "-lm"], check=True)
    cpu_loop.compiled_loop.cache_clear()
    monkeypatch.setattr(cpu_loop, "library", lambda name: ctypes.CDLL(str(built)))
    try:
        for kind, denominator in itertools.product(KINDS, DENOMINATORS):
            inputs = make_inputs(40, width=33, dtype=torch.float32, **kind)
            labels = torch.arange(40) % 3
            check_error(inputs, labels, impl="tiled", denominator=denominator)
    finally:
        cpu_loop.compiled_loop.cache_clear()


def test_another_default_device() -> None:
    x, labels = torch.randn(30, 8), torch.arange(30) % 3
    wanted = supcon_loss(x, labels)
    with torch.device("meta"):
        assert torch.equal(supcon_loss(x, labels), wanted)
