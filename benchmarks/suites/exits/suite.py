"""Time of training several exits, and of early exit if no text leaves early (MiniLM, 6 layers).

- A training step of the second stage with five exits together, beside the same exits trained one at
  a time, and from the feature cache: our trainer in all cases, on the same batches, in turns.
- Early exit with a threshold that no text reaches, beside the backbone with only its last exit, and
  beside its export on onnxruntime where that is installed.

Losses, gradients and predictions are compared before anything is timed.
"""

import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor

from ....engine.config.commands import ExportConfig
from ....engine.config.fields import build
from ....engine.data.batching import collate
from ....engine.data.quickstart import minilm_path
from ....engine.inference.export.command import PAUSE_SECONDS, export_model
from ....engine.inference.export.onnx_early_exit import OnnxEarlyExit
from ....engine.model.early_exit import EarlyExit
from ....engine.model.exit_policies import parse_policy
from ....engine.model.multi_exit import MultiExitForSequenceClassification
from ....engine.runtime.text import text_table
from ...floors.matrix_products import PRODUCTS, add_floors, flops_of, product_turn
from ...measuring.clock import quantiles, seconds
from ...measuring.environment import Result
from ...measuring.result_file import ResultFile
from ...measuring.times_table import times_table
from ..suite import WrongResult, missing
from .second_stage import BATCH_SIZE, STAGES, WIDTH, Runs, compare, second_stage

QUICK_LAYERS = 3
# No entropy is below 0.
NEVER = "entropy:threshold=0"
# Texts per sample at batch size 1.
NUM_SINGLE = 16
# Relative to the largest value; early exit omits masks that have no effect.
MAX_ERROR = 1e-4


def run(file: ResultFile, *, quick: bool, data_dir: Path | None, threads: int = 2) -> None:
    """Measure everything into `file`; WrongResult if two ways of training or answering differ.

    data_dir: the directory with mrpc/; None uses the built-in texts.
    """
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    result = file.result
    with tempfile.TemporaryDirectory() as directory:
        data = {"task_name": "quickstart"}
        if data_dir is not None:
            data = {"task_name": "mrpc", "data_dir": str(data_dir)}
        num_batches, num_layers = (2, QUICK_LAYERS) if quick else (10, None)
        runs = Runs(Path(directory), str(minilm_path()), num_batches, data, num_layers)
        result["shape"] = {
            "model": f"MiniLM, {QUICK_LAYERS if quick else 6} x {WIDTH}",
            "texts": "embedded" if data_dir is None else "MRPC",
            "batch": BATCH_SIZE,
        }
        stages = ["mha_acl"] if quick else list(STAGES)
        result["second_stage"] = {name: second_stage(runs, name) for name in stages}
        if computes_bfloat16():
            result["second_stage"]["mha_acl_bf16"] = second_stage(runs, "mha_acl", bf16=True)
        result["early_exit"] = []
        for head in ("mha",) if quick else ("linear", "mha"):
            served = exported(runs, head)
            result["early_exit"] += [
                early_exit(runs, head, batch_size, 4 if quick else 20, served)
                for batch_size in (1, BATCH_SIZE)
            ]


def real_texts() -> Path | None:
    """The directory $FUSEDACL_DATA if it contains mrpc/, else None."""
    directory = os.environ.get("FUSEDACL_DATA")
    return Path(directory) if directory and (Path(directory) / "mrpc").is_dir() else None


def computes_bfloat16() -> bool:
    """Return whether the CPU has bfloat16 instructions; emulated products are not timed."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def exported(runs: Runs, head: str) -> OnnxEarlyExit | None:
    """The model with a threshold that no text reaches, on onnxruntime; None if that is missing."""
    obstacle = missing("onnxruntime", "onnxruntime") or missing("onnxscript", "onnxscript")
    if obstacle is not None:
        print(f"not timed on onnxruntime: {obstacle}")
        return None
    runs.first_stage(head)
    directory = runs.directory / f"onnx_{head}"
    options = {"model_name_or_path": str(runs.directory / f"model_{head}"), "disable_tqdm": True}
    export_model(build(ExportConfig, {**options, "policy": NEVER, "output_dir": str(directory)}))
    return OnnxEarlyExit(directory, num_threads=torch.get_num_threads())


def early_exit(
    runs: Runs, head: str, batch_size: int, rounds: int, served: OnnxEarlyExit | None = None
) -> Result:
    """Time early exit that no text leaves, and the full model; WrongResult if they differ.

    served: the same on onnxruntime, which takes turns with them by passes.
    """
    trainer = runs.first_stage(head)
    model = trainer.model.eval()
    last = model.exit_layers[-1]
    engine = EarlyExit(model, parse_policy(NEVER))
    num_texts = NUM_SINGLE if batch_size == 1 else batch_size
    padding = trainer.tokenizer.pad_token_id
    batches = [
        collate(trainer.train_split, rows.numpy(), padding)
        for rows in torch.arange(num_texts).split(batch_size)
    ]
    for batch in batches:
        del batch["labels"]
    for batch in batches:
        ours, plain = engine(**batch), full_model(model, batch)
        if not torch.equal(ours.predictions, plain.argmax(dim=-1)) or ours.mean_layer != last:
            raise WrongResult(f"{head}: early exit does not answer as the last exit: not timed")
        compare(f"{head}, early exit: probabilities", ours.probabilities, plain, MAX_ERROR)
        if served is not None:
            found = torch.from_numpy(served(**batch).probabilities)
            compare(f"{head}, onnxruntime: probabilities", found, plain, MAX_ERROR)
    calls: dict[str, Callable[[dict[str, Tensor]], object]] = {
        "full": lambda batch: full_model(model, batch),
        "early_exit": lambda batch: engine(**batch),
    }
    flops = {
        name: sum(flops_of(partial(call, batch)) for batch in batches)
        for name, call in calls.items()
    }
    apart: dict[str, Callable[[dict[str, Tensor]], object]] = {}
    if served is not None:
        apart["onnx"] = lambda batch: served(**batch)
        flops["onnx"] = flops["early_exit"]  # the same products, which PyTorch cannot count there
    times = interleave_passes(calls, apart, batches, {PRODUCTS: product_turn(WIDTH)}, rounds)
    rate = add_floors(times, flops, WIDTH)
    print(f"\n{head} exits, batch {batch_size}", times_table(times, text_table), sep="\n")
    return {
        "exit_head": head, "batch": batch_size, "batches": len(batches), **rate, "times": times,
    }  # fmt: skip


def interleave_passes(
    calls: Mapping[str, Callable[[dict[str, Tensor]], object]],
    apart: Mapping[str, Callable[[dict[str, Tensor]], object]],
    batches: Sequence[dict[str, Tensor]],
    beside: Mapping[str, Callable[[], object]],
    rounds: int,
) -> dict[str, Result]:
    """Times of passes over the batches, in turns of one batch; `beside` runs once per pass.

    Turns of whole passes would hide differences of a few percent: the machine's speed changes by
    more than that within a second. Only the calls of `apart`, which have threads of their own, take
    whole passes and come after a pause: the threads of PyTorch keep the cores busy after a call.
    """
    samples: dict[str, list[float]] = {name: [] for name in (*calls, *apart, *beside)}
    order = random.Random(0)
    for _ in range(rounds):
        spent = dict.fromkeys(calls, 0.0)
        for batch in batches:
            for name in order.sample(list(calls), len(calls)):
                spent[name] += seconds(partial(calls[name], batch))
        spent |= {name: seconds(call) for name, call in beside.items()}
        for name, call in apart.items():
            time.sleep(PAUSE_SECONDS)
            call(batches[0])
            spent[name] = sum(seconds(partial(call, batch)) for batch in batches)
        for name, value in spent.items():
            samples[name].append(value)
    return {name: quantiles(values) for name, values in samples.items()}


@torch.inference_mode()
def full_model(
    model: MultiExitForSequenceClassification, batch: dict[str, Tensor]
) -> Tensor:  # [N, K]
    """Probabilities of the last exit, from a plain forward pass without the other exits."""
    states = model.exit_states(**batch, positions=[-1])
    return model.classify(states, batch["attention_mask"], positions=[-1]).logits.softmax(dim=-1)
