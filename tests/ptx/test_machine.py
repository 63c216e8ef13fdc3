"""Threads, memory and warps of the machine for PTX, on a few instructions each."""

import numpy as np
import pytest
import torch
from ptx.driver import poison
from ptx.machine import Deadlock
from ptx.memory import Misaligned, OutOfBounds, Race, Uninitialized
from ptx.program import PtxError, parse
from ptx.snippets import lanes, run
from ptx.warps import AbsentLanes

# Each thread's own element of the first tensor, in %rd20.
OWN = "mad.wide.u32 %rd20, %r0, 4, %rd0;"
# Each thread's own word of shared memory is at address %r20.
OWN_SHARED = "shl.b32 %r20, %r0, 2;"


def numbers(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int32)


# Control flow


def test_threads_that_diverge_meet_again() -> None:
    """Odd lanes double their number, and all add 1 afterwards."""
    body = """
        and.b32 %r2, %r0, 1;
        setp.eq.s32 %p1, %r2, 0;
        mov.b32 %r3, %r0;
        @%p1 bra $even;
        add.s32 %r3, %r3, %r3;
    $even:
        add.s32 %r9, %r3, 1;
    """
    assert lanes(body).tolist() == [i + 1 if i % 2 == 0 else 2 * i + 1 for i in range(32)]


def test_loop_of_a_different_length_in_each_thread() -> None:
    body = """
        mov.b32 %r9, 0;
        mov.b32 %r2, 0;
    $loop:
        setp.gt.s32 %p1, %r2, %r0;
        @%p1 bra $done;
        add.s32 %r9, %r9, %r2;
        add.s32 %r2, %r2, 1;
        bra.uni $loop;
    $done:
    """
    assert lanes(body).tolist() == [i * (i + 1) // 2 for i in range(32)]


def test_table_of_branches() -> None:
    body = """
        and.b32 %r2, %r0, 3;
        mov.b32 %r9, 7;
    $table: .branchtargets $zero, $one, $more, $more;
        brx.idx %r2, $table;
    $zero:
        mov.b32 %r9, 100;
        bra.uni $more;
    $one:
        mov.b32 %r9, 101;
    $more:
    """
    assert lanes(body).tolist() == [(100, 101, 7, 7)[i % 4] for i in range(32)]


def test_blocks_know_their_number() -> None:
    found = torch.zeros(6 * 64, dtype=torch.int32)
    body = """
        mov.u32 %r1, %ctaid.x;
        mad.lo.s32 %r2, %r1, 64, %r0;
        mad.wide.s32 %rd20, %r2, 4, %rd0;
        st.global.b32 [%rd20], %r1;
    """
    counts = run(body, found, threads=64, blocks=6)
    assert torch.equal(found, torch.arange(6, dtype=torch.int32).repeat_interleave(64))
    assert counts.blocks == 6


def test_unknown_instructions_are_refused() -> None:
    for body in ("tanh.approx.f32 %r1, %r0;", "bar.sync 1;", "ld.local.b32 %r1, [%r0];"):
        with pytest.raises(PtxError, match="unknown"):
            run(body)
    with pytest.raises(PtxError, match="no kernel"):
        parse(".target sm_70\n")


# Memory


def test_load_and_store_vectors() -> None:
    source, target = numbers(128), torch.zeros(128, dtype=torch.int32)
    body = """
        mad.wide.u32 %rd20, %r0, 16, %rd0;
        mad.wide.u32 %rd21, %r0, 16, %rd1;
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd20];
        st.global.v4.b32 [%rd21], {%r4, %r3, %r2, %r1};
    """
    counts = run(body, source, target, counts_accesses=True)
    assert torch.equal(target, source.view(32, 4).flip(1).flatten())
    assert counts.global_sectors == 2 * 128 * 4 // 32


def test_guarded_access() -> None:
    """Lanes from 16 on do not read: for them the tensor would be too short."""
    found = lanes("add.s32 %r9, %r1, 1;", np.arange(32, dtype=np.int32))
    assert found.tolist() == list(range(1, 33))
    target = torch.zeros(16, dtype=torch.int32)
    body = OWN + "setp.lt.s32 %p1, %r0, 16; @%p1 st.global.b32 [%rd20], %r0;"
    run(body, target)
    assert torch.equal(target, numbers(16))


@pytest.mark.parametrize("access", ["ld.global.b32 %r9, [%rd20]", "st.global.b32 [%rd20], %r0"])
def test_an_element_too_few(access: str) -> None:
    run(f"{OWN} {access};", numbers(32))
    with pytest.raises(OutOfBounds, match="nearest tensor"):
        run(f"{OWN} {access};", numbers(32)[:31])
    with pytest.raises(OutOfBounds, match="nearest tensor"):
        run(f"{OWN} {access};", numbers(33)[1:-1])


def test_a_gap_between_tensors_is_out_of_bounds() -> None:
    whole = numbers(80)
    run(f"{OWN} ld.global.b32 %r1, [%rd20];", whole[:32], whole[40:])
    with pytest.raises(OutOfBounds):
        run(f"{OWN} ld.global.b32 %r1, [%rd20+16];", whole[:32], whole[40:])


def test_shared_memory_has_an_end() -> None:
    body = f"{OWN_SHARED} st.shared.b32 [%r20+4], %r0;"
    run(body, shared=33 * 4)
    with pytest.raises(OutOfBounds, match="132 bytes|128 bytes"):
        run(body, shared=32 * 4)


@pytest.mark.parametrize("space", ["global", "shared"])
def test_misaligned_vector(space: str) -> None:
    tensor = numbers(130)
    body = {
        "global": "mad.wide.u32 %rd20, %r0, 8, %rd0; ld.global.v2.b32 {%r1, %r2}, [%rd20+4];",
        "shared": "shl.b32 %r20, %r0, 3; st.shared.v2.b32 [%r20+4], {%r0, %r0};",
    }[space]
    with pytest.raises(Misaligned):
        run(body, tensor, shared=1024)
    run(body.replace("+4", "+8"), tensor, shared=1024)


def test_uninitialized_reads() -> None:
    with pytest.raises(Uninitialized):
        run(f"{OWN_SHARED} ld.shared.b32 %r1, [%r20];", shared=128)
    tensor = torch.zeros(64, dtype=torch.float16)
    run(f"{OWN} ld.global.b32 %r1, [%rd20];", tensor)
    poison(tensor[5:6])
    run(f"{OWN} ld.global.b32 %r1, [%rd20];", tensor)
    with pytest.raises(Uninitialized):
        run("mad.wide.u32 %rd20, %r0, 2, %rd0; ld.global.b16 %rs1, [%rd20];", tensor)


# Races

EXCHANGE = f"""
    {OWN_SHARED}
    st.shared.b32 [%r20], %r0;
    bar.sync 0;
    xor.b32 %r1, %r20, 128;
    ld.shared.b32 %r9, [%r1];
"""


def test_a_barrier_orders_two_warps() -> None:
    assert run(EXCHANGE, threads=64, shared=256).barriers == 1
    without = EXCHANGE.replace("bar.sync 0;", "")
    with pytest.raises((Race, Uninitialized)):
        run(without, threads=64, shared=256)
    # Within a warp no barrier is needed.
    run(without.replace("128", "64"), threads=64, shared=256)


def test_write_after_read_needs_a_barrier() -> None:
    """All read the first word, then the second warp changes it."""
    body = """
        mov.b32 %r20, 0;
        st.shared.b32 [%r20], 5;
        bar.sync 0;
        ld.shared.b32 %r1, [%r20];
        {barrier}
        setp.ge.s32 %p1, %r0, 32;
        @%p1 st.shared.b32 [%r20], 6;
    """
    run(body.format(barrier="bar.sync 0;"), threads=64, shared=16)
    with pytest.raises(Race, match="another warp has accessed"):
        run(body.format(barrier=""), threads=64, shared=16)


def test_write_of_different_values() -> None:
    body = "mov.b32 %r20, 0; st.shared.b32 [%r20], {value};"
    run(body.format(value=7), threads=64, shared=16)
    with pytest.raises(Race, match="different values"):
        run(body.format(value="%r0"), threads=64, shared=16)


def test_races_in_global_memory() -> None:
    """Warps of a block are ordered by a barrier, blocks are not."""
    body = f"""
        {OWN}
        st.global.b32 [%rd20], %r0;
        bar.sync 0;
        xor.b32 %r1, %r0, 32;
        mad.wide.u32 %rd21, %r1, 4, %rd0;
        ld.global.b32 %r9, [%rd21];
    """
    run(body, torch.zeros(64, dtype=torch.int32), threads=64)
    with pytest.raises(Race):
        run(body.replace("bar.sync 0;", ""), torch.full((64,), -1, dtype=torch.int32), threads=64)
    blocks = """
        mov.u32 %r1, %ctaid.x;
        st.global.b32 [%rd0], %r1;
    """
    with pytest.raises(Race):
        run(blocks, torch.zeros(1, dtype=torch.int32), blocks=2)


def test_a_barrier_that_some_threads_do_not_reach() -> None:
    body = """
        setp.lt.s32 %p1, %r0, 32;
        @%p1 bra $first;
        bar.sync 0;
        {end}
    $first:
        bar.sync 0;
    """
    with pytest.raises(Deadlock, match="different barriers"):
        run(body.format(end="bra.uni $first;"), threads=64)
    ends = "setp.lt.s32 %p1, %r0, 32; @%p1 bra $end; bar.sync 0; $end:"
    with pytest.raises(Deadlock, match="have ended"):
        run(ends, threads=64)


# Warps


@pytest.mark.parametrize(
    ("mode", "lane", "clamp", "wanted"),
    [
        ("bfly", 5, 31, [i ^ 5 for i in range(32)]),
        ("bfly", 16, 31, [i ^ 16 for i in range(32)]),
        ("up", 1, 0, [max(0, i - 1) for i in range(32)]),
        ("down", 2, 31, [i + 2 if i < 30 else i for i in range(32)]),
        ("idx", 3, 31, [3] * 32),
        # Segments of 8 lanes.
        ("idx", 3, 0x181F, [i // 8 * 8 + 3 for i in range(32)]),
    ],
)
def test_shuffle(mode: str, lane: int, clamp: int, wanted: list[int]) -> None:
    body = f"shfl.sync.{mode}.b32 %r9, %r0, {lane}, {clamp}, -1;"
    assert lanes(body).tolist() == wanted


def test_shuffle_without_some_lanes() -> None:
    body = """
        setp.lt.s32 %p1, %r0, 5;
        @%p1 bra $end;
        shfl.sync.bfly.b32 %r9, %r0, 1, 31, -1;
    $end:
    """
    with pytest.raises(AbsentLanes):
        run(body)


def test_reduce() -> None:
    found = lanes("redux.sync.add.s32 %r9, %r1, -1;", np.arange(32, dtype=np.int32))
    assert found.tolist() == [31 * 16] * 32


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(transposed: bool) -> None:
    """Row r holds 8 r, 8 r + 1, … as 16-bit numbers; a lane gets two neighbours of a row."""
    trans = ".trans" if transposed else ""
    body = f"""
        shl.b32 %r20, %r0, 2;
        shl.b32 %r2, %r0, 1;
        add.s32 %r3, %r2, 1;
        shl.b32 %r3, %r3, 16;
        or.b32 %r3, %r2, %r3;
        st.shared.b32 [%r20], %r3;
        bar.sync 0;
        and.b32 %r4, %r0, 7;
        shl.b32 %r4, %r4, 4;
        ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r9}}, [%r4];
    """
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    wanted = np.ascontiguousarray(matrix.T if transposed else matrix).view(np.uint32).ravel()
    assert lanes(body, shared=128).tolist() == wanted.tolist()


# Compute capability 8.0

COPY = """
    shl.b32 %r20, %r0, 4;
    mad.wide.u32 %rd20, %r0, 16, %rd0;
    cp.async.cg.shared.global [%r20], [%rd20], 16, {size};
    cp.async.commit_group;
    {wait}
    bar.sync 0;
    xor.b32 %r21, %r20, 512;
    ld.shared.b32 %r1, [%r21];
"""


def test_asynchronous_copy() -> None:
    source = numbers(64 * 4)
    wait = "cp.async.wait_group 0;"
    run(COPY.format(size=16, wait=wait), source, threads=64, shared=1024)
    with pytest.raises(Uninitialized):
        run(COPY.format(size=16, wait=""), source, threads=64, shared=1024)
    with pytest.raises(Uninitialized):
        later = "cp.async.wait_group 1;"
        run(COPY.format(size=16, wait=later), source, threads=64, shared=1024)
    # Nothing is read, and zeros are written.
    run(COPY.format(size=0, wait=wait), source[:1], threads=64, shared=1024)


@pytest.mark.parametrize("kind", ["tf32", "f16"])
def test_matrix_product(kind: str) -> None:
    """a [16, k] of small integers times the identity's first columns, by the ISA's layout."""
    k = 8 if kind == "tf32" else 16
    a = np.arange(16 * k).reshape(16, k) % 13
    b = np.eye(k, 8)
    lane = np.arange(32)
    group, place = lane // 4, lane % 4

    def pack(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray, axis: int) -> np.ndarray:
        if kind == "tf32":
            return matrix[rows, columns].astype(np.float32).view(np.uint32)
        step = (0, 1) if axis else (1, 0)
        pair = np.stack([matrix[rows, columns], matrix[rows + step[0], columns + step[1]]], 1)
        return np.ascontiguousarray(pair.astype(np.float16)).view(np.uint32).ravel()

    per = 1 if kind == "tf32" else 2
    registers = [
        pack(a, group + 8 * (i % 2), per * (place + 4 * (i // 2)), axis=1) for i in range(4)
    ]
    registers += [pack(b, per * (place + 4 * i), group, axis=0) for i in range(2)]
    body = f"""
        mov.b32 %r7, 0f00000000;
        mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32
          {{%r9, %r10, %r11, %r12}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%r7, %r7, %r7, %r7}};
    """
    for index, (row, column) in enumerate(
        [(group, 2 * place), (group, 2 * place + 1), (group + 8, 2 * place)]
    ):
        found = lanes(body, *registers, result=f"%r{9 + index}").view(np.float32)
        assert found.tolist() == (a @ b)[row, column].tolist()


# Counts


@pytest.mark.parametrize(("stride", "passes"), [(4, 1), (8, 2), (128, 32), (0, 1)])
def test_bank_conflicts(stride: int, passes: int) -> None:
    body = f"""
        mul.lo.s32 %r20, %r0, {stride};
        st.shared.b32 [%r20], 1;
        ld.shared.b32 %r1, [%r20];
    """
    counts = run(body, shared=4096, counts_accesses=True)
    assert counts.shared_passes == counts.least_shared_passes == 2 * passes


def test_wide_accesses_take_a_pass_for_each_quarter_of_a_warp() -> None:
    body = "shl.b32 %r20, %r0, 4; st.shared.v4.b32 [%r20], {%r0, %r0, %r0, %r0};"
    counts = run(body, shared=512, counts_accesses=True)
    assert (counts.shared_passes, counts.least_shared_passes) == (4, 4)
    same = "mov.b32 %r20, 0; mov.b32 %r1, 7; st.shared.v4.b32 [%r20], {%r1, %r1, %r1, %r1};"
    counts = run(same, shared=512, counts_accesses=True)
    assert (counts.shared_passes, counts.least_shared_passes) == (4, 1)


def test_sectors_of_scattered_accesses() -> None:
    tensor = numbers(32 * 16)
    body = "mad.wide.u32 %rd20, %r0, 64, %rd0; ld.global.b32 %r1, [%rd20];"
    assert run(body, tensor, counts_accesses=True).global_sectors == 32
    assert (
        run(f"{OWN} ld.global.b32 %r1, [%rd20];", tensor, counts_accesses=True).global_sectors == 4
    )


def test_instructions_by_unit() -> None:
    body = """
        fma.rn.f32 %r1, %r0, %r0, %r0;
        add.f32 %r1, %r1, %r1;
        add.s32 %r2, %r0, %r0;
        ex2.approx.ftz.f32 %r1, %r1;
        div.full.f32 %r1, %r1, %r1;
        sqrt.rn.f32 %r1, %r1;
    """
    counts = run(body, threads=64, blocks=3)
    assert (counts.fma, counts.fp32, counts.special) == (6, 12, 12)
