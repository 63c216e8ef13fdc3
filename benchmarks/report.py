"""docs/performance.md from the result files.

python -m fusedacl.benchmarks.report benchmarks/results/* --output docs/performance.md
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .measure import Result

HEADER = ["what", "median (20th to 80th percentile), ms", "time relative to the first"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "directories", nargs="+", type=Path, help="benchmarks/results/<machine>, one or more"
    )
    parser.add_argument("--output", type=Path, required=True, help="the page to write")
    arguments = parser.parse_args()
    arguments.output.write_text(page(arguments.directories), encoding="utf-8")


def page(directories: Sequence[Path]) -> str:
    """The page of some machines; what was not measured on one is left out there."""
    parts = [
        "# Performance",
        "",
        "Made by `python -m fusedacl.benchmarks.report` from the files in `benchmarks/results/`; "
        "no number is typed by hand. In each table the contestants took turns in one process; "
        "claims are ratios of medians. What is faster than ours has a number below 1. "
        "Nothing here was measured on a GPU.",
    ]
    sections = {"loss": loss_section, "angle": angle_section, "step": step_section}
    for directory in directories:
        parts += ["", f"## Machine `{directory.name}`"]
        for name, section in sections.items():
            file = directory / f"{name}.json"
            if file.is_file():
                result = json.loads(file.read_text(encoding="utf-8"))
                parts += ["", *section(result), "", _provenance(result["environment"])]
    return "\n".join(parts) + "\n"


def loss_section(result: Result) -> list[str]:
    lines = ["### The contrastive loss, forward + backward, float32"]
    for large in result["large"]:
        shape = large["shape"]
        lines += [
            "",
            f"M = {shape['rows']} rows, d = {shape['width']}, {shape['classes']} classes:",
        ]
        names = {
            "fusedacl": "fusedacl",
            "dense": "dense formula, eager PyTorch",
            "metric_learning": "pytorch-metric-learning SupConLoss",
        }
        lines += ["", _table(large["times"], names)]
        lines += [
            "",
            f"The floor that this machine's rates of matrix product ({large['gemm_gflops']:.0f} "
            f"GFLOP/s) and exponential ({large['exp_giga_per_second']:.1f} G/s) set, measured in "
            f"the same rounds: {large['floor_ms']:.1f} ms; ours takes {large['over_floor']:.2f} "
            "times that.",
        ]
    small, memory = result["small"], result["memory"]
    shape = small["shape"]
    lines += [
        "",
        f"`acl_loss` of N = {shape['samples']}, K = {shape['labels']}, d = {shape['width']}:",
    ]
    lines += ["", _table(small["times"], {"fusedacl": "fusedacl", "dense": "dense, concatenated"})]
    lines += [
        "",
        f"Memory beyond the inputs at M = {memory['shape']['rows']}, "
        f"d = {memory['shape']['width']}: {memory['fusedacl_bytes'] / 2**20:.1f} MiB; "
        f"dense {memory['dense_bytes'] / 2**20:.0f} MiB, "
        f"{memory['dense_over_fusedacl']:.0f} times as much ({memory['method']}).",
    ]
    return lines


def angle_section(result: Result) -> list[str]:
    shape = result["shape"]
    check = {
        "grad_dot_norm": "`grad_dot_norm`",
        "one_dot": "one torch.dot of two flat tensors (reads as much)",
        "concatenate": "concatenate + dot + two norms",
    }
    combine = {"gated_combine_": "`gated_combine_`", "foreach_combine_": "torch._foreach"}
    return [
        "### The angle check, float32",
        "",
        f"Gradients of BERT-base: {shape['tensors']} tensors, {shape['elements']:,} elements.",
        "",
        _table(result["times"], check),
        "",
        "The gated combination with clipping:",
        "",
        _table(result["times"], combine),
    ]


def step_section(result: Result) -> list[str]:
    shape = result["shape"]
    names = {
        "fusedacl_ce": "fusedacl, CE",
        "hugging_face_ce": "Hugging Face Trainer, CE, the same model",
        "fusedacl_scl": "fusedacl, CE+SCL",
        "fusedacl_acl_ungated": "fusedacl, ACL-Embed without the gate",
        "fusedacl_acl": "fusedacl, ACL (two backward passes and the angle check)",
    }
    return [
        "### A training step, float32",
        "",
        f"{shape['model']}; {shape['batch']} texts of {shape['tokens']} tokens.",
        "",
        _table(result["times"], names),
    ]


def _table(times: Result, names: dict[str, str]) -> str:
    """The first name is ours; above 1 the others take longer than it, below 1 they are faster."""
    ours = times[next(iter(names))]["p50_ms"]
    rows = [HEADER, ["---"] * len(HEADER)]
    for key, words in names.items():
        p20, p50, p80 = (times[key][f"p{percent}_ms"] for percent in (20, 50, 80))
        digits = 2 if p50 < 10 else 1
        spread = f"{p50:.{digits}f} ({p20:.{digits}f} to {p80:.{digits}f})"
        rows.append([words, spread, "-" if p50 == ours else f"{p50 / ours:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _provenance(environment: Result) -> str:
    return (
        f"{environment['cpu']}, {environment['cores']} cores, {environment['threads']} threads; "
        f"torch {environment['torch']}, Python {environment['python']}, "
        f"pytorch-metric-learning {environment['pytorch_metric_learning']}; commit "
        f"{environment['commit']}, {environment['date']}; load average before: "
        f"{environment['load_average'][0]:.1f}."
    )


if __name__ == "__main__":
    main()
