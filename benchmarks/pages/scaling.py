"""Negatives of all ranks: the measured section, and the page of what is only modelled."""

from collections.abc import Mapping

from ...engine.runtime.text import markdown_table
from ..measuring.environment import Result
from ..measuring.times_table import times_table
from ..suites.scaling.cost_model import MAX_RANKS, WORDS, in_words
from ..suites.scaling.suite import MAX_BYTES_ERROR

MODEL_PAGE = "scaling_by_the_model.md"


def scaling_section(result: Result) -> list[str]:
    lines = [
        "### Negatives of all ranks",
        "",
        f"`acl_loss(..., process_group=...)`, forward + backward, {_shape(result)}. The ranks "
        "share this machine's cores and its loopback (gloo, float32). Sent: bytes per rank, "
        "counted at the calls of torch.distributed. Loopback: bytes per rank that the network "
        "interface counted, including headers and other programs' traffic. Up to "
        f"{MAX_RANKS:,} ranks are only modelled: [{MODEL_PAGE}]({MODEL_PAGE}).",
    ]
    for found in result["measured"]:
        rows = {
            name: row["times"] | row | {"peak_bytes": row["memory_bytes"]}
            for name, row in found["methods"].items()
        }
        ranks = f"{found['ranks']} rank{'s' if found['ranks'] > 1 else ''}"
        lines += ["", f"{ranks}:", "", times_table(rows, names=WORDS)]
    return lines


def model_page(results: Mapping[str, tuple[Result, str]]) -> str:
    """The page of the cost model. results: machine -> its scaling file and its figure's link."""
    lines = [
        "# Negatives of all ranks, by the model",
        "",
        "Written by `python -m fusedacl.benchmarks.pages.performance` from the files in "
        "`benchmarks/results/`. **Times and memory on this page are predictions of a model, not "
        "measurements**; the measured ranks are in [performance.md](performance.md).",
        "",
        "For the forward and the backward pass of one rank, the model adds up messages x alpha "
        "(seconds per message), bytes / beta (bytes per second), and matrix products and "
        "exponentials at their rates. alpha, beta and the rates were measured on the machine that "
        "is named; ranks beyond its cores are modelled as if each had a core and a link of its "
        "own. Collectives count as rings. Left out are the memory traffic of pair matrices and "
        "work that is done once per row. The formulas are in "
        "`benchmarks/suites/scaling/cost_model.py`; `fusedacl bench scaling --matrix_tflops ... "
        "--link_gb_s ...` models a machine of your own.",
        "",
        "A ring holds single blocks of rows, so it wins if the gathered rows do not fit into "
        "memory. It is not faster: in 16 bits it sends four times our bytes (blocks twice, their "
        "gradients in float32) and computes 4 products of own rows and all rows where we compute "
        "3. With C the time of our gather and F that of one product, a ring that sends while it "
        "computes takes max(C, F) + max(3 C, 3 F), which is never less than our C + 3 F.",
    ]
    for machine, (result, figure) in results.items():
        lines += ["", f"## Machine `{machine}`", "", *model_section(result)]
        lines += ["", f"![Time, memory and bytes against the number of ranks]({figure})"]
    return "\n".join(lines) + "\n"


def model_section(result: Result) -> list[str]:
    """The model beside the measured ranks, and up to MAX_RANKS ranks on each machine."""
    measured = [
        [
            str(found["ranks"]),
            WORDS[name],
            f"{row['model_over_measured']:.2f}",
            f"{row['model_memory_bytes'] / row['memory_bytes']:.2f}"
            if row["memory_bytes"]
            else "-",
        ]
        for found in result["measured"]
        for name, row in found["methods"].items()
    ]
    header = ["ranks", "method", "time, model / measured", "peak memory, model / measured"]
    lines = [
        "The model at the measured numbers of ranks. The bytes that a rank sends agree within "
        f"{MAX_BYTES_ERROR:.0%}, or there would be no file.",
        "",
        markdown_table(header, measured),
    ]
    header = ["ranks", *(f"{words}, {unit}" for unit in ("ms", "MB") for words in WORDS.values())]
    for model in result["models"]:
        machine, link = model["assumptions"], model["assumptions"]["between"]
        at = {(row["method"], row["ranks"]): row for row in model["rows"]}
        rows = [
            [f"{ranks:,}"]
            + [f"{at[name, ranks]['ms']:,.0f}" for name in WORDS]
            + [f"{at[name, ranks]['memory_bytes'] / 1e6:,.0f}" for name in WORDS]
            for ranks in (1, 8, 64, 512, MAX_RANKS)
        ]
        lines += [
            "",
            f"By the model, {_shape(result)}, {machine['name']} ({machine['source']}); "
            f"{machine['flops_per_second'] / 1e9:,.1f} GFLOP/s, "
            f"{machine['exponentials_per_second'] / 1e9:,.2f} Gexp/s, "
            f"alpha {link['seconds_per_message'] * 1e6:,.0f} us, "
            f"beta {link['bytes_per_second'] / 1e6:,.0f} MB/s:",
            "",
            markdown_table(header, rows),
            "",
            *(f"- {sentence}" for sentence in in_words(model)),
        ]
    return lines


def _shape(result: Result) -> str:
    words = "N = {samples} samples per rank, K = {labels}, d = {width}"
    return words.format(**result["problem"])
