"""Results of benchmarks with invented times."""

from __future__ import annotations

from typing import Any


def times(p50: float, spread: float = 0.2, **more: Any) -> dict[str, Any]:
    """A median, and percentiles whose distance is `spread` of it."""
    low, high = p50 * (1 - spread / 2), p50 * (1 + spread / 2)
    return {"p20_ms": low, "p50_ms": p50, "p80_ms": high, "samples": 9, **more}


def rates(flops: float, exponentials: float | None, bytes_: float | None) -> dict[str, Any]:
    return {
        "gigaflops": {"float32": flops}, "giga_exponentials_per_second": exponentials,
        "gigabytes_per_second": bytes_, "overlaps_units": False,
    }  # fmt: skip


def case(words: str, providers: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"case": {}, "words": words, "left_out": {}, "providers": providers} | more


def result(*cases: dict[str, Any], load: float = 0.0, **more: Any) -> dict[str, Any]:
    environment = {
        "commit": "abc", "date": "today", "cpu": "x", "cores": 2, "threads": 2,
        "load_average": [load, 0.0, 0.0],
    }  # fmt: skip
    return {
        "schema": 1, "benchmark": "loss", "preset": "full", "environment": environment,
        "cases": list(cases),
    } | more  # fmt: skip
