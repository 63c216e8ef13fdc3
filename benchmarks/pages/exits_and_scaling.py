"""Sections of the performance page for results with sections of their own (no "cases").

That is exits and scaling, and loss, angle and step as they were before results had a schema.
"""

from ...engine.runtime.text import markdown_table
from ..floors.matrix_products import EXPLAINED
from ..measuring.environment import Result
from ..suites.scaling.cost_model import WORDS
from ..suites.scaling.suite import MAX_BYTES_ERROR

HEADER = ["what", "median (20th to 80th percentile), ms", "time relative to the first"]


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


def exits_section(result: Result) -> list[str]:
    shape = result["shape"]
    return [
        "### Several exits",
        "",
        f"{shape['model']}; texts: {shape['texts']}; float32 unless bfloat16 is named. {EXPLAINED}",
        "",
        f"A step of the second stage, {shape['batch']} texts, on the frozen backbone. Each exit "
        "trained alone is a run of its own, with a pass through the backbone of its own; the "
        "feature cache was written before.",
        *(line for stage in result["second_stage"].values() for line in _second_stage(stage)),
        "",
        "Early exit with a threshold that no text reaches, so that all exits are computed in vain. "
        "The full model is the same backbone, called as a whole, with its last exit alone.",
        *(line for case in result["early_exit"] for line in _early_exit(case)),
        "",
        "ACL-CL, forward + backward, all exits in one call (the floor of both: one product for all "
        "pairs, one for the gradient):",
        *(line for case in result["losses"] for line in _exit_losses(case)),
    ]


def _second_stage(stage: Result) -> list[str]:
    options, times, num_exits = stage["options"], stage["times"], stage["exits"]
    objective = {"acl": "ACL-CL with the gate", "ce": "cross-entropy"}[options["objective"]]
    names = {
        "together": f"{num_exits} exits together",
        "apart": f"{num_exits} exits, one at a time",
        "cached": f"{num_exits} exits together, from the feature cache",
    }
    return [
        "",
        f"{options['exit_head']} exits, {objective}"
        f"{', bfloat16' if options.get('bf16') else ''}, {stage['mean_tokens']:.0f} tokens on "
        f"average. Over the same {times['together']['samples']} batches, together is "
        f"{stage['total_faster_than_apart']:.2f} times as fast as one at a time, and the cache "
        f"{stage['total_cached_faster']:.2f} times as fast as without (sums of their times):",
        "",
        _table(times, names),
    ]


def _early_exit(case: Result) -> list[str]:
    texts = (
        f"{case['batches']} texts one by one"
        if case["batch"] == 1
        else f"a batch of {case['batch']}"
    )
    names = {"full": "full model", "early_exit": "early exit that nothing leaves"}
    return ["", f"{case['exit_head']} exits, {texts}:", "", _table(case["times"], names)]


def _exit_losses(case: Result) -> list[str]:
    shape = case["shape"]
    names = {"fusedacl": "fusedacl, one call", "dense": "a dense loss an exit, eager PyTorch"}
    return [
        "",
        f"E = {shape['exits']}, N = {shape['samples']}, K = {shape['labels']}, "
        f"d = {shape['width']}:",
        "",
        _table(case["times"], names),
    ]


def scaling_section(result: Result) -> list[str]:
    """The file's own words for the model; the measured points as tables."""
    shape, methods = result["problem"], WORDS
    lines = [
        "### Negatives of all ranks",
        "",
        f"`acl_loss(..., process_group=...)`, forward + backward: N = {shape['samples']} samples a "
        f"rank, K = {shape['labels']}, d = {shape['width']}. Ranks on this machine's loopback "
        "(gloo, float32), each beside the others on the same cores. Sent: counted at the calls of "
        "torch.distributed, a collective as a ring; the model's bytes are those within "
        f"{MAX_BYTES_ERROR:.0%}, or there is no file. Loopback: what the network interface "
        "counted, headers and others' traffic included. The model's time is from rates measured "
        "in the same run; it leaves out what is done once a row and the traffic of pair matrices.",
        "",
        "A ring holds blocks only, so it wins where the gathered rows have no room. Overlap alone "
        "does not make it faster: in 16 bits it sends four times our bytes (blocks twice, their "
        "gradients in float32) and has 4 products of own rows and all rows where we have 3. With "
        "C our time on the wire and F that of one product, max(C, F) + max(3 C, 3 F) is never "
        "below C + 3 F.",
    ]
    header = ["", "median (20th to 80th percentile), ms", "model's time / measured", "sent MB",
              "loopback MB", "peak memory MB (model)"]  # fmt: skip
    for found in result["measured"]:
        ranks = found["ranks"]
        rows = [[methods[name], *_scaling_cells(row)] for name, row in found["methods"].items()]
        lines += ["", f"{ranks} rank{'s' if ranks > 1 else ''}:", ""]
        lines.append(markdown_table(header, rows))
    if "figures" in result:
        figure = f"../benchmarks/results/{result['machine']}/{result['figures'][0]}"
        lines += ["", f"![Time, memory and bytes against the number of ranks]({figure})"]
    for model in result["models"]:
        name, source = model["assumptions"]["name"], model["assumptions"]["source"]
        lines += ["", f"By the model, not measured, {name} ({source}):", ""]
        lines += [f"- {sentence}" for sentence in model["words"]]
    return lines


def _scaling_cells(row: Result) -> list[str]:
    times = row["times"]

    def megabytes(value: float | None) -> str:
        return "-" if value is None else f"{value / 1e6:.2f}"

    return [
        f"{times['p50_ms']:.1f} ({times['p20_ms']:.1f} to {times['p80_ms']:.1f})",
        f"{row['model_over_measured']:.2f}",
        megabytes(row["sent_bytes"]),
        megabytes(row["loopback_bytes"]),
        f"{megabytes(row['memory_bytes'])} ({megabytes(row['model_memory_bytes'])})",
    ]


def _table(times: Result, names: dict[str, str]) -> str:
    """Above 1 the others take longer than the first name, below 1 they are faster."""
    ours = times[next(iter(names))]["p50_ms"]
    has_floor = any("over_floor" in times[key] for key in names)
    header = [*HEADER, "time over floor"] if has_floor else HEADER
    rows = [header, ["---"] * len(header)]
    for key, words in names.items():
        p20, p50, p80 = (times[key][f"p{percent}_ms"] for percent in (20, 50, 80))
        digits = 2 if p50 < 10 else 1
        spread = f"{p50:.{digits}f} ({p20:.{digits}f} to {p80:.{digits}f})"
        rows.append([words, spread, "-" if p50 == ours else f"{p50 / ours:.2f}"])
        if has_floor:
            rows[-1].append(f"{times[key]['over_floor']:.2f}")
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
