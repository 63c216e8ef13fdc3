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

from ....engine.runtime.text import text_table
from ...measuring.clock import quantiles
from ...measuring.environment import Result, machine_name
from ...measuring.result_file import ResultFile
from ..suite import WrongResult
from .cost_model import MAX_RANKS, METHODS, WORDS, Link, Machine, Problem, in_words, modelled
from .loopback import run_ranks
from .ranks import measure

# Largest relative difference of counted and modelled bytes.
MAX_BYTES_ERROR = 0.05
# Name of the model at the rates of this CPU, whose ranks are also measured.
CPU_MODEL = "cpu_loopback"


@dataclass(frozen=True)
class RankOptions:
    """Real ranks to measure. timeout: seconds for all ranks of one number."""

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
    """Measure and model everything; progress is printed.

    described: another machine that is modelled, and the problem in its data type.

    Raises:
        WrongResult: counted and modelled bytes differ.
    """
    torch.set_num_threads(options.threads)
    print(
        f"N = {problem.num_samples} samples per rank, K = {problem.num_labels}, "
        f"d = {problem.width}, forward + backward"
    )
    measured = [
        on_loopback(replace(problem, num_ranks=num_ranks), options)
        for num_ranks in options.world_sizes
    ]
    chosen = measurement_for_model(measured)
    machines = {CPU_MODEL: (cpu_machine(chosen["rates"], chosen["ranks"]), problem)}
    if described is not None:
        machines["options"] = described
    models = []
    for name, (machine, at) in machines.items():
        model = {"preset": name, **modelled(machine, at, budget_bytes)}
        print_model(model)
        models.append(model)
    file.result |= {
        "machine": machine_name(),
        "problem": {
            "samples": problem.num_samples,
            "labels": problem.num_labels,
            "width": problem.width,
        },
        "measured": measured,
        "models": models,
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
        cost = method(problem)
        # All ranks wait for the slowest one.
        rounds = zip(*(found["seconds"] for found in of_ranks), strict=True)
        times = quantiles([max(seconds) for seconds in rounds])
        sent = max(found["sent_bytes"] for found in of_ranks)
        check_bytes(name, problem.num_ranks, sent, cost.sent_bytes)
        model_ms = machine.seconds(cost, problem.num_ranks) * 1e3
        on_wire = of_ranks[0]["loopback_bytes"]
        memory = [found["memory_bytes"] for found in of_ranks]
        methods[name] = {
            "times": times,
            "model_ms": model_ms,
            "model_over_measured": model_ms / times["p50_ms"],
            "messages": max(found["messages"] for found in of_ranks),
            "sent_bytes": sent,
            "received_bytes": max(found["received_bytes"] for found in of_ranks),
            "model_sent_bytes": cost.sent_bytes,
            "loopback_bytes": None if on_wire is None else on_wire / problem.num_ranks,
            "memory_bytes": None if None in memory else max(memory),
            "model_memory_bytes": cost.memory_bytes,
        }
    print_measured(problem.num_ranks, rates, methods)
    return {"ranks": problem.num_ranks, "rates": rates, "methods": methods}


def check_bytes(name: str, num_ranks: int, counted: int, modelled: int) -> None:
    """Compare the bytes that a rank sent with the model's.

    Raises:
        WrongResult: they differ by more than MAX_BYTES_ERROR.
    """
    if abs(counted - modelled) > MAX_BYTES_ERROR * max(counted, modelled):
        raise WrongResult(
            f"{name}, {num_ranks} ranks: {counted} bytes were sent but the model predicts "
            f"{modelled}: one of them is wrong, nothing is written"
        )


def print_measured(num_ranks: int, rates: dict[str, float], methods: Result) -> None:
    words = f"\n{num_ranks} rank{'s' if num_ranks > 1 else ''} on loopback (gloo, float32); rates "
    words += f"per rank while all are busy: {rates['flops_per_second'] / 1e9:.1f} GFLOP/s, "
    words += f"{rates['exponentials_per_second'] / 1e9:.2f} Gexp/s"
    if num_ranks > 1:
        words += f", alpha {rates['seconds_per_message'] * 1e6:.0f} us, "
        words += f"beta {rates['bytes_per_second'] / 1e6:.0f} MB/s"
    print(words)
    header = ["", "ms", "model ms", "model/measured", "sent MB", "model MB", "loopback MB",
              "memory MB", "model MB"]  # fmt: skip
    keys = ("sent_bytes", "model_sent_bytes", "loopback_bytes", "memory_bytes",
            "model_memory_bytes")  # fmt: skip
    rows = [
        [
            WORDS[name],
            f"{found['times']['p50_ms']:.1f}",
            f"{found['model_ms']:.1f}",
            f"{found['model_over_measured']:.2f}",
            *("-" if found[key] is None else f"{found[key] / 1e6:.3f}" for key in keys),
        ]
        for name, found in methods.items()
    ]
    print(text_table(header, rows))


def measurement_for_model(measured: list[Result]) -> Result:
    """The measurement with the most ranks that have a core each, with two ranks at least."""
    several = [found for found in measured if found["ranks"] > 1]
    fitting = [found for found in several if found["ranks"] <= (os.cpu_count() or 1)]
    return (fitting or several[:1])[-1]


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


def print_model(model: Result) -> None:
    machine = model["assumptions"]
    print(f"\n{machine['name']}, by the model ({machine['source']}):")
    at = {(row["method"], row["ranks"]): row for row in model["rows"]}
    units = (("ms", 1.0), ("memory_bytes", 1e6))
    header = ["ranks", *(f"{name} {unit}" for unit in ("ms", "MB") for name in METHODS)]
    rows = [
        [str(ranks)] + [f"{at[name, ranks][key] / by:.4g}" for key, by in units for name in METHODS]
        for ranks in (1, 8, 64, 512, MAX_RANKS)
    ]
    print(text_table(header, rows))
    for sentence in in_words(model):
        print(f"- {sentence}")
