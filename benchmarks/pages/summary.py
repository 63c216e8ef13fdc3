"""Opening of the performance page: what was found, and the terms of the tables."""

from collections.abc import Iterable, Mapping

from ..measuring.clock import ratio
from ..measuring.environment import Result
from .headline import OURS, Comparison, comparisons, milliseconds

TERMS = (
    "Terms. A *provider* is one implementation of the same work; fusedacl is the first row of its "
    "table. Providers took turns in one process. Times are medians, with the 20th and the 80th "
    "percentile in brackets. *Time relative to the first*: above 1 is slower than the first row, "
    "below 1 is faster. The *floor* is the least time that the machine's measured rates allow. "
    "*Peak memory* is what a call needs beyond its inputs. M: rows of a batch; N: samples; K: "
    "label embeddings, one per class; d: width of the rows; E: exits in one call; P: elements of "
    "each list of gradients. *Gate*: the check of the angle between the gradients of cross-entropy "
    "and of the contrastive loss, and their combination."
)


def introduction(results: Mapping[str, dict[str, Result]]) -> list[str]:
    """Lines of the title, the findings on each machine, and the terms."""
    environments = [
        result["environment"] for found in results.values() for result in found.values()
    ]
    gpus = sorted({environment["gpu"] for environment in environments if "gpu" in environment})
    where = f"On GPUs: {', '.join(gpus)}." if gpus else "Nothing here was measured on a GPU."
    lines = [
        "# Performance",
        "",
        "Written by `python -m fusedacl.benchmarks.pages.performance` from the files in "
        f"`benchmarks/results/`. {where}",
    ]
    for machine, found in results.items():
        lines += ["", f"Found on `{machine}`:", ""]
        lines += [f"- {sentence}" for sentence in findings(found)]
    return [*lines, "", TERMS]


def findings(found: dict[str, Result]) -> list[str]:
    """One sentence per result; those that were not measured are left out."""
    sentences = [_compared(each) for each in comparisons(found)]
    for name, of_suite in (
        ("growth", _growth), ("step", _step), ("exits", _exits), ("scaling", _scaling)
    ):  # fmt: skip
        if name in found:
            sentences += of_suite(found[name])
    return sentences


def _compared(found: Comparison) -> str:
    words = f"{found.title[0].upper()}{found.title[1:]}: {milliseconds(found.ours['p50_ms'])}"
    if found.ours.get("over_floor"):
        words += f", {found.ours['over_floor']:.2f} times its floor"
    words += f"; {found.peer} takes {found.ratio:.2f} times as long"
    if found.fastest != found.peer:
        words += f", the fastest alternative with the same result ({found.fastest}) "
        words += f"{found.factor:.2f} times"
    if found.peaks:
        words += "; peak memory {:.1f} MiB against {:.1f} MiB for ".format(*found.peaks)
        words += found.peer
    return f"{words}."


def _growth(result: Result) -> list[str]:
    slopes = {(fit["axis"], fit["provider"]): fit for fit in result["growth"]}
    parts = [
        f"{provider}: time M^{fit['time']:.2f}, memory M^{fit['memory']:.2f}"
        for provider in (OURS, "dense")
        if (fit := slopes.get(("M", provider))) and None not in (fit["time"], fit["memory"])
    ]
    return [f"Growth of the loss with the number of rows: {'; '.join(parts)}."] if parts else []


def _step(result: Result) -> list[str]:
    return [
        f"Training step, {case['words']}, ratios of times or memory: "
        + "; ".join(f"{found['what']} {found['value']:.2f}" for found in case["bars"])
        + "."
        for case in result["cases"]
        if case["bars"]
    ]


def _exits(result: Result) -> list[str]:
    stages = result["second_stage"].values()
    together = _span(stage["total_faster_than_apart"] for stage in stages)
    cached = _span(stage["total_cached_faster"] for stage in stages)
    worst = _span(ratio(case["times"], "early_exit", "full") for case in result["early_exit"])
    return [
        f"Training several exits together is {together} times as fast as one after another; the "
        f"feature cache makes that {cached} times faster.",
        f"Early exit that no text leaves early: {worst} times the time of the full model.",
    ]


def _scaling(result: Result) -> list[str]:
    several = [found for found in result["measured"] if found["ranks"] > 1]
    ratios = _span(
        row["times"]["p50_ms"] / found["methods"]["ours"]["times"]["p50_ms"]
        for found in several
        for name, row in found["methods"].items()
        if name != "ours"
    )
    ranks = " and ".join(str(found["ranks"]) for found in several)
    return [
        f"Negatives of all ranks, {ranks} ranks on loopback: the other methods take "
        f"{ratios} times as long as fusedacl."
    ]


def _span(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):.2f} to {max(found):.2f}"
