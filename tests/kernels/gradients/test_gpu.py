"""The GPU kernels against the float64 reference."""

import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from contrastive_cases import DEVICE, DTYPES
from fusedacl.kernels import gated_combine_, grad_dot_norm
from fusedacl.kernels.gradients import angle as gradients
from fusedacl.kernels.gradients import chunk_tables, gpu
from gradient_cases import List, check_combination, check_sums, copies, fused
from torch import Tensor

NAN, INF = math.nan, math.inf
ONE = pytest.approx(1, abs=1e-5)

# NumPy, in the interpreter, warns of the NaN and infinity that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    """Entries have several chunks, chunks several blocks; tables of other sizes are deleted.

    NUM_WARPS gives each thread an element: more threads would read elements that others change.
    """
    monkeypatch.setattr(chunk_tables, "CHUNK", 256)
    sizes = {"BLOCK": 64, "NUM_WARPS": 2, "PARTIAL_BLOCK": 8, "GROUP_BLOCK": 4}
    for name, size in sizes.items():
        monkeypatch.setattr(gpu, name, size)
    chunk_tables.layouts.clear()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def unaligned(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make a view that starts one element after a multiple of 16 bytes."""
    view = random(size + 1, dtype=dtype)[1:]
    assert size == 0 or view.data_ptr() % 16 != 0
    return view


def mixed_lists() -> tuple[List, List]:
    """Make lists with every pair of dtypes, and sizes around a block and a chunk."""
    sizes = itertools.cycle((1, 7, 0, 64, 255, 256, 257, 1000, 512))
    pairs = itertools.product((*DTYPES, None), repeat=2)
    made = [
        [None if dtype is None else random(size, dtype=dtype) for dtype in pair]
        for pair, size in zip(pairs, sizes, strict=False)
    ]
    a, b = map(list, zip(*made, strict=True))
    return a, b


def lists(*sizes: int, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> tuple[List, List]:
    """Make two lists with tensors of these sizes; the dtypes take turns, also between the lists."""
    turns = itertools.cycle(dtypes)
    a, b = ([random(size, dtype=next(turns)) for size in sizes] for _ in range(2))
    return a, b


@pytest.mark.parametrize("right", DTYPES)
@pytest.mark.parametrize("left", DTYPES)
def test_every_size(left: torch.dtype, right: torch.dtype) -> None:
    sizes = (0, 1, 7, 63, 64, 65, 256, 257, 1000)
    a: List = [random(size, dtype=left) for size in sizes] + [unaligned(n, left) for n in sizes]
    b: List = [random(size, dtype=right) for size in sizes] + [unaligned(n, right) for n in sizes]
    check_sums(a, b, list(range(len(a))))
    check_combination(a, b)


def test_one_launch_for_all_dtypes_and_groups() -> None:
    a, b = mixed_lists()
    for groups in (None, [index * 7 % 5 for index in range(len(a))], [3, *[9] * (len(a) - 1)]):
        stats = check_sums(a, b, groups)
        assert stats.isfinite().all()
        present = [None if x is None else y for x, y in zip(a, b, strict=True)]
        for max_norm, clip_groups in ((None, False), (2.0, False), (2.0, True)):
            used = check_combination(
                a, present, groups=groups, max_norm=max_norm, clip_groups=clip_groups
            )
            # Groups without elements have an l' too.
            assert used.tolist() == [torch.tensor(0.3).item()] * len(stats)


def test_the_last_bit_does_not_depend_on_alignment() -> None:
    for dtype in DTYPES:
        x, y = random(1000, dtype=dtype), random(1000)
        shifted = unaligned(1000, dtype).copy_(x)
        assert torch.equal(fused([x], [y]), fused([shifted], [y]))


def test_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GROUP_BLOCK", 32)
    a, b = lists(*(1 + index % 5 for index in range(101)), dtypes=DTYPES)
    groups = [index % 17 for index in range(101)]
    check_sums(a, b, groups)
    check_combination(a, b, groups=groups, max_norm=1.0)


def test_many_chunks_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 sum of ones stops at 2^24; the sum of these chunks is larger."""
    monkeypatch.setattr(chunk_tables, "CHUNK", 64)
    ones = torch.full((64 * 260 + 1,), 32.0, device=DEVICE)
    stats = fused([ones], [ones])
    exact = 1024 * (64 * 260 + 1)
    assert exact > 2**24
    assert stats.tolist() == [[float(torch.tensor(float(exact)))] * 3]
    monkeypatch.setattr(chunk_tables, "CHUNK", 256)
    sizes = torch.rand(5000, device=DEVICE).add_(1e-3)
    check_sums([sizes], [sizes.sqrt()])


STRIDED: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "both transposed": lambda: (random(9, 40).t(), random(9, 40).t()),
    "one transposed": lambda: (random(9, 40).t(), random(40, 9)),
    "the other transposed": lambda: (random(40, 9), random(9, 40).t()),
    "channels last": lambda: (
        random(2, 3, 4, 5).to(memory_format=torch.channels_last),
        random(2, 3, 4, 5),
    ),
    "sliced": lambda: (random(40, 12)[:, 2:9], random(40, 7)),
    "every second": lambda: (random(600)[::2], random(600)[::2]),
    "expanded": lambda: (random(40, 7), random(40, 1).expand(40, 7)),
    "one number expanded": lambda: (random(40, 7), random(1, 1).expand(40, 7)),
    "size 1": lambda: (random(7, 3)[:, :1], random(7, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", STRIDED)
def test_strides(name: str, dtype: torch.dtype) -> None:
    left, right = STRIDED[name]()
    a: List = [random(5), left, None]
    b: List = [random(5), right.to(dtype), random(4, 4).t()]
    check_sums(a, b)
    check_sums(b, a)
    check_combination(a[:2], b[:2], scale=0.5)
    a[2] = random(8, 4)[::2].t()
    check_combination(a, [*b[:2], None])


@pytest.mark.parametrize("name", ["sliced", "every second"])
def test_nothing_is_written_between_the_elements(name: str) -> None:
    left, right = STRIDED[name]()
    base = left._base
    assert base is not None
    expected = base.clone()
    view = expected.as_strided(left.shape, left.stride(), left.storage_offset())
    view.copy_(2 * left)
    gated_combine_([left], [right], fused([left], [right]), weight=0.0, scale=2.0, impl="triton")
    assert torch.equal(base, expected)


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
@pytest.mark.parametrize(
    "scale",
    [None, 3, 2.0**-16, -0.5, torch.tensor(0.25), torch.tensor(0.25).half(), torch.tensor([2.0])],
    ids=str,
)
def test_scale_and_norm(scale: float | Tensor | None, max_norm: float | None) -> None:
    a: List = [random(300), random(20, dtype=torch.bfloat16), random(3)]
    b: List = [random(300), random(20), None]
    if isinstance(scale, Tensor):
        scale = scale.to(DEVICE)
    for clip_groups in (False, True) if max_norm else (False,):
        check_combination(
            a, b, scale=scale, max_norm=max_norm, clip_groups=clip_groups, groups=[0, 2, 2]
        )


def test_scaled_float16_gradients_do_not_overflow_on_the_way() -> None:
    x = torch.full((300,), 6e4, dtype=torch.float16, device=DEVICE)
    for max_norm in (None, 1.0):
        check_combination([x], [-x], scale=2.0**-16, max_norm=max_norm, weight=1.0)


@pytest.mark.parametrize("scale", [NAN, torch.tensor(NAN)], ids=str)
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_scale_of_nan_writes_nothing(max_norm: float | None, scale: float | Tensor) -> None:
    a = [random(70)]
    before = copies(a)
    options = {"scale": scale, "max_norm": max_norm, "max_angle": 180, "impl": "triton"}
    used = gated_combine_(a, a, fused(a, a), weight=0.5, **options)
    assert used.tolist() == [0.5] and torch.equal(a[0], before[0])


def test_too_large_a_scale_makes_infinities() -> None:
    x = torch.ones(70, device=DEVICE)
    gated_combine_([x], [x.clone()], fused([x], [x]), weight=0.5, scale=1e300, impl="triton")
    assert x.isinf().all()
    # Squares beyond float32 are not finite either.
    assert fused([2e19 * torch.ones_like(x)], [2e19 * torch.ones_like(x)]).isinf().all()


def test_weight_0_and_1_are_exact() -> None:
    for dtype in DTYPES:
        x, y = random(300, dtype=dtype), random(300, dtype=dtype)
        for weight, wanted in ((0.0, x), (1.0, y)):
            a = [x.clone()]
            gated_combine_(a, [y], fused([x], [y]), weight=weight, max_angle=180, impl="triton")
            assert torch.equal(a[0], wanted)


def test_decisions_are_those_of_the_angle() -> None:
    """Exact to the last bit: 90 degrees, just below and just above."""
    tiny = 2.0 ** torch.arange(-60.0, -45.0, 0.5, dtype=torch.float64)
    cosine = torch.cat([torch.linspace(-1, 1, 101, dtype=torch.float64), tiny, -tiny])
    stats = torch.stack([cosine, torch.ones_like(cosine), torch.ones_like(cosine)], dim=1).float()
    odd = [[0, 0, 0], [0, 1, 0], [1.1, 1, 1], [-1.1, 1, 1], [-3e38, 3e38, 3e38], [-1e-45, 1e-45, 1]]
    bad = [[NAN, 1, 1], [0, INF, 0], [0, 1, NAN], [-INF, INF, INF]]
    stats = torch.cat([stats, torch.tensor(odd + bad)]).to(DEVICE)
    options = {"weight": 1.0, "groups": [len(stats) - 1], "impl": "triton"}
    for max_angle in (0, 1e-6, 30, 60.0, 89.999, 90, 90.0001, 120, 179.99999, 180):
        used = gated_combine_(*lists(3), stats, max_angle=max_angle, **options)
        angle = gradients._angle(stats)
        wanted = (angle <= max_angle).float().masked_fill(angle.isnan(), NAN)
        torch.testing.assert_close(used, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_is_reported(bad: float, dtype: torch.dtype) -> None:
    a, b = lists(600, 600, dtypes=[dtype])
    for (_, tensor), position in ((a, 0), (a, 599), (b, 300)):
        kept = tensor[position].clone()
        tensor[position] = bad
        stats = fused(a, b, [0, 1])
        assert stats[0].isfinite().all() and not stats[1].isfinite().all()
        for clip in ({}, {"max_norm": 1.0, "clip_groups": True}):
            check_combination(a, b, stats, groups=[0, 1], **clip)
        # Without a common norm no gradient is written.
        found = copies(a)
        options = {"scale": 2.0, "max_norm": 1.0, "groups": [0, 1], "impl": "triton"}
        used = gated_combine_(found, b, stats, weight=0.5, **options)
        assert used.isnan().tolist() == [False, True]
        assert all(map(torch.equal, map(torch.nan_to_num, found), map(torch.nan_to_num, a)))
        tensor[position] = kept


def test_nothing_at_all() -> None:
    assert fused([None, None], [None, None], [0, 2]).tolist() == [[0, 0, 0]] * 3
    empty: List = [random(0), random(0, 4)]
    assert fused(empty, copies(empty)).tolist() == [[0, 0, 0]]
    for none in ([None, None], empty):
        stats = torch.zeros(1, 3, device=DEVICE)
        assert gated_combine_(none, none, stats, weight=0.5, impl="triton").tolist() == [0.5]


def test_bits_do_not_depend_on_what_was_computed_before() -> None:
    a, b = mixed_lists()
    groups = [index % 3 for index in range(len(a))]
    present = [None if x is None else y for x, y in zip(a, b, strict=True)]
    results = []
    for _ in range(2):
        stats, combined = fused(a, b, groups), copies(a)
        gated_combine_(combined, present, stats, weight=0.3, groups=groups, impl="triton")
        results.append([stats, *combined])
        for other in range(20):
            fused([random(10 + other)], [random(10 + other)])
        chunk_tables.layouts.clear()
    assert all(x is None or torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_addresses_may_change_and_shapes_stay() -> None:
    kept = []
    for _ in range(chunk_tables.MAX_ADDRESSES + 2):
        a, b = lists(300, 7)
        check_combination(a, b)
        # Kept alive, so that the next gradients have other addresses.
        kept.append((a, b))
    (layout,) = chunk_tables.layouts.values()
    assert len(layout.address_tables) == chunk_tables.MAX_ADDRESSES
    for a, b in kept:
        check_sums(a, b)


def test_tables_are_bounded_shared_and_without_gradients() -> None:
    for size in range(chunk_tables.MAX_LAYOUTS + 2):
        a = [random(size + 1)]
        gated_combine_(a, a, fused(a, a), weight=0.5, impl="triton")
    assert len(chunk_tables.layouts) == chunk_tables.MAX_LAYOUTS
    # Both calls of a step use the same tables.
    assert all(len(x.address_tables) == 1 for x in chunk_tables.layouts.values())
    held = [value for x in chunk_tables.layouts.values() for value in vars(x).values()]
    assert not any(value is a[0] for value in held)


def test_a_graph_keeps_its_own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table copied during a capture exists only after a replay: other calls must not use it."""
    monkeypatch.setattr(chunk_tables, "for_graphs", [])
    fused([random(3)], [random(3)])
    (layout,) = chunk_tables.layouts.values()
    spare = torch.empty(2, dtype=torch.int64)
    layout.spares.append(spare)
    table = layout.find_addresses((16, 32), capturing=True)
    assert table.tolist() == [16, 32]
    assert (16, 32) not in layout.address_tables
    assert layout.spares == [] and chunk_tables.for_graphs[0] is spare


def test_a_capture_uses_the_tables_of_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(chunk_tables, "for_graphs", [])
    device = torch.device("cuda", 0)
    found = chunk_tables.Lists((3,), (15,), (16, 32), [])
    with pytest.raises(RuntimeError, match="run the step once before the capture"):
        chunk_tables.find_tables(found, None, 1, device)
    made = chunk_tables.Layout(found, None, 1, torch.device("cpu"))
    table = made.find_addresses(found.addresses, capturing=False)
    another_stream = 5
    chunk_tables.layouts[another_stream, ((3,), (15,), None, 1, device)] = made
    assert chunk_tables.find_tables(found, None, 1, device) == (made, table)
    # The graph needs them, so they must be kept.
    assert chunk_tables.for_graphs == [(made, table)]


def test_the_same_sizes_in_other_groups_or_dtypes_are_not_confused() -> None:
    a, b = lists(30, 30)
    for groups in (None, [0, 1], [1, 0], [0, 0], [1, 1]):
        for dtype in DTYPES:
            check_sums(copies(a, dtype), b, groups)
            check_sums(b, copies(a, dtype), groups)


def test_autograd_learns_of_the_writing() -> None:
    x = random(5)
    weight = random(5).requires_grad_()
    product = weight * x
    gated_combine_([x], [random(5)], fused([x], [x]), weight=0.5, scale=0.5, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_gradients_may_require_gradients() -> None:
    a: List = [random(9, 40).requires_grad_().t(), random(8, 4)[::2].requires_grad_().t()]
    b: List = [random(40, 9).requires_grad_(), random(4, 4).requires_grad_()]
    assert not check_sums(a, b).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    x = random(3)
    for a, b in (([x, x.to(dtype)], [x, x]), ([x, None], [x, x.to(dtype)])):
        with pytest.raises(ValueError, match=f"impl='triton' cannot run: a gradient is {dtype}"):
            grad_dot_norm(a, b, impl="triton")
    assert gpu.obstacle([x, None], [x.half(), x.bfloat16()]) is None
