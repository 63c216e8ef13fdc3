"""Arithmetic of the machine for PTX, against Python's integers and NumPy's float64."""

import numpy as np
import pytest
from ptx.operations import exp2, fused_multiply_add, to_bfloat16, to_tf32
from ptx.snippets import lanes

# The machine runs without NumPy's remarks on infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

INTEGERS = np.array(
    [0, 1, 2, 3, 5, 31, 32, 33, 255, 65536, 2**31 - 1, -1, -2, -7, -(2**31), 77] * 2
)
OTHERS = np.roll(INTEGERS, 5)
FLOATS = np.array(
    [0, -0.0, 1, -1, 1.5, 3e38, -3e38, 1e-38, 1e-45, np.inf, -np.inf, np.nan, 2.5, -7, 100, 1e-3]
    * 2,
    np.float32,
)
OTHER_FLOATS = np.roll(FLOATS, 7)


def signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize(
    ("instruction", "wanted"),
    [
        ("add.s32 %r9, %r1, %r2", lambda a, b: a + b),
        ("sub.s32 %r9, %r1, %r2", lambda a, b: a - b),
        ("mul.lo.s32 %r9, %r1, %r2", lambda a, b: a * b),
        ("mul.hi.s32 %r9, %r1, %r2", lambda a, b: a * b >> 32),
        ("mul.hi.u32 %r9, %r1, %r2", lambda a, b: (a % 2**32) * (b % 2**32) >> 32),
        ("mad.lo.s32 %r9, %r1, %r2, 9", lambda a, b: a * b + 9),
        ("min.s32 %r9, %r1, %r2", min),
        ("min.u32 %r9, %r1, %r2", lambda a, b: min(a % 2**32, b % 2**32)),
        ("max.s32 %r9, %r1, %r2", max),
        ("neg.s32 %r9, %r1", lambda a, b: -a),
        ("and.b32 %r9, %r1, %r2", lambda a, b: a & b),
        ("or.b32 %r9, %r1, %r2", lambda a, b: a | b),
        ("xor.b32 %r9, %r1, %r2", lambda a, b: a ^ b),
        ("not.b32 %r9, %r1", lambda a, b: ~a),
        ("div.s32 %r9, %r1, 7", lambda a, b: int(a / 7)),
        ("div.u32 %r9, %r1, 7", lambda a, b: a % 2**32 // 7),
        ("shl.b32 %r9, %r1, 3", lambda a, b: a << 3),
        ("shl.b32 %r9, %r1, 32", lambda a, b: 0),
        ("shr.s32 %r9, %r1, 3", lambda a, b: a >> 3),
        ("shr.s32 %r9, %r1, 99", lambda a, b: a >> 31),
        ("shr.u32 %r9, %r1, 3", lambda a, b: a % 2**32 >> 3),
        ("shr.u32 %r9, %r1, %r2", lambda a, b: (a % 2**32) >> min(b % 2**32, 32)),
        ("bfe.u32 %r9, %r1, 4, 5", lambda a, b: a >> 4 & 31),
        ("bfe.s32 %r9, %r1, 4, 1", lambda a, b: -(a >> 4 & 1)),
        ("prmt.b32 %r9, %r1, %r2, 0x5410U", lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16),
        ("prmt.b32 %r9, %r1, %r2, 0x7632U", lambda a, b: a >> 16 & 0xFFFF | b >> 16 << 16),
        ("setp.lo.u32 %p1, %r1, %r2; selp.b32 %r9, 1, 0, %p1",
         lambda a, b: a % 2**32 < b % 2**32),
        ("setp.lt.s32 %p1, %r1, %r2; selp.b32 %r9, 1, 0, %p1", lambda a, b: a < b),
        ("setp.ne.b32 %p2, %r1, 5; setp.gt.or.s32 %p1, %r1, %r2, %p2; selp.b32 %r9, 1, 0, %p1",
         lambda a, b: a > b or a != 5),
        # Through registers of other sizes.
        ("cvt.u16.u32 %rs1, %r1; cvt.u32.u16 %r9, %rs1", lambda a, b: a & 0xFFFF),
        ("cvt.s64.s32 %rd30, %r1; shr.s64 %rd30, %rd30, 32; cvt.u32.u64 %r9, %rd30",
         lambda a, b: a >> 32),
        ("mul.wide.s32 %rd30, %r1, %r2; shr.s64 %rd30, %rd30, 7; cvt.u32.u64 %r9, %rd30",
         lambda a, b: a * b >> 7),
        ("mad.wide.u32 %rd30, %r1, %r2, -1; shr.u64 %rd30, %rd30, 7; cvt.u32.u64 %r9, %rd30",
         lambda a, b: ((a % 2**32) * (b % 2**32) - 1) % 2**64 >> 7),
        ("mov.b64 %rd30, {%r1, %r2}; mov.b64 {%r3, %r4}, %rd30; sub.s32 %r9, %r3, %r4",
         lambda a, b: a - b),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r9, {%rs2, %rs1}",
         lambda a, b: (a >> 16 & 0xFFFF) | a << 16),
    ],
)  # fmt: skip
def test_integers(instruction: str, wanted: object) -> None:
    inputs = INTEGERS.astype(np.int32), OTHERS.astype(np.int32)
    found = lanes(f"{instruction};", *inputs).view(np.int32)
    assert callable(wanted)
    pairs = zip(INTEGERS.tolist(), OTHERS.tolist(), strict=True)
    assert found.tolist() == [signed(int(wanted(a, b))) for a, b in pairs]


def bits(values: np.ndarray) -> list[int]:
    """Equal for equal numbers, all NaN being one."""
    single = values.astype(np.float32)
    return np.where(np.isnan(single), 0x7FC00000, single.view(np.uint32)).tolist()


@pytest.mark.parametrize(
    ("instruction", "wanted"),
    [
        ("add.f32 %r9, %r1, %r2", lambda a, b: a + b),
        ("mul.f32 %r9, %r1, %r2", lambda a, b: a * b),
        ("div.rn.f32 %r9, %r1, %r2", lambda a, b: a / b),
        ("sqrt.rn.f32 %r9, %r1", lambda a, b: np.sqrt(a)),
        ("abs.f32 %r9, %r1", lambda a, b: np.abs(a)),
        ("neg.f32 %r9, %r1", lambda a, b: -a),
        ("min.f32 %r9, %r1, %r2", np.fmin),
        ("max.NaN.f32 %r9, %r1, %r2", np.maximum),
        ("cvt.f64.f32 %rd30, %r1; add.f64 %rd30, %rd30, 0d3FF0000000000000;"
         "cvt.rn.f32.f64 %r9, %rd30", lambda a, b: a + 1),
        ("cvt.rn.f16.f32 %rs1, %r1; cvt.f32.f16 %r9, %rs1", lambda a, b: a.astype(np.float16)),
    ],
)  # fmt: skip
def test_floats(instruction: str, wanted: object) -> None:
    found = lanes(f"{instruction};", FLOATS, OTHER_FLOATS).view(np.float32)
    assert callable(wanted)
    with np.errstate(all="ignore"):
        exact = wanted(FLOATS.astype(np.float64), OTHER_FLOATS.astype(np.float64))
        if "f16" in instruction:
            exact = wanted(FLOATS, OTHER_FLOATS)
        assert bits(found) == bits(exact)


@pytest.mark.parametrize(
    ("comparison", "wanted"),
    [
        ("eq", lambda a, b: a == b),
        ("ne", lambda a, b: a != b and a == a and b == b),
        ("lt", lambda a, b: a < b),
        ("neu", lambda a, b: a != b),
        ("ltu", lambda a, b: not a >= b),
        ("nan", lambda a, b: a != a or b != b),
        ("num", lambda a, b: a == a and b == b),
    ],
)
def test_comparisons_of_floats(comparison: str, wanted: object) -> None:
    body = f"setp.{comparison}.f32 %p1, %r1, %r2; selp.b32 %r9, 1, 0, %p1;"
    found = lanes(body, FLOATS, OTHER_FLOATS)
    assert callable(wanted)
    pairs = zip(FLOATS.tolist(), OTHER_FLOATS.tolist(), strict=True)
    assert found.tolist() == [int(wanted(a, b)) for a, b in pairs]


def test_subnormal_numbers_are_flushed_where_it_says_so() -> None:
    tiny = np.full(32, 1e-40, np.float32)
    one = np.ones(32, np.float32)
    assert (lanes("mul.f32 %r9, %r1, %r2;", tiny, one).view(np.float32) == tiny).all()
    assert (lanes("mul.ftz.f32 %r9, %r1, %r2;", tiny, one) == 0).all()
    assert (lanes("mul.ftz.f32 %r9, %r1, %r2;", tiny, one * 1e30) == 0).all()


def test_fused_multiply_add_rounds_the_product_only_with_the_sum() -> None:
    a = np.array([1 + 2.0**-12], np.float32)
    assert fused_multiply_add(a, a, -(a * a)).tolist() == [2.0**-24]


def test_exp2_is_rounded_from_more_digits() -> None:
    x = np.linspace(-150, 128, 20001).astype(np.float32)
    found, exact = exp2(x), np.exp2(x.astype(np.float64))
    normal = (exact > 2.0**-126) & (exact < 2.0**127.99)
    assert (np.abs(found - exact)[normal] <= 0.5000001 * 2.0**-23 * exact[normal]).all()
    special = exp2(np.array([0, 1, -np.inf, np.inf, np.nan, -1000, 1000], np.float32))
    np.testing.assert_array_equal(special, [1, 2, 0, np.inf, np.nan, 0, np.inf])


@pytest.mark.parametrize(
    ("instruction", "exact", "largest"),
    [
        ("ex2.approx.ftz.f32 %r9, %r1", lambda x: np.exp2(x.astype(np.float64)), 2.0**-22),
        ("sqrt.approx.ftz.f32 %r9, %r1", lambda x: np.sqrt(x.astype(np.float64)), 2.0**-23),
        ("div.full.f32 %r9, %r1, 0f40400000", lambda x: x.astype(np.float64) / 3, 2.0**-22),
    ],
)
def test_errors_of_approximate_functions(instruction: str, exact: object, largest: float) -> None:
    x = np.linspace(0.5, 20, 32).astype(np.float32)
    assert callable(exact)
    rounding = 2.0**-24
    for errors, most, least in ((False, rounding, 0.0), (True, largest + rounding, rounding)):
        found = lanes(f"{instruction};", x, errors=errors).view(np.float32)
        relative = np.abs(found / exact(x) - 1)
        assert least <= relative.max() <= 1.001 * most


def test_rounding_to_short_formats() -> None:
    x = np.array([1, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, np.inf], np.float32)
    assert to_bfloat16(x).tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F80, 0x7F80]
    wanted = np.array([1, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-10, np.inf], np.float32)
    assert to_tf32(x).tolist() == wanted.view(np.uint32).tolist()
