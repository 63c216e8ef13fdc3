"""Cost of negatives from all ranks: measured on this machine's loopback, modelled up to 4096 ranks.

`acl_loss(..., process_group=...)` beside three other methods (see `cost_model` and `baselines`).
Real gloo ranks compare every loss and gradient with one process that has all samples, count the
bytes that each rank sends, and time it. The model must predict the counted bytes; its times are for
this CPU at rates that are measured in the same run.
"""

import os
import statistics
from dataclasses import dataclass, replace

import torch

from ...measuring.clock import quantiles
from ...measuring.environment import Result
from ...measuring.result_file import ResultFile
from ..suite import WrongResult
from .cost_model import METHODS, Link, Machine, Problem, modelled
from .loopback import run_ranks
from .ranks import measure

# Largest relative difference of counted and modelled bytes.
MAX_BYTES_ERROR = 0.05
# Name of the model at the rates of this CPU, whose ranks are also measured.
CPU_MODEL = "cpu_loopback"


@dataclass(frozen=True)
class RankOptions:
    """Real ranks to measure. timeout: seconds for each number of ranks."""

    world_sizes: tuple[int, ...]
    rounds: int
    threads: int
    timeout: float


def run(
    file: ResultFile,
    problem: Problem,
    options: RankOptions,
    budget_bytes: float,
    described: tuple[Machine, Problem] | None = None,
) -> None:
    """Measure and model everything; WrongResult if counted and modelled bytes differ.

    described: another machine that is modelled, and the problem in its data type.
    """
    torch.set_num_threads(options.threads)
    measured = [
        on_loopback(replace(problem, num_ranks=num_ranks), options)
        for num_ranks in options.world_sizes
    ]
    # The model needs a link, and the most ranks that have a core each.
    several = [found for found in measured if found["ranks"] > 1]
    fitting = [found for found in several if found["ranks"] <= (os.cpu_count() or 1)]
    chosen = (fitting or several[:1])[-1]
    machines = {CPU_MODEL: (cpu_machine(chosen["rates"], chosen["ranks"]), problem)}
    if described is not None:
        machines["options"] = described
    shape = {"samples": problem.num_samples, "labels": problem.num_labels, "width": problem.width}
    file.result |= {
        "problem": shape,
        "measured": measured,
        "models": [
            {"preset": name, **modelled(machine, at, budget_bytes)}
            for name, (machine, at) in machines.items()
        ],
    }


def on_loopback(problem: Problem, options: RankOptions) -> Result:
    """Rates, and bytes, memory and time of each method beside the model's."""
    ranks = run_ranks(
        measure, problem.num_ranks, problem.num_samples, problem.num_labels, problem.width,
        options.rounds, seconds=options.timeout, threads=options.threads,
    )  # fmt: skip
    rates = {
        name: statistics.median(rank["rates"][name] for rank in ranks) for name in ranks[0]["rates"]
    }
    machine = cpu_machine(rates, problem.num_ranks)
    methods = {}
    for name, method in METHODS.items():
        of_ranks = [rank["methods"][name] for rank in ranks]
        cost, on_wire = method(problem), of_ranks[0]["loopback_bytes"]
        # All ranks wait for the slowest one.
        rounds = zip(*(found["seconds"] for found in of_ranks), strict=True)
        times = quantiles([max(seconds) for seconds in rounds])
        largest: Result = {
            key: None if of_ranks[0][key] is None else max(found[key] for found in of_ranks)
            for key in ("messages", "sent_bytes", "received_bytes", "memory_bytes")
        }
        predicted = cost.total.sent_bytes
        check_bytes(name, problem.num_ranks, largest["sent_bytes"], predicted)
        model_ms = machine.seconds(cost, problem.num_ranks) * 1e3
        methods[name] = {
            "times": times,
            "model_ms": model_ms,
            "model_over_measured": model_ms / times["p50_ms"],
            **largest,
            "model_sent_bytes": predicted,
            "loopback_bytes": None if on_wire is None else on_wire / problem.num_ranks,
            "model_memory_bytes": cost.memory_bytes,
        }
    return {"ranks": problem.num_ranks, "rates": rates, "methods": methods}


def check_bytes(name: str, num_ranks: int, counted: int, modelled: int) -> None:
    """WrongResult if a rank sent other bytes than the model says, beyond MAX_BYTES_ERROR."""
    if abs(counted - modelled) > MAX_BYTES_ERROR * max(counted, modelled):
        raise WrongResult(
            f"{name}, {num_ranks} ranks: {counted} bytes were sent but the model predicts "
            f"{modelled}: one of them is wrong, nothing is written"
        )


def cpu_machine(rates: dict[str, float], num_ranks: int) -> Machine:
    """A rank of this machine at measured rates; a single rank has no link."""
    link = Link(rates.get("seconds_per_message", 0.0), rates.get("bytes_per_second", float("inf")))
    return Machine(
        name="this CPU, gloo on loopback",
        flops_per_second=rates["flops_per_second"],
        exponentials_per_second=rates["exponentials_per_second"],
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        within=link,
        between=link,
        ranks_per_node=1,
        overlaps_units=False,
        overlaps_messages=False,
        source=f"rates measured in this run with {num_ranks} ranks; more ranks as if each had a "
        "core and a link of its own",
    )
