"""What negatives of all ranks cost: measured on loopback, modelled from 1 to 4096 ranks.

    fusedacl bench scaling [--quick] [--world_sizes 1,2,4] [--preset NAME]

`acl_loss(..., process_group=...)` beside the three ways it is done elsewhere (see `cost_model` and
`global_baselines`). Real gloo ranks on this machine check every loss and gradient against one
process with all samples, then count what each rank sends, and time it. The model's bytes must be
the counted ones; its time for the CPU, from rates measured in the same run, is printed beside the
measured one. GPUs and networks are modelled from data sheets: nothing about them is measured.
"""

import argparse
import os
import statistics
from dataclasses import asdict, replace
from typing import Any

import torch

from ....engine.runtime.plots import require_matplotlib
from ....engine.runtime.text import text_table
from ....kernels.contrastive.tiled.loss import GPU_TILE, TILE
from ...measuring.clock import quantiles
from ...measuring.environment import Result
from ...measuring.result_file import write
from .cost_model import (
    MAX_RANKS,
    METHODS,
    ROW_WEIGHT_RING,
    WORDS,
    Link,
    Machine,
    Problem,
    data_sheet_machines,
    ranks_beyond,
    sweep,
    times_relative_to_ours,
    weighted_ring,
)
from .loopback import run_ranks
from .options import CPU_PRESET, DTYPES, parse, with_assumptions
from .ranks import measure

# Relative difference of counted and modelled bytes from which nothing is written.
MAX_BYTES_ERROR = 0.05


def main() -> None:
    arguments = parse(__doc__)
    torch.set_num_threads(arguments.threads)
    if not arguments.quick:
        require_matplotlib()
    result = scaling(arguments)
    if arguments.quick:
        return
    from ...pages.scaling_figure import draw

    result["figures"] = draw(result, arguments.output_dir)
    write(result, arguments.output_dir / "scaling.json")


def scaling(arguments: argparse.Namespace) -> Result:
    """Everything the file holds but its environment, printed on the way."""
    problem = Problem(
        1, arguments.num_samples, arguments.num_labels, arguments.width, element_bytes=4, tile=TILE
    )
    print(
        f"N = {problem.num_samples} samples a rank, K = {problem.num_labels}, d = {problem.width}, "
        "forward + backward"
    )
    measured = [
        on_loopback(replace(problem, num_ranks=num_ranks), arguments)
        for num_ranks in arguments.world_sizes
    ]
    machines = data_sheet_machines(DTYPES[arguments.dtype])
    models = []
    for preset in arguments.preset:
        if preset == CPU_PRESET:
            found = machine_for_sweep(measured)
            machine, at = cpu_machine(found["rates"], found["ranks"]), problem
        else:
            machine = with_assumptions(machines[preset], arguments)
            # The epilogue works in one tile, in place.
            size = DTYPES[arguments.dtype].itemsize
            at = replace(problem, element_bytes=size, tile=GPU_TILE, tile_bytes=size)
        models.append(model(preset, machine, at, arguments.memory_budget_gb))
    return {
        "machine": arguments.output_dir.name,
        "problem": {
            "samples": problem.num_samples,
            "labels": problem.num_labels,
            "width": problem.width,
        },
        "measured": measured,
        "models": models,
    }


def on_loopback(problem: Problem, arguments: argparse.Namespace) -> Result:
    """Rates, and each method's bytes, memory and time beside the model's, of so many ranks."""
    ranks = run_ranks(
        measure, problem.num_ranks, problem.num_samples, problem.num_labels, problem.width,
        arguments.rounds, seconds=arguments.timeout, threads=arguments.threads,
    )  # fmt: skip
    rates = {
        name: statistics.median(rank["rates"][name] for rank in ranks) for name in ranks[0]["rates"]
    }
    machine = cpu_machine(rates, problem.num_ranks)
    methods = {}
    for name, method in METHODS.items():
        of_ranks = [rank["methods"][name] for rank in ranks]
        cost = method(problem)
        # The slowest rank's, for all wait for it.
        rounds = zip(*(found["seconds"] for found in of_ranks), strict=True)
        times = quantiles([max(seconds) for seconds in rounds])
        sent = max(found["sent_bytes"] for found in of_ranks)
        refuse_bytes(name, problem.num_ranks, sent, cost.sent_bytes)
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


def refuse_bytes(name: str, num_ranks: int, counted: int, modelled: int) -> None:
    if abs(counted - modelled) > MAX_BYTES_ERROR * max(counted, modelled):
        raise SystemExit(
            f"{name}, {num_ranks} ranks: {counted} bytes were sent and the model has {modelled}: "
            "one of them is wrong, nothing is written"
        )


def print_measured(num_ranks: int, rates: dict[str, float], methods: Result) -> None:
    words = f"\n{num_ranks} rank{'s' if num_ranks > 1 else ''} on loopback (gloo, float32); rates "
    words += f"of each while all are busy: {rates['flops_per_second'] / 1e9:.1f} GFLOP/s, "
    words += f"{rates['exponentials_per_second'] / 1e9:.2f} Gexp/s"
    if num_ranks > 1:
        words += f", alpha {rates['seconds_per_message'] * 1e6:.0f} us, "
        words += f"beta {rates['bytes_per_second'] / 1e6:.0f} MB/s"
    print(words)
    header = ["", "ms", "model ms", "model/measured", "sent MB", "model MB", "loopback MB",
              "memory MB", "model MB"]  # fmt: skip
    rows = []
    for name, found in methods.items():
        rows.append(
            [
                WORDS[name],
                f"{found['times']['p50_ms']:.1f}",
                f"{found['model_ms']:.1f}",
                f"{found['model_over_measured']:.2f}",
                *(_megabytes(found[key]) for key in (
                    "sent_bytes", "model_sent_bytes", "loopback_bytes", "memory_bytes",
                    "model_memory_bytes",
                )),
            ]
        )  # fmt: skip
    print(text_table(header, rows))


def _megabytes(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e6:.3f}"


def machine_for_sweep(measured: list[Result]) -> Result:
    """What was measured with the most ranks that have a core each, but with two at least."""
    several = [found for found in measured if found["ranks"] > 1]
    fitting = [found for found in several if found["ranks"] <= (os.cpu_count() or 1)]
    return (fitting or several[:1])[-1]


def cpu_machine(rates: dict[str, float], num_ranks: int) -> Machine:
    """This machine's rank from its measured rates; a single rank has no link."""
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
        source=f"rates measured in this run, {num_ranks} ranks at work; more ranks as if they had "
        "cores and links of their own",
    )


def model(preset: str, machine: Machine, problem: Problem, budget_gb: float) -> Result:
    rows = sweep(problem, machine)
    budget = budget_gb * 1e9
    crossovers = {
        "budget_bytes": budget,
        "beyond_budget": {name: ranks_beyond(name, problem, budget) for name in METHODS},
        "beyond_memory": {
            name: ranks_beyond(name, problem, machine.memory_bytes) for name in METHODS
        },
        "relative_times": {
            name: times_relative_to_ours(method, problem, machine)
            for name, method in (METHODS | {"weighted_ring": weighted_ring}).items()
            if name != "ours"
        },
    }
    words = in_words(crossovers)
    at: dict[Any, Any] = {(row["method"], row["ranks"]): row for row in rows}
    print(f"\n{machine.name}, by the model ({machine.source}):")
    header = ["ranks"] + [f"{name} {unit}" for unit in ("ms", "MB") for name in METHODS]
    print(
        text_table(
            header,
            [
                [str(ranks)]
                + [f"{at[name, ranks]['ms']:.4g}" for name in METHODS]
                + [f"{at[name, ranks]['memory_bytes'] / 1e6:.4g}" for name in METHODS]
                for ranks in (1, 8, 64, 512, MAX_RANKS)
            ],
        )
    )
    for sentence in words:
        print(f"- {sentence}")
    return {
        "preset": preset,
        "assumptions": asdict(machine),
        "element_bytes": problem.element_bytes,
        "rows": rows,
        "crossovers": crossovers,
        "words": words,
    }


def in_words(crossovers: Result) -> list[str]:
    """Where which method is out of memory or faster, as sentences."""
    budget = f"{crossovers['budget_bytes'] / 1e9:g} GB"
    beyond, memory = crossovers["beyond_budget"], crossovers["beyond_memory"]
    if beyond["ours"]:
        winner = (
            f"A ring wins by memory from {beyond['ours']} ranks on: the gathered rows of ours need "
            f"more than {budget}, its blocks "
            + (f"only from {beyond['ring']} ranks on." if beyond["ring"] else "never.")
        )
    else:
        winner = f"The gathered rows of ours fit {budget} up to {MAX_RANKS} ranks."
    sentences = [
        winner,
        "Beyond the rank's whole memory: "
        + ", ".join(
            f"{name} " + (f"from {ranks} ranks on" if ranks else "never")
            for name, ranks in memory.items()
        )
        + ".",
    ]
    for name in ("ring", "gather_all", "gather_rows", "weighted_ring"):
        times = crossovers["relative_times"][name]
        faster = [str(ranks) for ranks, ratio in times.items() if ratio < 1]
        best, worst = min(times.values()), max(times.values())
        sentences.append(
            f"{WORDS.get(name, ROW_WEIGHT_RING)}: {best:.2f} to {worst:.2f} times our time, "
            + (f"faster at {', '.join(faster)} ranks." if faster else "nowhere faster.")
        )
    return sentences


if __name__ == "__main__":
    main()
