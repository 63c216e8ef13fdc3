"""The short table in README.md: ours beside the alternatives, from the result files."""

from collections.abc import Mapping
from pathlib import Path

from ...engine.runtime.files import write_whole
from ...engine.runtime.text import markdown_table
from ..measuring.environment import Result

BEGIN, END = "<!-- headline -->", "<!-- /headline -->"
OURS = "fusedacl"
# The usual alternatives; the first one that was measured is shown.
PEERS = {
    "supcon": ("pytorch-metric-learning", "dense", "SupContrast"),
    "acl": ("dense",),
    "dot_norm": ("concatenate + dot + norms",),
    "gate": ("concatenate + cosine + loop",),
}
HEADER = [
    "what", "instead", "time, ours", "time, theirs", "faster", "memory",
    "fastest of the others", "machine",
]  # fmt: skip
NAMES = {
    "supcon": "contrastive loss, forward + backward",
    "acl": "loss with label embeddings, forward + backward",
    "dot_norm": "angle of two gradients",
    "gate": "angle and gated combination",
}


def headline(results: Mapping[str, dict[str, Result]]) -> str:
    """A row for the largest case of each kind on each machine; empty if none was measured."""
    rows = []
    for machine, found in results.items():
        for kind, case in largest_cases(found).items():
            rows += _rows(machine, kind, case)
    return markdown_table(HEADER, rows) if rows else ""


def largest_cases(found: dict[str, Result]) -> dict[str, Result]:
    """Kind of PEERS -> its last and largest case, if ours and an alternative were measured."""
    largest = {}
    for name in ("loss", "angle"):
        for case in found.get(name, {}).get("cases", []):
            kind = case["case"].get("loss") or case["case"]["task"]
            if OURS in case["providers"] and kind in PEERS and usual_alternative(kind, case):
                largest[kind] = case
    return largest


def case_title(kind: str, case: Result) -> str:
    _, _, shape = case["words"].partition(" ")
    return f"{NAMES[kind]}{' ' if shape.startswith('of ') else ', '}{shape}"


def usual_alternative(kind: str, case: Result) -> str | None:
    return next((name for name in PEERS[kind] if name in case["providers"]), None)


def _rows(machine: str, kind: str, case: Result) -> list[list[str]]:
    providers = case["providers"]
    peer = usual_alternative(kind, case)
    assert peer is not None
    ours, theirs = providers[OURS], providers[peer]
    peaks = [entry["peak_bytes"] for entry in (ours, theirs)]
    memory = "-"
    if all(peaks):
        memory = f"{peaks[0] / 2**20:.1f} against {peaks[1] / 2**20:.1f} MiB"
    return [
        [
            case_title(kind, case),
            peer,
            milliseconds(ours["p50_ms"]),
            milliseconds(theirs["p50_ms"]),
            f"{theirs['p50_ms'] / ours['p50_ms']:.2f} times",
            memory,
            "{}: {:.2f} times".format(*fastest_alternative(providers, peer)),
            machine,
        ]
    ]


def fastest_alternative(providers: Result, peer: str) -> tuple[str, float]:
    """The fastest alternative with our formula, `peer` included, and its time relative to ours."""
    ours = providers[OURS]
    others = {
        name: found
        for name, found in providers.items()
        if not name.startswith(OURS) and (name == peer or found["formula"] == ours["formula"])
    }
    name, found = min(others.items(), key=lambda other: other[1]["p50_ms"])
    return name, found["p50_ms"] / ours["p50_ms"]


def write_headline(readme: Path, table: str) -> None:
    """Replace the text between the two markers by the table.

    Raises:
        ValueError: a marker is missing or repeated, or they are in the wrong order.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(
            f"{str(readme)!r} needs the markers {BEGIN} and {END}, once each: the table is "
            "written between them."
        )
    write_whole(readme, f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


def milliseconds(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
