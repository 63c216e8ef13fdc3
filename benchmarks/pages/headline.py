"""The short table in README.md: ours beside the alternatives, from the result files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...engine.runtime.files import write_whole
from ...engine.runtime.text import markdown_table
from ..measuring.environment import Result

BEGIN, END = "<!-- headline -->", "<!-- /headline -->"
OURS = "fusedacl"
# Kind of case -> its words, and the usual alternatives; the first one that was measured is shown.
KINDS = {
    "supcon": (
        "contrastive loss, forward + backward",
        ("pytorch-metric-learning", "dense", "SupContrast"),
    ),
    "acl": ("loss with label embeddings, forward + backward", ("dense",)),
    "dot_norm": ("angle of two gradients", ("concatenate + dot + norms",)),
    "gate": ("angle and gated combination", ("concatenate + cosine + loop",)),
}
HEADER = [
    "what", "instead", "time, ours", "time, theirs", "faster", "memory",
    "beside the fastest of the others", "machine",
]  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Ours beside the usual alternative, and the fastest alternative with our formula.

    factor: time of the fastest alternative, which may be the usual one, relative to ours.
    """

    title: str
    ours: Result
    peer: str
    theirs: Result
    fastest: str
    factor: float

    @property
    def ratio(self) -> float:
        """Time of the usual alternative relative to ours."""
        return self.theirs["p50_ms"] / self.ours["p50_ms"]

    @property
    def peaks(self) -> list[float]:
        """Peak memory of ours and of the usual alternative in MiB; empty if one is unknown."""
        peaks = [entry["peak_bytes"] for entry in (self.ours, self.theirs)]
        return [peak / 2**20 for peak in peaks] if all(peaks) else []


def comparisons(found: Mapping[str, Result]) -> list[Comparison]:
    """The last and largest case of each kind in which ours and a usual alternative were timed."""
    largest = {}
    for case in (
        case for name in ("loss", "angle") for case in found.get(name, {}).get("cases", [])
    ):
        kind, providers = case["case"].get("loss") or case["case"]["task"], case["providers"]
        words, peers = KINDS.get(kind, ("", ()))
        peer = next((name for name in peers if name in providers), None)
        if OURS not in providers or peer is None:
            continue
        ours = providers[OURS]
        times = {
            name: entry["p50_ms"]
            for name, entry in providers.items()
            if not name.startswith(OURS) and (name == peer or entry["formula"] == ours["formula"])
        }
        fastest = min(times, key=times.__getitem__)
        _, _, shape = case["words"].partition(" ")
        title = f"{words}{' ' if shape.startswith('of ') else ', '}{shape}"
        factor = times[fastest] / ours["p50_ms"]
        largest[kind] = Comparison(title, ours, peer, providers[peer], fastest, factor)
    return list(largest.values())


def headline(results: Mapping[str, Mapping[str, Result]]) -> str:
    """A row for each comparison on the machine with most of them that was measured last, if any."""
    compared = {machine: found for machine, found in results.items() if comparisons(found)}
    if not compared:
        return ""

    def order(machine: str) -> tuple[int, str]:
        found = compared[machine]
        dates = [found[name]["environment"]["date"] for name in ("loss", "angle") if name in found]
        return len(comparisons(found)), max(dates)

    machine = max(compared, key=order)
    rows = [
        [
            each.title,
            each.peer,
            milliseconds(each.ours["p50_ms"]),
            milliseconds(each.theirs["p50_ms"]),
            f"{each.ratio:.2f} times",
            "{:.1f} against {:.1f} MiB".format(*each.peaks) if each.peaks else "-",
            f"{each.fastest}: {each.factor:.2f} times",
            machine,
        ]
        for each in comparisons(compared[machine])
    ]
    return markdown_table(HEADER, rows)


def write_headline(readme: Path, table: str) -> None:
    """Replace the text between the two markers; ValueError unless each is there once."""
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
