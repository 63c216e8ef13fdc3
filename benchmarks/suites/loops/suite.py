"""Time of a step with the gate in loops of several processes, over the step with cross-entropy.

Two gloo ranks on this machine, MiniLM in float32 without dropout, DistributedDataParallel and FSDP2
(`fully_shard` of each layer). The loops take turns on all ranks, so that their ratio is of one run.
Before that, losses of DDP and FSDP2 must agree, and so must the angles of their gates.
"""

from typing import Any

from ....engine.data.quickstart import minilm_path
from ....engine.runtime.text import text_table
from ...measuring.clock import ratio
from ...measuring.result_file import ResultFile
from ...measuring.times_table import times_table
from ..scaling.loopback import run_ranks
from ..suite import WrongResult, bar, describe
from .ranks import Case, measure

NUM_RANKS = 2
WORDS = {
    "ddp_ce": "DistributedDataParallel, cross-entropy",
    "ddp_gate": "DistributedDataParallel, ACL with the gate",
    "fsdp2_ce": "FSDP2, cross-entropy",
    "fsdp2_gate": "FSDP2, ACL with the gate",
}
# Targets: words, two loops, and the largest ratio of the first one's time to the second one's.
BARS = (
    ("gate over CE, DistributedDataParallel", "ddp_gate", "ddp_ce", 1.75),
    ("gate over CE, FSDP2", "fsdp2_gate", "fsdp2_ce", 1.85),
)
SIZES: dict[str, dict[str, Any]] = {
    "full": {"batch": 16, "tokens": 64, "rounds": 6, "steps": 4},
    "quick": {"batch": 2, "tokens": 8, "rounds": 1, "steps": 1},
}
MAX_LOSS_ERROR, MAX_DEGREES = 1e-4, 0.5
SECONDS = 900.0


def run(file: ResultFile, *, preset: str, threads: int) -> None:
    """Measure the loops; WrongResult if DDP and FSDP2 do not train alike."""
    case = Case(model=minilm_path(), **SIZES[preset])
    ranks = run_ranks(measure, NUM_RANKS, case, seconds=SECONDS, threads=threads)
    check(ranks)
    times = ranks[0]["times"]
    file.result |= {
        "ranks": NUM_RANKS,
        "threads": threads,
        "shape": SIZES[preset],
        "times": times,
        "bars": [
            bar(what, ratio(times, slower, faster), most) for what, slower, faster, most in BARS
        ],
    }
    print(times_table(times, text_table, WORDS))
    print(*map(describe, file.result["bars"]), sep="\n")


def check(ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]["first"]
    for ddp, fsdp in (("ddp_ce", "fsdp2_ce"), ("ddp_gate", "fsdp2_gate")):
        for what, most in (("losses", MAX_LOSS_ERROR), ("angles", MAX_DEGREES)):
            pairs = zip(first[ddp][what], first[fsdp][what], strict=True)
            error = max((abs(left - right) for left, right in pairs), default=0.0)
            if not error <= most:
                raise WrongResult(f"{what} of {ddp} and {fsdp} differ by {error:.1e}: not timed")
    if any(rank["first"] != first for rank in ranks):
        raise WrongResult("the ranks decide differently: not timed")
