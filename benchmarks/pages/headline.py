"""The short table in README.md: ours beside the others, from the result files."""

from collections.abc import Sequence
from pathlib import Path

from ...engine.runtime.files import write_whole
from ...engine.runtime.text import markdown_table
from ..measuring.environment import Result

BEGIN, END = "<!-- headline -->", "<!-- /headline -->"
OURS = "fusedacl"
# What people would use instead, in the order in which the first that was measured is taken.
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


def headline(directories: Sequence[Path], results: Sequence[dict[str, Result]]) -> str:
    """A row for the largest case of each kind on each machine; empty where none was measured."""
    rows = []
    for directory, found in zip(directories, results, strict=True):
        for name in ("loss", "angle"):
            cases = found.get(name, {}).get("cases", [])
            for kind in PEERS:
                of_kind = [case for case in cases if _kind(case) == kind]
                if of_kind:
                    rows += _rows(directory.name, kind, of_kind[-1])
    return markdown_table(HEADER, rows) if rows else ""


def _kind(case: Result) -> str:
    return case["case"].get("loss") or case["case"]["task"]


def _rows(machine: str, kind: str, case: Result) -> list[list[str]]:
    providers = case["providers"]
    peer = next((name for name in PEERS[kind] if name in providers), None)
    if peer is None or OURS not in providers:
        return []
    ours, theirs = providers[OURS], providers[peer]
    peaks = [entry["peak_bytes"] for entry in (ours, theirs)]
    memory = "-"
    if all(peaks):
        memory = f"{peaks[0] / 2**20:.1f} against {peaks[1] / 2**20:.1f} MiB"
    return [
        [
            f"{NAMES[kind]}, {case['words'].partition(' ')[2]}",
            peer,
            milliseconds(ours["p50_ms"]),
            milliseconds(theirs["p50_ms"]),
            f"{theirs['p50_ms'] / ours['p50_ms']:.2f} times",
            memory,
            _fastest(providers, peer),
            machine,
        ]
    ]


def _fastest(providers: Result, peer: str) -> str:
    """Who comes nearest to ours, or before it, with the same formula: no choice of peers."""
    ours = providers[OURS]
    others = {
        name: found
        for name, found in providers.items()
        if not name.startswith(OURS) and (name == peer or found["formula"] == ours["formula"])
    }
    name, found = min(others.items(), key=lambda other: other[1]["p50_ms"])
    return f"{name}: {found['p50_ms'] / ours['p50_ms']:.2f} times"


def write_headline(readme: Path, table: str) -> None:
    """Puts the table between the two markers.

    Raises:
        ValueError: the markers are not there, once each and in this order.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(
            f"{str(readme)!r} needs the markers {BEGIN} and {END}, once each: the table goes "
            "between them."
        )
    write_whole(readme, f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


def milliseconds(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
