"""Exponents of series whose exponents are known; every axis grows along its own size."""

from __future__ import annotations

from typing import Any

import pytest
from fusedacl.benchmarks.suites.growth import all_series, exponent, fit_table, fits
from fusedacl.engine.runtime.text import text_table


@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0])
def test_a_power_is_found(slope: float) -> None:
    assert exponent([(x, 3.0 * x**slope) for x in (1, 10, 100, 1000)]) == pytest.approx(slope)


def test_the_cost_of_a_call_does_not_hide_the_power() -> None:
    points = [(2.0**x, 1000.0 + 4.0**x) for x in range(14)]
    found = exponent(points)
    assert found is not None and found > 1.9
    # All points together would say less.
    whole = exponent(points[:7])
    assert whole is not None and whole < 1


@pytest.mark.parametrize(
    "points", [[], [(1, 1), (2, 4)], [(1, 1), (1, 2), (1, 3)], [(1, 0), (2, 0), (4, 1), (8, 2)]]
)
def test_too_little_for_a_slope(points: list[tuple[float, float]]) -> None:
    assert exponent(points) is None


def series_case(axis: str, size: int, **providers: tuple[float, int | None]) -> dict[str, Any]:
    names = ("p50_ms", "peak_bytes")
    found = {name: dict(zip(names, each, strict=True)) for name, each in providers.items()}
    return {"axis": axis, "size": size, "providers": found}


def test_the_table_has_exponents_and_the_largest_size() -> None:
    cases = [series_case("M", m, ours=(m**1.5, m), dense=(m**2.0, m * m)) for m in (4, 8, 16)]
    cases += [series_case("M", 32, ours=(32**1.5, 32))]
    cases += [series_case("E", e, ours=(e, None)) for e in (1, 2)]
    rows = [line.split() for line in fit_table(fits(cases), text_table).splitlines()[2:]]
    assert rows == [
        ["M", "ours", "1.50", "1.00", "32"],
        ["M", "dense", "2.00", "2.00", "16"],
        ["E", "ours", "-", "-", "2"],
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("preset", ["quick", "full"])
def test_series_differ_in_their_size_alone(device: str, preset: str) -> None:
    field = {"M": "samples", "d": "width", "K": "classes", "E": "exits", "P": "parameters"}
    found = all_series(device, preset, "float32", samples=32)
    assert [series.axis for series in found] == list(field)
    for series in found:
        for size, case in zip(series.sizes, series.cases, strict=True):
            assert getattr(case, field[series.axis]) == size
            rest = vars(case) | {field[series.axis]: None}
            assert rest == vars(series.cases[0]) | {field[series.axis]: None}


def test_the_sizes_that_are_promised() -> None:
    found = all_series("cpu", "full", "float32", 32)
    assert {series.axis: (series.sizes[0], series.sizes[-1]) for series in found} == {
        "M": (64, 16384), "d": (64, 1024), "K": (2, 10_000), "E": (1, 24), "P": (10**6, 10**9)
    }  # fmt: skip
    assert all_series("cuda", "full", "float16", 32)[0].sizes[-1] == 65536
