"""Section of the performance page for several exits."""

from ..floors.matrix_products import EXPLAINED
from ..measuring.environment import Result
from ..measuring.times_table import times_table


def exits_section(result: Result) -> list[str]:
    shape = result["shape"]
    return [
        "### Several exits",
        "",
        f"{shape['model']}; texts: {shape['texts']}; float32 unless bfloat16 is named. {EXPLAINED}",
        "",
        f"Training step of the second stage, {shape['batch']} texts, frozen backbone. An exit that "
        "is trained alone is a run of its own, with its own pass through the backbone; the feature "
        "cache was written before.",
        *(line for stage in result["second_stage"].values() for line in _second_stage(stage)),
        "",
        "Early exit with a threshold that no text reaches, which is its worst case: all exits are "
        "computed and none is used. The full model is the same backbone with its last exit only.",
        *(line for case in result["early_exit"] for line in _early_exit(case)),
    ]


def _second_stage(stage: Result) -> list[str]:
    options, times, num_exits = stage["options"], stage["times"], stage["exits"]
    objective = {"acl": "ACL-CL with the gate", "ce": "cross-entropy"}[options["objective"]]
    names = {
        "together": f"{num_exits} exits together",
        "apart": f"{num_exits} exits, one at a time",
        "cached": f"{num_exits} exits together, from the feature cache",
    }
    words = (
        f"{options['exit_head']} exits, {objective}"
        f"{', bfloat16' if options.get('bf16') else ''}, {stage['mean_tokens']:.0f} tokens on "
        f"average. Summed over the same {times['together']['samples']} batches, together is "
        f"{stage['total_faster_than_apart']:.2f} times as fast as one at a time, and the cache is "
        f"{stage['total_cached_faster']:.2f} times as fast as no cache:"
    )
    return ["", words, "", times_table(times, names=names)]


def _early_exit(case: Result) -> list[str]:
    one_by_one = f"{case['batches']} texts one by one"
    texts = one_by_one if case["batch"] == 1 else f"a batch of {case['batch']}"
    names = {"full": "full model", "early_exit": "early exit, no text leaves early"}
    names["onnx"] = "the same on onnxruntime"
    table = times_table(case["times"], names=names)
    return ["", f"{case['exit_head']} exits, {texts}:", "", table]
