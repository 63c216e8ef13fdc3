import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusedacl.kernels import angle_degrees, combined_squared_norm, gated_combine_, grad_dot_norm
from fusedacl.kernels.gradients import angle as gradients
from fusedacl.kernels.gradients import cpu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

NAN, INF = math.nan, math.inf
List = list[Tensor | None]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use several chunks, of which the last is not full."""
    monkeypatch.setattr(cpu, "CHUNK_PER_THREAD", 16)
    monkeypatch.setattr(cpu, "PIECE", 20)


@pytest.fixture(params=["reference", "tiled", "tiled without the compiled loop"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "tiled without the compiled loop":
        monkeypatch.setattr(cpu, "compiled_loop", lambda: None)
    return request.param.split()[0]


def make_lists(dtype: torch.dtype = torch.float32) -> tuple[List, List]:
    shapes = ((5, 7), (16,), (33,), (), (0,), (3, 4), (2,))
    a: List = [torch.randn(shape).to(dtype) for shape in shapes]
    b: List = [torch.randn(shape).to(dtype) for shape in shapes]
    a[0], b[5] = torch.randn(7, 5).to(dtype).t(), torch.randn(4, 3).to(dtype).t()
    a[6] = b[1] = None
    return a, b


def expected_stats(a: List, b: List, groups: list[int]) -> Tensor:
    stats = torch.zeros(max(groups) + 1, 3, dtype=torch.float64)
    for left, right, group in zip(a, b, groups, strict=True):
        x, y = ([] if t is None else t.double().flatten().tolist() for t in (left, right))
        dot = math.fsum(p * q for p, q in zip(x, y, strict=False))
        stats[group] += torch.tensor(
            [dot, math.fsum(p * p for p in x), math.fsum(q * q for q in y)], dtype=torch.float64
        )
    return stats


def clones(gradients: List) -> List:
    return [None if x is None else x.clone() for x in gradients]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("other", [None, torch.float16, torch.float64])
def test_sums(impl: str, dtype: torch.dtype, other: torch.dtype | None) -> None:
    a, b = make_lists(dtype)
    if other is not None:
        b = [None if x is None else x.to(other) for x in b]
    for groups in (None, [0, 1, 3, 0, 1, 3, 0]):
        stats = grad_dot_norm(a, b, groups=groups, impl=impl)
        assert stats.dtype == torch.float32
        expected = expected_stats(a, b, groups or [0] * len(a))
        torch.testing.assert_close(stats.double(), expected, rtol=1e-6, atol=1e-5)


def test_many_elements_lose_nothing(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    """One float32 accumulator of ones stops at 2^24."""
    monkeypatch.setattr(cpu, "CHUNK_PER_THREAD", 128 * 1024)
    monkeypatch.setattr(cpu, "PIECE", 2**20)
    ones = torch.ones(2**24 + 3000)
    sums = grad_dot_norm([ones], [ones], impl=impl)
    assert sums.tolist() == [[float(torch.tensor(2.0**24 + 3000))] * 3]
    # Each addition rounds: one float32 product over all elements has a larger error.
    tenths = ones.fill_(0.1)
    exact = tenths[0].double().item() ** 2 * tenths.numel()
    assert grad_dot_norm([tenths], [tenths], impl=impl)[0].tolist() == pytest.approx(
        [exact] * 3, rel=2e-5
    )


compiled = pytest.mark.skipif(
    cpu.compiled_loop() is None,
    reason="the compiled loop was not built: no C compiler at installation",
)


@compiled
def test_sums_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = make_lists()
    expected = grad_dot_norm(a, b)
    for num_threads in (2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
        assert torch.equal(grad_dot_norm(a, b), expected)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 8191, 8192, 8193, 20000])
def test_the_compiled_loop_at_every_edge(count: int, dtype: torch.dtype) -> None:
    # The elements before and after must not be read.
    x, y = (torch.randn(count + 2, dtype=dtype) for _ in range(2))
    x[0], x[-1] = NAN, NAN
    expected = expected_stats([x[1:-1]], [y[1:-1]], [0])[0]
    pieces = [x[1:-1].data_ptr(), y[1:-1].data_ptr(), count]
    found = torch.tensor(list(cpu.sums_of_pieces(dtype, pieces)), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-4)


def test_angle() -> None:
    x = torch.tensor([1.0, 0.0])
    for degrees, y in ((0.0, [1, 0]), (45.0, [1, 1]), (90.0, [0, 3]), (180.0, [-2, 0])):
        angle = angle_degrees(grad_dot_norm([x], [torch.tensor(y).float()]))
        torch.testing.assert_close(angle, torch.tensor([degrees]), rtol=0, atol=1e-5)
    assert angle_degrees(grad_dot_norm([x], [torch.zeros(2)])).tolist() == [90]
    assert angle_degrees(grad_dot_norm([x], [None])).tolist() == [90]
    assert grad_dot_norm([None], [None]).tolist() == [[0, 0, 0]]
    # Rounding may give a cosine above 1.
    assert angle_degrees(torch.tensor([[1.0001, 1.0, 1.0]])).tolist() == [0]
    for bad in (NAN, INF):
        assert angle_degrees(grad_dot_norm([torch.tensor([1.0, bad])], [x])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scale", [None, 0.25, torch.tensor(0.25)], ids=["none", "float", "tensor"])
def test_combination(
    scale: float | Tensor | None, weight: float, impl: str, dtype: torch.dtype
) -> None:
    a, b = make_lists(dtype)
    b[6] = None  # nothing to write to
    before = clones(a)
    stats = grad_dot_norm(a, b)
    used = gated_combine_(a, b, stats, weight=weight, max_angle=180, scale=scale, impl=impl)
    assert used.tolist() == [torch.tensor(weight).item()]
    factor = 1.0 if scale is None else 0.25
    for x, old, y in zip(a, before, b, strict=True):
        if x is None or old is None:
            continue
        other = torch.zeros_like(old) if y is None else y
        wanted = factor * ((1 - weight) * old.double() + weight * other.double())
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(x.double(), wanted, rtol=tolerance, atol=tolerance)
        assert x.stride() == old.stride() or not old.is_contiguous()


def test_gate_per_group(impl: str) -> None:
    """Each group decides by itself: kept, dropped, zero gradient, overflow."""
    x = torch.tensor([1.0, 0.0])
    a: List = [x.clone(), x.clone(), x.clone(), torch.tensor([1.0, INF])]
    b: List = [torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 1.0]), torch.zeros(2), x.clone()]
    groups = [0, 1, 2, 3]
    stats = grad_dot_norm(a, b, groups=groups)
    used = gated_combine_(a, b, stats, weight=0.5, scale=2.0, groups=groups, impl=impl)
    assert used[:3].tolist() == [0.5, 0.0, 0.5]
    assert used[3].isnan()
    combined = [tensor.tolist() for tensor in a if tensor is not None]
    assert combined == [[2, 1], [2, 0], [1, 0], [1, INF]]


@pytest.mark.parametrize("scale", [None, -2.0, torch.tensor(0.5)], ids=["none", "float", "tensor"])
def test_clipping_is_part_of_the_pass(impl: str, scale: float | Tensor | None) -> None:
    """The norm is that of all groups after the scale, as in torch.nn.utils.clip_grad_norm_."""
    a, b = make_lists()
    b[6] = None
    groups = [0, 1, 1, 0, 1, 0, 0]
    stats = grad_dot_norm(a, b, groups=groups)
    unclipped = clones(a)
    options = {"weight": 0.3, "scale": scale, "groups": groups, "impl": impl}
    gated_combine_(unclipped, b, stats, **options)
    norm = torch.cat([x.flatten() for x in unclipped if x is not None]).norm()
    for max_norm in (norm.item() / 3, 2 * norm.item()):
        clipped = clones(a)
        gated_combine_(clipped, b, stats, max_norm=max_norm, **options)
        factor = min(1.0, max_norm / (norm.item() + 1e-6))
        for got, wanted in zip(clipped, unclipped, strict=True):
            if got is not None and wanted is not None:
                torch.testing.assert_close(got, wanted * factor)


def test_each_group_may_be_clipped_by_itself(impl: str) -> None:
    """Results equal those of each group alone; an overflow in one does not affect the others."""
    a, b = make_lists()
    b[6] = None
    groups = [0, 1, 2, 0, 1, 2, 0]
    left = a[2]
    assert left is not None
    left[3] = INF
    stats = grad_dot_norm(a, b, groups=groups)
    options = {"weight": 0.3, "scale": 0.5, "max_norm": 1.0, "impl": impl}
    together = clones(a)
    gated_combine_(together, b, stats, clip_groups=True, groups=groups, **options)
    for group in range(3):
        members = [index for index, of in enumerate(groups) if of == group]
        alone = [None if a[index] is None else a[index].clone() for index in members]
        others = [b[index] for index in members]
        gated_combine_(alone, others, stats[group : group + 1], **options)
        for index, wanted in zip(members, alone, strict=True):
            if wanted is not None:
                torch.testing.assert_close(together[index], wanted)


def test_without_a_norm_nothing_is_written(impl: str) -> None:
    """If one group overflows, clipping has no factor; without clipping the others are written."""
    a: List = [torch.ones(2), torch.tensor([1.0, INF])]
    b: List = [torch.ones(2), torch.ones(2)]
    stats = grad_dot_norm(a, b, groups=[0, 1])
    options = {"weight": 0.5, "scale": 0.5, "groups": [0, 1], "impl": impl}
    used = gated_combine_(a, b, stats, max_norm=1.0, **options)
    assert used[0] == 0.5 and used[1].isnan()
    assert [x.tolist() for x in a if x is not None] == [[1, 1], [1, INF]]
    gated_combine_(a, b, stats, **options)
    assert [x.tolist() for x in a if x is not None] == [[0.5, 0.5], [1, INF]]


def test_the_decision_is_taken_in_float64() -> None:
    """An angle of 60.00000000000001 degrees is 60 in float32."""
    stats = torch.tensor([[0.5, 1.0, 1.0]])
    assert angle_degrees(stats).tolist() == [60]
    for max_angle in (60.0, 60.00000000000001, 59.99999999999999):
        used = gated_combine_([X.clone()], [X], stats, weight=0.5, max_angle=max_angle)
        assert gradients.within_angle(stats, max_angle).tolist() == [used.item() == 0.5]
    assert len({gradients.within_angle(stats, 60 + x).item() for x in (-1e-13, 1e-13)}) == 2


def test_threshold_is_inclusive_and_can_be_below_90() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for other, max_angle, weight in ((y, 90.0, 0.5), (y, 89.9, 0.0), (None, 60, 0.0)):
        stats = grad_dot_norm([x], [other])
        used = gated_combine_([x.clone()], [other], stats, weight=0.5, max_angle=max_angle)
        assert used == weight


def test_norm_of_the_combination_needs_no_pass() -> None:
    a, b = make_lists()
    groups = [0, 1, 1, 0, 1, 0, 0]
    b[6] = None
    stats = grad_dot_norm(a, b, groups=groups)
    used = gated_combine_(a, b, stats, weight=0.3, max_angle=180, groups=groups)
    after = grad_dot_norm(a, a, groups=groups)[:, 1]
    torch.testing.assert_close(combined_squared_norm(stats, used), after)
    assert combined_squared_norm(stats, torch.tensor([0.3, NAN])).isnan().tolist() == [False, True]


X = torch.ones(3)
STATS = torch.ones(1, 3)
Call = Callable[[], Tensor]


def sums(*arguments: Any, **options: Any) -> Call:
    return lambda: grad_dot_norm(*arguments, **options)


def combine(a: Any = None, b: Any = None, stats: Tensor = STATS, **options: Any) -> Call:
    arguments = ([X.clone()] if a is None else a, [X] if b is None else b, stats)
    return lambda: gated_combine_(*arguments, **{"weight": 0.5, **options})


SPARSE, META = torch.ones(3).to_sparse(), X.to("meta")
with FakeTensorMode():
    FAKE = torch.ones(3)
TWO = TwoTensor(torch.ones(3), torch.ones(3))
VALUE_ERRORS = {
    "a has 1 entries and b 2": sums([X], [X, X]),
    "a and b are empty": sums([], []),
    r"a\[0\] has shape \(3,\) and b\[0\] \(2,\)": sums([X], [X[:2]]),
    r"b\[0\] is on meta and the first gradient on cpu": sums([X], [META]),
    "groups has 2 entries and a 1": sums([X], [X], groups=[0, 1]),
    r"groups is \[-1\]: every entry must be an int >= 0": sums([X], [X], groups=[-1]),
    "impl is 'tield': .*did you mean 'tiled'": sums([X], [X], impl="tield"),
    "impl='triton' cannot run: the tensors are on the cpu": sums([X], [X], impl="triton"),
    "impl='tiled' cannot run: it is for the CPU": sums([META], [META], impl="tiled"),
    r"stats has shape \(2, 3\): 1 group": combine(stats=torch.ones(2, 3)),
    "stats is on meta and the gradients on cpu": combine(stats=STATS.to("meta")),
    r"a\[0\] has shape \(3,\) and strides \(0,\): several": combine(a=[X[:1].expand(3)]),
    r"weight is 1.5: it must lie in \[0, 1\]": combine(weight=1.5),
    r"max_angle is 200: it must lie in \[0, 180\]": combine(max_angle=200),
    r"max_norm is 0: it must be > 0": combine(max_norm=0),
    r"scale has shape \(3,\): pass a number or a tensor": combine(scale=torch.ones(3)),
    r"stats has shape \(3,\): pass the \[G, 3\]": lambda: angle_degrees(X),
    r"used has shape \(2,\): stats has 1 group": lambda: combined_squared_norm(STATS, X[:2]),
    r"a\[0\] is None but b\[0\] is not": combine(a=[None]),
}
TYPE_ERRORS = {
    r"a\[0\] is sparse .*to_dense": sums([SPARSE], [X]),
    r"b\[0\] is torch.int64": sums([X], [X.long()]),
    r"a\[0\] must be a torch.Tensor or None, not list": sums([[1.0]], [X]),
    r"a\[0\] is a FakeTensor, which has no memory": sums([FAKE], [FAKE]),
    r"a\[0\] is a TwoTensor, .*plain tensors": combine(a=[TWO], b=[TWO]),
}


@pytest.mark.parametrize("message", [*VALUE_ERRORS, *TYPE_ERRORS])
def test_bad_input_is_named(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError if message in VALUE_ERRORS else TypeError, match=message):
        (VALUE_ERRORS | TYPE_ERRORS)[message]()


def test_another_default_device() -> None:
    with torch.device("meta"):
        stats = grad_dot_norm([X], [X])
    assert stats.device.type == "cpu"


def test_a_combined_gradient_has_a_new_version() -> None:
    """Otherwise a backward pass through what it was before would be wrong in silence."""
    a, b = [torch.randn(5)], [torch.randn(5)]
    before = a[0]._version
    gated_combine_(a, b, grad_dot_norm(a, b), weight=0.5, max_angle=180.0)
    assert a[0]._version > before
