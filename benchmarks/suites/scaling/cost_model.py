"""What a contrastive loss over the samples of W ranks costs a rank, by an alpha-beta model.

A rank has N samples of width d, e bytes an element, and K label embeddings that all ranks share:
m = N + K own rows of M = W N + K. A phase takes

    messages * alpha + bytes / beta + compute        compute: products and exponentials

and a ring that overlaps takes the longer of the two sides instead of their sum. Collectives are
counted as rings: in an all-gather or a reduce-scatter of W parts a rank sends W - 1 messages of one
part, (W - 1) / W of the whole, and receives as much. (Libraries have trees for small messages,
whose alpha counts log W times: at thousands of ranks the model has too much latency for all.)

    ours         gather samples, labels, one sum a row; own rows x all rows; nothing is sent back
    gather_all   gather with gradient, all rows x all rows on every rank, reduce-scatter [M, d]
                 (open_clip's local_loss=False, gather_with_grad=True)
    gather_rows  the same with own rows x all rows (open_clip's local_loss=True,
                 sentence-transformers' gather_across_devices)
    ring         blocks of N rows travel from rank to rank, in the backward pass again and with
                 their gradients (Inf-CL)

With C the time of our gather and F that of one product of own rows and all rows, a ring of 16 bits
that overlaps takes max(C, F) + max(3 C, 3 F), ours C + 3 F, which is never more: a ring wins by its
memory. `weighted_ring` is the ring that could win by overlap as well.

Left out, in favour of the others: the traffic of their pair matrices through memory, everything
that is done once a row, and their rate, which is taken to be ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ....kernels.contrastive.sharded.agreement import DESCRIPTION_BYTES
from ....kernels.contrastive.sharded.batch import aligned
from ....kernels.contrastive.tiled.loss import TILE
from ...floors.rates import CHIPS

LABEL_BYTES = 8  # int64
SUM_BYTES = 4  # D, float32
COUNT_BYTES = 8  # a rank's number of samples, before its description
# Copies that live at the peak, from the programs' text and within a quarter of what the CPU showed.
# Eager PyTorch holds five float32 matrices of pairs in its backward pass: the similarities, the
# positives, two gradients and their sum.
PAIR_BYTES = 5 * 4
# Besides the samples as they were gathered, ours holds normalised rows in two orders, their sums
# over positives and one temporary, all float32.
OUR_ROW_COPIES = 4
# Of the own rows, the gradient and what it needs.
OWN_ROW_COPIES = 4
RING_ROW_COPIES = 7
MAX_RANKS = 4096


@dataclass(frozen=True)
class Problem:
    """One loss. Ours has square tiles of so many rows and, for all its buffers, bytes a pair."""

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
        """A rank's samples."""
        return self.num_samples * self.width * self.element_bytes

    @property
    def gathered_bytes(self) -> int:
        """The samples of all ranks."""
        return self.num_ranks * self.block_bytes


@dataclass(frozen=True)
class Phase:
    """The forward or the backward pass of a rank; it receives as many bytes as it sends."""

    messages: int
    sent_bytes: int
    flops: int
    exponentials: int


@dataclass(frozen=True)
class Cost:
    """Of one rank. memory_bytes: at the peak, beyond the inputs. can_overlap: a ring's steps."""

    phases: tuple[Phase, ...]
    memory_bytes: int
    can_overlap: bool = False

    @property
    def messages(self) -> int:
        return sum(phase.messages for phase in self.phases)

    @property
    def sent_bytes(self) -> int:
        return sum(phase.sent_bytes for phase in self.phases)

    @property
    def received_bytes(self) -> int:
        return self.sent_bytes

    @property
    def flops(self) -> int:
        return sum(phase.flops for phase in self.phases)

    @property
    def exponentials(self) -> int:
        return sum(phase.exponentials for phase in self.phases)


@dataclass(frozen=True)
class Link:
    """alpha in seconds a message and beta in bytes a second, of a rank, each way."""

    seconds_per_message: float
    bytes_per_second: float


@dataclass(frozen=True)
class Machine:
    """A rank's processor and its links: to ranks of its node, and beyond.

    overlaps_units: products and exponentials at the same time; overlaps_messages: messages and
    arithmetic, which only a ring can use.
    source: where the numbers are from.
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
        """The slowest that a ring of so many ranks uses."""
        return self.within if num_ranks <= self.ranks_per_node else self.between

    def compute_seconds(self, phase: Phase) -> float:
        products = phase.flops / self.flops_per_second
        exponentials = phase.exponentials / self.exponentials_per_second
        return max(products, exponentials) if self.overlaps_units else products + exponentials

    def seconds(self, cost: Cost, num_ranks: int) -> float:
        """Forward and backward pass."""
        link, total = self.link(num_ranks), 0.0
        for phase in cost.phases:
            compute = self.compute_seconds(phase)
            wire = phase.messages * link.seconds_per_message
            wire += phase.sent_bytes / link.bytes_per_second
            overlaps = cost.can_overlap and self.overlaps_messages
            total += max(compute, wire) if overlaps else compute + wire
        return total


def ours(problem: Problem) -> Cost:
    """`process_group` of our losses, by tiles; nothing is gathered from a single rank."""
    others, pairs = problem.num_ranks - 1, computed_pairs(problem)
    message = COUNT_BYTES + DESCRIPTION_BYTES
    message += aligned(LABEL_BYTES * problem.num_samples) + aligned(problem.block_bytes)
    message += SUM_BYTES * problem.num_own_rows
    products = 2 * problem.width * pairs
    all_pairs = problem.num_own_rows * problem.num_rows
    copies = OUR_ROW_COPIES * problem.num_rows
    copies += OWN_ROW_COPIES * problem.num_own_rows if others else 0
    tiles = problem.tile_bytes * min(problem.tile, problem.num_rows) ** 2
    gathered = problem.gathered_bytes if others else 0
    return Cost(
        (
            Phase(3 * others, others * message, products, pairs),
            Phase(0, 0, products + 2 * problem.width * all_pairs, pairs),
        ),
        gathered + 4 * copies * problem.width + tiles,
    )


def computed_pairs(problem: Problem) -> int:
    """Pairs whose similarity ours computes: a tile of two blocks of own rows serves both."""
    full, rest = divmod(problem.num_own_rows, problem.tile)
    squares = full * problem.tile**2 + rest**2
    saved = (problem.num_own_rows**2 - squares) // 2
    return problem.num_own_rows * problem.num_rows - saved


def gather_all(problem: Problem) -> Cost:
    return _gather(problem, problem.num_rows)


def gather_rows(problem: Problem) -> Cost:
    return _gather(problem, problem.num_own_rows)


def _gather(problem: Problem, num_anchors: int) -> Cost:
    others, pairs = problem.num_ranks - 1, num_anchors * problem.num_rows
    labels = LABEL_BYTES * problem.num_samples
    products = 2 * problem.width * pairs
    # The gathered rows, the same beside the label embeddings, and the gradients of both.
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
    """Gradients travel in float32: a block's is a sum over all ranks."""
    others, pairs = problem.num_ranks - 1, problem.num_own_rows * problem.num_rows
    returns = problem.num_ranks if others else 0
    labels = LABEL_BYTES * problem.num_samples
    gradient_bytes = 4 * problem.num_samples * problem.width
    products = 2 * problem.width * pairs
    # Blocks and their gradients, each with the next one; the own rows and what they need.
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


def weighted_ring(problem: Problem) -> Cost:
    """A ring with our row weights u: blocks twice around, no gradients. Nobody has written it."""
    others, pairs = problem.num_ranks - 1, problem.num_own_rows * problem.num_rows
    once_a_row = (LABEL_BYTES + SUM_BYTES) * problem.num_samples + SUM_BYTES * problem.num_labels
    products = 2 * problem.width * pairs
    return Cost(
        (
            Phase(3 * others, others * (problem.block_bytes + once_a_row), products, pairs),
            Phase(others, others * problem.block_bytes, 2 * products, pairs),
        ),
        ring(problem).memory_bytes - 2 * 4 * problem.num_samples * problem.width,
        can_overlap=True,
    )


METHODS: dict[str, Callable[[Problem], Cost]] = {
    "ours": ours,
    "gather_all": gather_all,
    "gather_rows": gather_rows,
    "ring": ring,
}


WORDS = {
    "ours": "fusedacl: gather, own rows x all",
    "gather_all": "gather with gradient, all x all",
    "gather_rows": "gather with gradient, own rows x all",
    "ring": "ring of blocks and their gradients",
}
ROW_WEIGHT_RING = "a ring with our row weights, which sends no gradients (modelled only)"


def _preset(chip: str, dtype: torch.dtype, **settings: object) -> Machine:
    rates = next(found for found in CHIPS if found.name == chip).rates()
    values: dict[str, object] = {
        "flops_per_second": rates.flops[dtype],
        "exponentials_per_second": rates.exponentials,
        "overlaps_units": True,
        "overlaps_messages": True,
    }
    return Machine(**(values | settings))  # type: ignore[arg-type]


def data_sheet_machines(dtype: torch.dtype) -> dict[str, Machine]:
    """GPUs and networks by their vendors' figures, which no program reaches; alpha is assumed."""
    ethernet = Link(30e-6, 25e9 / 8)
    return {
        "v100_ethernet": _preset(
            "V100 SXM2",
            dtype,
            name="V100, 25 Gbit/s Ethernet",
            memory_bytes=32e9,
            within=ethernet,
            between=ethernet,
            ranks_per_node=1,
            source="data sheets (125 TFLOP/s of 16 bits, 32 GB, 25 Gbit/s a GPU); 30 us a message "
            "is assumed",
        ),
        "a100_infiniband": _preset(
            "A100 SXM 80GB",
            dtype,
            name="A100, NVLink and HDR InfiniBand",
            memory_bytes=80e9,
            # 600 GB/s of NVLink are both directions together.
            within=Link(3e-6, 300e9),
            between=Link(5e-6, 200e9 / 8),
            ranks_per_node=8,
            source="data sheets (312 TFLOP/s of 16 bits, 80 GB, 300 GB/s each way in a node of 8, "
            "200 Gbit/s a GPU beyond); 3 us and 5 us a message are assumed",
        ),
    }


def sweep(problem: Problem, machine: Machine) -> list[dict[str, object]]:
    """All methods at 1, 2, 4 .. MAX_RANKS ranks."""
    rows = []
    num_ranks = 1
    while num_ranks <= MAX_RANKS:
        at = replace(problem, num_ranks=num_ranks)
        for name, method in METHODS.items():
            cost = method(at)
            rows.append(
                {
                    "method": name,
                    "ranks": num_ranks,
                    "ms": machine.seconds(cost, num_ranks) * 1e3,
                    "memory_bytes": cost.memory_bytes,
                    "sent_bytes": cost.sent_bytes,
                    "received_bytes": cost.received_bytes,
                    "messages": cost.messages,
                    "flops": cost.flops,
                }
            )
        num_ranks *= 2
    return rows


def ranks_beyond(method: str, problem: Problem, memory_bytes: float) -> int | None:
    """The fewest ranks at which a rank needs more memory; None: not up to MAX_RANKS."""
    return _first(
        lambda ranks: METHODS[method](replace(problem, num_ranks=ranks)).memory_bytes > memory_bytes
    )


def _first(found: Callable[[int], bool]) -> int | None:
    """The smallest number of ranks from 2 on, of something that stays true once it is."""
    if not found(MAX_RANKS):
        return None
    low, high = 1, MAX_RANKS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def times_relative_to_ours(
    method: Callable[[Problem], Cost], problem: Problem, machine: Machine
) -> dict[int, float]:
    """At 2, 4 .. MAX_RANKS ranks; below 1 the method is faster."""
    found = {}
    num_ranks = 2
    while num_ranks <= MAX_RANKS:
        at = replace(problem, num_ranks=num_ranks)
        found[num_ranks] = machine.seconds(method(at), num_ranks) / machine.seconds(
            ours(at), num_ranks
        )
        num_ranks *= 2
    return found
