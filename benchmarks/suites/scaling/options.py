"""The options of `scaling`, and the assumptions that they replace in a preset."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from ...measuring.environment import machine_name
from .cost_model import Link, Machine

CPU_PRESET = "cpu_loopback"
PRESETS = (CPU_PRESET, "v100_ethernet", "a100_infiniband")
DTYPES = {"float16": torch.float16, "float32": torch.float32}
QUICK = {"world_sizes": [1, 2], "num_samples": 64, "num_labels": 5, "width": 32, "rounds": 2}
FULL = {"world_sizes": [1, 2, 4], "num_samples": 512, "num_labels": 77, "width": 768, "rounds": 5}
# What an option replaces in a preset, and by how much its unit is multiplied.
ASSUMPTIONS = {
    "message_us": ("microseconds a message between nodes", 1e-6),
    "link_gb_s": ("GB/s a rank, each way, between nodes", 1e9),
    "node_message_us": ("microseconds a message inside a node", 1e-6),
    "node_link_gb_s": ("GB/s a rank, each way, inside a node", 1e9),
    "matrix_tflops": ("TFLOP/s of matrix products a rank", 1e12),
    "giga_exponentials": ("10^9 exponentials a second and rank", 1e9),
    "memory_gb": ("GB of memory a rank", 1e9),
}


def parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small sizes, few rounds, no files")
    add("--world_sizes", type=_world_sizes, help="real ranks on this machine (default: 1,2,4)")
    add("--num_samples", type=_positive, help="N, samples of a rank (default: 512)")
    add("--num_labels", type=_positive, help="K, label embeddings (default: 77)")
    add("--width", type=_positive, help="d (default: 768)")
    add("--rounds", type=_positive, help="how often everything is timed (default: 5)")
    add("--threads", type=_positive, default=1, help="CPU threads of a rank (default: 1)")
    add("--timeout", type=_above_zero, default=900.0, help="seconds for the ranks (default: 900)")
    add(
        "--preset",
        choices=PRESETS,
        action="append",
        help="what is modelled (may be repeated; default: all)",
    )
    add("--dtype", choices=DTYPES, default="float16", help="of the GPU presets (default: float16)")
    add(
        "--memory_budget_gb",
        type=_above_zero,
        default=8.0,
        help="what the loss may take of a rank's memory, for the crossovers (default: 8)",
    )
    add(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a ring on GPUs sends while it computes (default: yes)",
    )
    for name, (words, _) in ASSUMPTIONS.items():
        add(f"--{name}", type=_above_zero, help=f"{words} (default: the preset's)")
    add("--ranks_per_node", type=_positive, help="default: the preset's")
    add(
        "--output_dir",
        type=Path,
        default=Path(__file__).parents[2] / "results" / machine_name(),
        help="where the JSON file and the figure go (default: %(default)s)",
    )
    arguments = parser.parse_args()
    for name, default in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    arguments.preset = list(dict.fromkeys(arguments.preset or PRESETS))
    replaced = [name for name in (*ASSUMPTIONS, "ranks_per_node") if getattr(arguments, name)]
    if replaced and (len(arguments.preset) > 1 or arguments.preset == [CPU_PRESET]):
        parser.error(
            f"--{replaced[0]} replaces a data sheet's number in one preset: say which one "
            f"(--preset {PRESETS[1]})"
        )
    if max(arguments.world_sizes) == 1 and CPU_PRESET in arguments.preset:
        parser.error(
            f"--preset {CPU_PRESET} needs the link between ranks measured: --world_sizes 1,2"
        )
    return arguments


def _world_sizes(text: str) -> list[int]:
    sizes = [_positive(part) for part in text.split(",")]
    if sorted(set(sizes)) != sizes:
        raise argparse.ArgumentTypeError(f"{text!r}: say each number once, the smallest first")
    return sizes


def _positive(text: str) -> int:
    value = int(text) if text.strip().isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return value


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def with_assumptions(machine: Machine, arguments: argparse.Namespace) -> Machine:
    """The preset with the options' numbers in place of its own."""
    given = {
        name: getattr(arguments, name) * unit
        for name, (_, unit) in ASSUMPTIONS.items()
        if getattr(arguments, name) is not None
    }
    source = machine.source
    if given or arguments.ranks_per_node:
        source += "; replaced by options: " + ", ".join(
            name for name in (*ASSUMPTIONS, "ranks_per_node") if getattr(arguments, name)
        )
    return replace(
        machine,
        flops_per_second=given.get("matrix_tflops", machine.flops_per_second),
        exponentials_per_second=given.get("giga_exponentials", machine.exponentials_per_second),
        memory_bytes=given.get("memory_gb", machine.memory_bytes),
        within=Link(
            given.get("node_message_us", machine.within.seconds_per_message),
            given.get("node_link_gb_s", machine.within.bytes_per_second),
        ),
        between=Link(
            given.get("message_us", machine.between.seconds_per_message),
            given.get("link_gb_s", machine.between.bytes_per_second),
        ),
        ranks_per_node=arguments.ranks_per_node or machine.ranks_per_node,
        overlaps_messages=machine.overlaps_messages and arguments.overlap,
        source=source,
    )
