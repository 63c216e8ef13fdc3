"""The command `targets` accepts sound kernels and names the unsound ones.

The kernels here are never run: a process without the interpreter imports this file and compiles
them in place of a shipped file of kernels.
"""

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402
from fusedacl.kernels.support import machine  # noqa: E402
from fusedacl.kernels.support.variant import Variant  # noqa: E402
from fusedacl.kernels.targets import __main__ as targets  # noqa: E402
from fusedacl.kernels.targets import compilation, limits, tables  # noqa: E402
from fusedacl.kernels.targets.chips import CHIPS  # noqa: E402
from fusedacl.kernels.targets.compilation import Resources, Task  # noqa: E402

PAGE = Path(__file__).parents[3] / "docs" / "kernel_resources.md"
FILES = {
    name: importlib.import_module(f"fusedacl.kernels.{module}")
    for name, module in targets.KERNEL_FILES.items()
}
LARGEST = "supcon_fused"


@triton.jit
def copy_kernel(source, target, number, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + offsets, mask=offsets < number)
    tl.store(target + offsets, values, mask=offsets < number)


@triton.jit
def normalize_kernel(source, target, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Hold all ROWS x COLUMNS values at once."""
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    values = tl.load(source + offsets)
    values = values / tl.sum(values, 1)[:, None] / tl.sum(values, 0)[None, :]
    tl.store(target + offsets, values)


@triton.jit
def product_kernel(left, right, target, width, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, CHUNK)[None, :]
    products = tl.zeros([ROWS, ROWS], tl.float32)
    for start in range(0, width, CHUNK):
        of_left = tl.load(left + rows * width + start + columns)
        of_right = tl.load(right + rows * width + start + columns)
        products = tl.dot(of_left, tl.trans(of_right), products)
    tl.store(target + rows * ROWS + tl.arange(0, ROWS)[None, :], products)


@triton.jit
def broken_kernel(source, BLOCK: tl.constexpr):
    tl.store(source + tl.arange(0, BLOCK), tl.no_such_function(BLOCK))


def copying(name: str, **changes: Any) -> Variant:
    types = {"source": "*fp32", "target": "*fp32", "number": "i32"}
    settings = {"divisible_by_16": frozenset(types), **changes}
    return Variant(name, copy_kernel, types, {"BLOCK": 1024}, **settings)


def product(name: str, dtype: str, rows: int, chunk: int, **changes: Any) -> Variant:
    types = {"left": f"*{dtype}", "right": f"*{dtype}", "target": "*fp32", "width": "i32"}
    constants = {"ROWS": rows, "CHUNK": chunk}
    return Variant(
        name, product_kernel, types, constants, divisible_by_16=frozenset(types), **changes
    )


def normalizing(name: str, num_warps: int, **changes: Any) -> Variant:
    types = {"source": "*fp32", "target": "*fp32"}
    constants = {"ROWS": 64, "COLUMNS": 256}
    return Variant(name, normalize_kernel, types, constants, num_warps=num_warps, **changes)


class Sound:
    @staticmethod
    def variants(capability: int) -> list[Variant]:
        return [
            copying("copy"),
            normalizing("measured", num_warps=1, spills_because="one warp: twice as fast"),
            *([product("fp16", "fp16", 64, 32, matrix_unit=True)] if capability >= 80 else []),
        ]


class Unsound:
    @staticmethod
    def variants(capability: int) -> list[Variant]:
        return [
            copying("sound"),
            normalizing("spilling", num_warps=1),
            copying("no longer spilling", spills_because="one warp: twice as fast"),
            copying("no product", matrix_unit=True),
            product("large", "fp16", 128, 128, num_warps=8, num_stages=4),
            Variant("broken", broken_kernel, {"source": "*fp32"}, {"BLOCK": 16}),
            Variant("forgetful", copy_kernel, {"source": "*fp32"}, {"BLOCK": 16}),
            copying("misnamed", divisible_by_16=frozenset({"BLOCK"})),
            copying("aborting"),
            copying("after it"),
        ]


def abort_where_named(task: Task) -> Any:
    if task.variant.name == "aborting":
        os.write(2, b"LLVM ERROR: no such layout\n")
        os.abort()
    return compile_variant(task)


compile_variant = compilation.compile_variant


def gate(file: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command for the kernels of a class here, in a process without the interpreter."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_targets
from fusedacl.kernels.targets import __main__ as targets, compilation
compilation.compile_variant = test_targets.abort_where_named
files = {{"stand_in": test_targets.{file}}}
sys.exit(targets.main({json.dumps(arguments)}, files))
"""
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def test_shipped_kernels_are_as_promised_and_the_page_shows_them() -> None:
    """The files of few kernels on one GPU; `make targets` compiles all files for all GPUs."""
    command = [sys.executable, "-m", "fusedacl.kernels.targets", "--check", str(PAGE), "--pairs"]
    command += ["--capability", "90", "--kernels", *(name for name in FILES if name != LARGEST)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all as promised\n")


def test_the_page_has_a_cell_for_every_variant_and_no_other() -> None:
    tasks = compilation.list_tasks(FILES, list(CHIPS))
    cells = tables.read_cells(PAGE.read_text(encoding="utf-8"))
    assert cells.keys() == {(task.file, task.variant.name, task.capability) for task in tasks}


def test_pairs_of_properties_are_covered_by_fewer_tasks() -> None:
    tasks = [
        Task("file", capability, product(f"{dtype} {rows} {chunk}", dtype, rows, chunk))
        for capability, dtype, rows, chunk in itertools.product(
            (70, 80, 90), ("fp16", "fp32"), (16, 32, 64), (32, 64)
        )
    ]

    def pairs(chosen: list[Task]) -> set[Any]:
        names = ([f"sm_{task.capability}", *task.variant.name.split()] for task in chosen)
        return {pair for words in names for pair in itertools.combinations(enumerate(words), 2)}

    chosen = compilation.choose_pairs(tasks)
    assert pairs(chosen) == pairs(tasks)
    assert 9 <= len(chosen) < len(tasks) / 2


def test_sound_kernels_pass() -> None:
    done = gate("Sound", "--capability", "75", "90", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    lines = {tuple(line[:2]): line for line in map(str.split, done.stdout.splitlines())}
    assert ("fp16", "sm_75") not in lines
    spills, matrix_instructions = (int(lines["fp16", "sm_90"][place]) for place in (3, -4))
    assert spills == 0 and matrix_instructions > 0
    # 1024 values for 128 threads: two loads of four values each.
    assert lines["copy", "sm_75"][-3:] == ["2", "of", "2"]


def test_every_unsound_kernel_is_named_with_reason_and_remedy() -> None:
    done = gate("Unsound", "--capability", "86", "--jobs", "2", "--quiet")
    assert done.returncode == 1
    failures = [line for line in done.stderr.splitlines() if line.startswith("FAILED")]
    found = {line.split(", ")[1]: line for line in failures}
    reasons = {
        "spilling": ["bytes per thread", "smaller blocks"],
        "no longer spilling": ["spills_because", "remove it"],
        "no product": ["matrix instruction", "tl.dot"],
        "large": ["192 KiB of shared memory", "at most 99", "fewer stages"],
        "broken": ["does not compile", "no_such_function"],
        "forgetful": ["number, target", "kernel's arguments"],
        "misnamed": ["BLOCK", "divisible_by_16"],
        "aborting": ["SIGABRT", "LLVM ERROR: no such layout"],
    }
    assert set(found) == set(reasons)
    for name, words in reasons.items():
        assert all(word in found[name] for word in words)
    assert done.stdout == f"Triton {triton.__version__}, 10 compilations: 8 failures\n"


def test_an_exception_for_another_triton_is_kept_when_asked() -> None:
    outcome = Resources(registers=32, spilled=0, shared=0, matrix=0, loads=1, wide_loads=1)
    task = Task("file", 80, copying("copy", spills_because="measured with 3.3"))
    assert limits.find_failures(task, outcome, keep_exceptions=True) == []
    assert len(limits.find_failures(task, outcome, keep_exceptions=False)) == 1


def test_a_gpu_that_the_assembler_does_not_know_is_said_and_no_failure(tmp_path: Path) -> None:
    assembler = tmp_path / "ptxas"
    assembler.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "release 12.8, V12.8.93"; exit; fi\n'
        "echo \"ptxas fatal   : Value 'sm_100a' is not defined for option 'gpu-name'\" >&2\n"
        "exit 1\n"
    )
    assembler.chmod(0o755)
    paths = {
        "TRITON_PTXAS_PATH": str(assembler), "TRITON_PTXAS_BLACKWELL_PATH": str(assembler),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    done = gate("Sound", "--capability", "100", **paths)
    assert done.returncode == 0, done.stderr
    assert "does not know it: sm_100" in done.stdout
    # Every assembler must know this GPU.
    assert gate("Sound", "--capability", "90", **paths).returncode == 1


def test_usage_is_read_from_cuobjdump() -> None:
    listing = "GLOBAL:0\n Function copy:\n  REG:96 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:944"
    usage = compilation.parse_usage(listing)
    assert (usage["REG"], usage["STACK"], usage["SHARED"], usage["LOCAL"]) == (96, 16, 1024, 8)
    with pytest.raises(ValueError, match="lists no LOCAL, REG, SHARED, STACK"):
        compilation.parse_usage("cuobjdump: no kernel found")


def test_instructions_are_counted_in_ptx() -> None:
    ptx = """
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	ld.global.L1::evict_last.v2.b64 { %rd2, %rd3 }, [ %rd1 + 16 ];
	@!%p1 ld.global.b16 { %rs1 }, [ %rd1 + 32 ];
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x10, %r6;
	cp.async.ca.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 4;
	ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r7 ];
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
	wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
	@%p2 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p3;
	tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [%rd1];
"""
    assert compilation.count_loads(ptx) == (5, 3)
    assert compilation.count_matrix_instructions(ptx) == 3


# A product whose sums are in registers while a function is called.
SERIALIZED = """
.version 8.0
.target sm_90a
.address_size 64
.func (.param .f32 result) call (.param .f32 x)
{
    .reg .f32 %f<4>;
    .reg .pred %p<2>;
    ld.param.f32 %f1, [x];
    setp.lt.f32 %p1, %f1, 0f00000000;
    mul.f32 %f2, %f1, %f1;
    @%p1 bra $end;
    { .param .f32 y; .param .f32 z; st.param.f32 [y], %f1; call.uni (z), call, (y);
      ld.param.f32 %f2, [z]; }
$end:
    st.param.f32 [result], %f2;
    ret;
}
.visible .entry product(.param .u64 target)
.reqntid 128
{
    .reg .b64 %rd<3>;
    .reg .f32 %f<6>;
    ld.param.u64 %rd1, [target];
    mov.b64 %rd2, 1;
    mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
      {%f1, %f2, %f3, %f4}, %rd2, %rd2, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    CALL
    wgmma.wait_group.sync.aligned 0;
    st.global.v4.f32 [%rd1], {%f1, %f2, %f3, %f4};
    ret;
}
"""
CALL = (
    "{ .param .f32 y; .param .f32 z; st.param.f32 [y], 0f3F800000; call.uni (z), call, (y); "
    "ld.param.f32 %f5, [z]; }"
)


def test_products_that_wait_for_each_other_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "triton_version", lambda: (3, 4))
    assert compilation.find_serialization(SERIALIZED.replace("CALL", "")) == ""
    assert compilation.find_serialization(SERIALIZED.replace("wgmma.mma_async", "other")) == ""
    reason = compilation.find_serialization(SERIALIZED.replace("CALL", CALL))
    assert "calls in the function" in reason
    resources = Resources(96, 0, 1024, matrix=1, loads=0, wide_loads=0, serialized=reason)
    (failure,) = limits.find_failures(
        Task("file", 90, copying("copy")), resources, keep_exceptions=False
    )
    assert "wait for each other" in failure and reason in failure
    # Triton 3.3 does so by itself.
    monkeypatch.setattr(limits, "triton_version", lambda: (3, 3))
    assert not limits.find_failures(
        Task("file", 90, copying("copy")), resources, keep_exceptions=False
    )


def test_markdown_has_a_row_per_variant_and_a_column_per_gpu() -> None:
    sound = Resources(registers=96, spilled=0, shared=32 * 1024, matrix=8, loads=4, wide_loads=4)
    spilled = Resources(registers=255, spilled=16, shared=0, matrix=0, loads=4, wide_loads=4)
    places = (("first", 70, "a"), ("first", 80, "a"), ("first", 80, "b"), ("second", 70, "a"))
    tasks = [Task(file, capability, copying(name)) for file, capability, name in places]
    page = tables.markdown(tasks, [spilled, sound, sound, "LLVM ERROR"], "Triton 3.7.1.")
    expected = """Triton 3.7.1.

### first

| variant | sm_70 | sm_80 |
|---|---|---|
| a | 255 / 0 / 8 / 0, **spills 16 B** | 96 / 32 / 16 / 8 |
| b |  | 96 / 32 / 16 / 8 |

### second

| variant | sm_70 |
|---|---|
| a | **does not compile** |
"""
    assert page == expected
    cells = tables.read_cells(f"text\n{tables.BEGIN}\n{page}\n{tables.END}\n| no | cell |\n")
    assert cells == tables.markdown_cells(tasks, [spilled, sound, sound, "LLVM ERROR"])


def test_the_table_replaces_what_lies_between_the_markers() -> None:
    page = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    written = tables.replace_generated(page, "new\n")
    assert written == f"before\n{tables.BEGIN}\n\nnew\n\n{tables.END}\nafter\n"
    assert tables.replace_generated(written, "new\n") == written
    with pytest.raises(ValueError, match="lacks the lines"):
        tables.replace_generated("no markers", "new")


@pytest.mark.parametrize("file", FILES)
def test_variants_name_every_argument_once(file: str) -> None:
    with_products = ("supcon_small", "row_sums", "triangle_sums", "pair_gradient")
    for capability in CHIPS:
        variants = FILES[file].variants(capability)
        assert bool(variants) == (file != LARGEST or capability >= 80)
        for variant in variants:
            arguments = [*variant.types, *variant.constants]
            assert sorted(arguments) == sorted(variant.kernel.arg_names)
            has_products = capability >= 80 and variant.name.startswith(with_products)
            assert variant.matrix_unit == has_products


@pytest.mark.parametrize(
    "variants, message",
    [([copying("copy")] * 2, "two variants 'copy'"), ([], "ships nothing for any GPU")],
)
def test_wrong_lists_of_variants_are_refused(variants: list[Variant], message: str) -> None:
    module = SimpleNamespace(variants=lambda capability: variants)
    with pytest.raises(ValueError, match=message):
        compilation.list_tasks({"file": module}, [80])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--kernels", "supcon_smal"], "did you mean 'supcon_small'?"),
        (["--capability", "72"], "--capability is '72'"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--pairs", "--write", str(PAGE)], "leave out --pairs"),
        (["--check", "no-such-page.md"], "no-such-page.md"),
    ],
)
def test_wrong_arguments_are_refused_in_words(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        targets.main(arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other reasons than these are those of test_machine.py."""
    monkeypatch.setattr(machine, "triton_version", lambda: None)
    assert targets.main([]) == 2
    assert "Triton is not installed" in capsys.readouterr().err
    monkeypatch.setattr(sys, "platform", "darwin")
    assert targets.main([]) == 2
    assert "Triton exists for Linux only" in capsys.readouterr().err
