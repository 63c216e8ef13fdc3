"""Alpha-beta model of a contrastive loss over the samples of W ranks, per rank.

A rank has N samples of width d with e bytes per element, and K label embeddings that all ranks
share: m = N + K own rows of M = W N + K. A phase takes

    messages * alpha + bytes / beta + compute        compute: products and exponentials

and a ring that overlaps communication takes the longer of both sides instead of the sum.
Collectives are counted as rings: in an all-gather or a reduce-scatter of W parts, a rank sends
W - 1 messages of one part. (Libraries use trees for small messages, which take log W messages; the
model overestimates the latency of thousands of ranks for all methods.)

    ours         gathers samples, labels and one sum per row; own rows x all rows; sends no gradient
    gather_all   gathers with gradient; all rows x all rows on every rank; reduce-scatters [M, d]
                 (open_clip's local_loss=False, gather_with_grad=True)
    gather_rows  the same with own rows x all rows (open_clip's local_loss=True,
                 sentence-transformers' gather_across_devices)
    ring         blocks of N rows travel from rank to rank, and once more in the backward pass
                 together with their gradients (Inf-CL)

Let C be the time of our gather and F that of one product of own rows and all rows. A ring of 16-bit
rows that overlaps takes max(C, F) + max(3 C, 3 F); ours takes C + 3 F, which is never more. So a
ring wins by memory, not by time.

Left out, to the advantage of the other methods: memory traffic of their pair matrices, work that is
done once per row, and their lower rate of products.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace

from ....kernels.contrastive.sharded.agreement import DESCRIPTION_BYTES
from ....kernels.contrastive.sharded.batch import aligned
from ....kernels.contrastive.tiled.loss import TILE
from ...measuring.environment import Result

LABEL_BYTES = 8  # int64
SUM_BYTES = 4  # one float32 denominator per row
COUNT_BYTES = 8  # a rank's number of samples, sent before its description
# Copies that live at the peak; within a quarter of what was measured on the CPU.
# The backward pass of eager PyTorch holds five float32 matrices of pairs: similarities, positives,
# two gradients and their sum.
PAIR_BYTES = 5 * 4
# Ours holds float32 rows four times: normalised in two orders, sums over positives, a temporary.
OUR_ROW_COPIES = 4
# Own rows with their gradient and what it needs.
OWN_ROW_COPIES = 4
RING_ROW_COPIES = 7
MAX_RANKS = 4096


@dataclass(frozen=True)
class Problem:
    """Shapes of one loss. Ours works in square tiles of `tile` rows with `tile_bytes` per pair."""

    num_ranks: int
    num_samples: int
    num_labels: int
    width: int
    element_bytes: int
    tile: int = TILE
    tile_bytes: int = 8

    @property
    def num_own_rows(self) -> int:
        """m"""
        return self.num_samples + self.num_labels

    @property
    def num_rows(self) -> int:
        """M"""
        return self.num_ranks * self.num_samples + self.num_labels

    @property
    def block_bytes(self) -> int:
        """Size of one rank's samples."""
        return self.num_samples * self.width * self.element_bytes


@dataclass(frozen=True)
class Phase:
    """Forward or backward pass of one rank, which receives as many bytes as it sends."""

    messages: int
    sent_bytes: int
    flops: int
    exponentials: int


@dataclass(frozen=True)
class Cost:
    """Cost of one rank.

    memory_bytes: peak beyond the inputs. can_overlap: whether it can send while it computes.
    """

    phases: tuple[Phase, ...]
    memory_bytes: int
    can_overlap: bool = False

    @property
    def total(self) -> Phase:
        """Both passes together."""
        return Phase(*map(sum, zip(*map(astuple, self.phases), strict=True)))


@dataclass(frozen=True)
class Link:
    """alpha (seconds per message) and beta (bytes per second) of a rank, in each direction."""

    seconds_per_message: float
    bytes_per_second: float


@dataclass(frozen=True)
class Machine:
    """A rank's processor, and its links within a node and between nodes.

    overlaps_units: whether products and exponentials run at the same time.
    overlaps_messages: whether a ring sends while it computes.
    source: origin of the numbers.
    """

    name: str
    flops_per_second: float
    exponentials_per_second: float
    memory_bytes: float
    within: Link
    between: Link
    ranks_per_node: int
    overlaps_units: bool
    overlaps_messages: bool
    source: str

    def link(self, num_ranks: int) -> Link:
        """The slowest link in a ring of so many ranks."""
        return self.within if num_ranks <= self.ranks_per_node else self.between

    def seconds(self, cost: Cost, num_ranks: int) -> float:
        """Forward and backward pass together."""
        link, total = self.link(num_ranks), 0.0
        for phase in cost.phases:
            units = (
                phase.flops / self.flops_per_second,
                phase.exponentials / self.exponentials_per_second,
            )
            compute = max(units) if self.overlaps_units else sum(units)
            wire = phase.messages * link.seconds_per_message
            wire += phase.sent_bytes / link.bytes_per_second
            overlaps = cost.can_overlap and self.overlaps_messages
            total += max(compute, wire) if overlaps else compute + wire
        return total


def ours(problem: Problem) -> Cost:
    """`process_group` of our losses, computed in tiles. A single rank gathers nothing."""
    others, pairs = problem.num_ranks - 1, computed_pairs(problem)
    message = COUNT_BYTES + DESCRIPTION_BYTES
    message += aligned(LABEL_BYTES * problem.num_samples) + aligned(problem.block_bytes)
    message += SUM_BYTES * problem.num_own_rows
    products = 2 * problem.width * pairs
    all_pairs = problem.num_own_rows * problem.num_rows
    copies = OUR_ROW_COPIES * problem.num_rows
    copies += OWN_ROW_COPIES * problem.num_own_rows if others else 0
    tiles = problem.tile_bytes * min(problem.tile, problem.num_rows) ** 2
    gathered = problem.num_ranks * problem.block_bytes if others else 0
    return Cost(
        (
            Phase(3 * others, others * message, products, pairs),
            Phase(0, 0, products + 2 * problem.width * all_pairs, pairs),
        ),
        gathered + 4 * copies * problem.width + tiles,
    )


def computed_pairs(problem: Problem) -> int:
    """Pairs whose similarity ours computes: a tile between own rows serves both of its sides."""
    full, rest = divmod(problem.num_own_rows, problem.tile)
    squares = full * problem.tile**2 + rest**2
    saved = (problem.num_own_rows**2 - squares) // 2
    return problem.num_own_rows * problem.num_rows - saved


def gather(problem: Problem, num_anchors: int) -> Cost:
    """A gather with gradient, and `num_anchors` rows x all rows."""
    others, pairs = problem.num_ranks - 1, num_anchors * problem.num_rows
    labels = LABEL_BYTES * problem.num_samples
    products = 2 * problem.width * pairs
    # The gathered rows, their concatenation with the label embeddings, and the gradients of both.
    rows = 4 * problem.num_rows * problem.width * problem.element_bytes
    rows += OWN_ROW_COPIES * 4 * problem.num_own_rows * problem.width
    return Cost(
        (
            Phase(2 * others, others * (problem.block_bytes + labels), products, pairs),
            Phase(others, others * problem.block_bytes, 2 * products, pairs),
        ),
        rows + PAIR_BYTES * pairs,
    )


def ring(problem: Problem) -> Cost:
    """Gradients travel in float32, because a block's gradient is a sum over all ranks."""
    others, pairs = problem.num_ranks - 1, problem.num_own_rows * problem.num_rows
    returns = problem.num_ranks if others else 0
    labels = LABEL_BYTES * problem.num_samples
    gradient_bytes = 4 * problem.num_samples * problem.width
    products = 2 * problem.width * pairs
    # Two blocks and two gradients of blocks: one is in use while the next one arrives.
    blocks = 2 * problem.block_bytes + 2 * gradient_bytes if others else 0
    blocks += RING_ROW_COPIES * 4 * problem.num_own_rows * problem.width
    columns = max(problem.num_samples, problem.num_labels)
    return Cost(
        (
            Phase(2 * others, others * (problem.block_bytes + labels), products, pairs),
            Phase(
                others + returns,
                others * problem.block_bytes + returns * gradient_bytes,
                3 * products,
                pairs,
            ),
        ),
        blocks + PAIR_BYTES * problem.num_own_rows * columns,
        can_overlap=True,
    )


METHODS: dict[str, Callable[[Problem], Cost]] = {
    "ours": ours,
    "gather_all": lambda problem: gather(problem, problem.num_rows),
    "gather_rows": lambda problem: gather(problem, problem.num_own_rows),
    "ring": ring,
}
WORDS = {
    "ours": "fusedacl: gather, own rows x all",
    "gather_all": "gather with gradient, all x all",
    "gather_rows": "gather with gradient, own rows x all",
    "ring": "ring of blocks and their gradients",
}


def modelled(machine: Machine, problem: Problem, budget_bytes: float) -> Result:
    """Every method at 1, 2, 4, ..., MAX_RANKS ranks, and where the budget or the memory ends."""
    rows = [
        {
            "method": name,
            "ranks": num_ranks,
            "ms": machine.seconds(cost, num_ranks) * 1e3,
            "memory_bytes": cost.memory_bytes,
            "sent_bytes": cost.total.sent_bytes,
        }
        for num_ranks in (2**power for power in range(MAX_RANKS.bit_length()))
        for name, method in METHODS.items()
        for cost in [method(replace(problem, num_ranks=num_ranks))]
    ]
    crossovers = {
        key: {name: ranks_beyond(name, problem, limit) for name in METHODS}
        for key, limit in (
            ("beyond_budget", budget_bytes), ("beyond_memory", machine.memory_bytes)
        )
    }  # fmt: skip
    return {
        "assumptions": asdict(machine),
        "element_bytes": problem.element_bytes,
        "rows": rows,
        "crossovers": {"budget_bytes": budget_bytes, **crossovers},
    }


def ranks_beyond(method: str, problem: Problem, memory_bytes: float) -> int | None:
    """Smallest number of ranks above 1 at which a rank needs more memory, None up to MAX_RANKS."""

    def does_not_fit(ranks: int) -> bool:
        return METHODS[method](replace(problem, num_ranks=ranks)).memory_bytes > memory_bytes

    numbers = range(2, MAX_RANKS + 1)
    place = bisect_left(numbers, True, key=does_not_fit)
    return numbers[place] if place < len(numbers) else None


def relative_times(rows: Sequence[Result], method: str) -> dict[int, float]:
    """Ranks, from 2 on -> time of a method divided by ours."""
    times = {(row["method"], row["ranks"]): row["ms"] for row in rows}
    return {
        ranks: time / times["ours", ranks]
        for (name, ranks), time in times.items()
        if name == method and ranks > 1
    }


def in_words(model: Result) -> list[str]:
    """Sentences that say when memory runs out, and which method is faster at how many ranks."""
    found = model["crossovers"]
    sentences = []
    budget, memory = found["budget_bytes"], model["assumptions"]["memory_bytes"]
    for key, words in (
        ("beyond_budget", f"the budget of {budget / 1e9:g} GB per rank"),
        ("beyond_memory", f"the rank's memory of {memory / 1e9:.3g} GB"),
    ):
        limits = (
            f"{WORDS[name]}: {f'from {ranks:,} ranks on' if ranks else 'never'}"
            for name, ranks in found[key].items()
        )
        sentences.append(f"Exceeds {words}, up to {MAX_RANKS:,} ranks: {'; '.join(limits)}.")
    for name in (name for name in METHODS if name != "ours"):
        times = relative_times(model["rows"], name)
        faster = [f"{ranks:,}" for ranks, ratio in times.items() if ratio < 1]
        where = f"faster at {', '.join(faster)} ranks" if faster else "never faster"
        sentences.append(
            f"{WORDS[name]}: {min(times.values()):.2f} to {max(times.values()):,.2f} times the "
            f"time of fusedacl, {where}."
        )
    return sentences
