"""Time of training several exits, and of early exit if no text leaves early (MiniLM, 6 layers).

- A training step of the second stage with five exits together, beside the same exits trained one at
  a time, and from the feature cache: our trainer in all cases, on the same batches, in turns.
- Early exit with a threshold that no text reaches, beside the backbone with only its last exit.
- ACL-CL of several exits in one call, beside a loop over dense losses.

Losses, gradients and predictions are compared before anything is timed.
"""

import os
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor

from ....engine.data.batching import EncodedSplit, collate
from ....engine.data.quickstart import minilm_path
from ....engine.model.early_exit import EarlyExit
from ....engine.model.multi_exit import MultiExitForSequenceClassification
from ....engine.runtime.text import text_table
from ....kernels import acl_cl_loss
from ...floors.matrix_products import PRODUCTS, add_floors, flops_of, product_turn
from ...measuring.clock import interleave_on, quantiles, ratio, seconds
from ...measuring.environment import CPU, Result
from ...measuring.result_file import ResultFile
from ...measuring.times_table import times_table
from ..baselines import dense_supcon
from ..suite import WrongResult
from .second_stage import BATCH_SIZE, STAGES, WIDTH, Runs, compare, second_stage

TEMPERATURE = 0.5
EXIT_WIDTH = 64
QUICK_LAYERS = 3
# Texts per sample at batch size 1.
NUM_SINGLE = 16
# Relative to the largest value; early exit omits masks that have no effect.
MAX_ERROR = 1e-4
MAX_LOSS_ERROR = 1e-5

# Arguments: [samples, label embeddings] of the students, the same of the teachers, and labels.
Loss = Callable[[list[Tensor], list[Tensor], Tensor], Tensor]


def run(file: ResultFile, *, quick: bool, data_dir: Path | None, threads: int = 2) -> None:
    """Measure everything into `file`; WrongResult if two ways of training or answering differ.

    data_dir: the directory with mrpc/; None uses embedded texts.
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
        result["early_exit"] = [
            early_exit(runs, head, batch_size, rounds=4 if quick else 20)
            for head in (("mha",) if quick else ("linear", "mha"))
            for batch_size in (1, BATCH_SIZE)
        ]
    result["losses"] = [
        contrastive_losses(num_exits, num_labels, rounds=10 if quick else 30)
        for num_exits in ((5,) if quick else (5, 11))
        for num_labels in (2, 77)
    ]


def real_texts() -> Path | None:
    """The directory $FUSEDACL_DATA if it contains mrpc/, else None."""
    directory = os.environ.get("FUSEDACL_DATA")
    return Path(directory) if directory and (Path(directory) / "mrpc").is_dir() else None


def computes_bfloat16() -> bool:
    """Return whether the CPU has bfloat16 instructions; emulated products are not timed."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def early_exit(runs: Runs, head: str, batch_size: int, rounds: int) -> Result:
    """Time early exit that no text leaves, and the full model; WrongResult if they differ."""
    trainer = runs.first_stage(head)
    model = trainer.model.eval()
    last = model.exit_layers[-1]
    # No entropy is below 0.
    engine = EarlyExit(model, "entropy", threshold=0.0)
    num_texts = NUM_SINGLE if batch_size == 1 else batch_size
    padding = trainer.tokenizer.pad_token_id
    batches = text_batches(trainer.train_split, num_texts, batch_size, padding)
    for batch in batches:
        ours, plain = engine(**batch), full_model(model, batch)
        if not torch.equal(ours.predictions, plain.argmax(dim=-1)) or ours.mean_layer != last:
            raise WrongResult(f"{head}: early exit does not answer as the last exit: not timed")
        compare(f"{head}, early exit: probabilities", ours.probabilities, plain, MAX_ERROR)
    calls: dict[str, Callable[[dict[str, Tensor]], object]] = {
        "full": lambda batch: full_model(model, batch),
        "early_exit": lambda batch: engine(**batch),
    }
    flops = {
        name: sum(flops_of(partial(call, batch)) for batch in batches)
        for name, call in calls.items()
    }
    times = interleave_passes(calls, batches, {PRODUCTS: product_turn(WIDTH)}, rounds)
    rate = add_floors(times, flops, WIDTH)
    print(f"\n{head} exits, batch {batch_size}", times_table(times, text_table), sep="\n")
    return {
        "exit_head": head, "batch": batch_size, "batches": len(batches), **rate, "times": times,
        "over_full": ratio(times, "early_exit", "full"),
    }  # fmt: skip


def interleave_passes(
    calls: Mapping[str, Callable[[dict[str, Tensor]], object]],
    batches: Sequence[dict[str, Tensor]],
    beside: Mapping[str, Callable[[], object]],
    rounds: int,
) -> dict[str, Result]:
    """Times of passes over the batches, in turns of one batch; `beside` runs once per pass.

    Turns of whole passes would hide differences of a few percent: the machine's speed changes by
    more than that within a second.
    """
    samples: dict[str, list[float]] = {name: [] for name in (*calls, *beside)}
    order = random.Random(0)
    for _ in range(rounds):
        spent = dict.fromkeys(calls, 0.0)
        for batch in batches:
            for name in order.sample(list(calls), len(calls)):
                spent[name] += seconds(partial(calls[name], batch))
        spent |= {name: seconds(call) for name, call in beside.items()}
        for name, value in spent.items():
            samples[name].append(value)
    return {name: quantiles(values) for name, values in samples.items()}


def text_batches(
    encoded: EncodedSplit, num_texts: int, batch_size: int, pad_token_id: int
) -> list[dict[str, Tensor]]:
    """The first texts as padded batches without labels."""
    batches = [
        collate(encoded, rows.numpy(), pad_token_id)
        for rows in torch.arange(num_texts).split(batch_size)
    ]
    return [{name: batch[name] for name in batch if name != "labels"} for batch in batches]


@torch.inference_mode()
def full_model(
    model: MultiExitForSequenceClassification, batch: dict[str, Tensor]
) -> Tensor:  # [N, K]
    """Probabilities of the last exit, from a plain forward pass without the other exits."""
    states = model.exit_states(**batch, positions=[-1])
    return model.classify(states, batch["attention_mask"], positions=[-1]).logits.softmax(dim=-1)


def contrastive_losses(num_exits: int, num_labels: int, rounds: int) -> Result:
    """Time ACL-CL of E exits, forward + backward; WrongResult if it differs from float64."""
    torch.manual_seed(0)
    students = [
        torch.randn(num_exits, rows, EXIT_WIDTH, requires_grad=True)
        for rows in (BATCH_SIZE, num_labels)
    ]
    teachers = [torch.randn(rows, EXIT_WIDTH) for rows in (BATCH_SIZE, num_labels)]
    labels = torch.randint(num_labels, (BATCH_SIZE,))
    exact = [tensor.detach().double().requires_grad_() for tensor in students]
    constants = [tensor.double() for tensor in teachers]
    reference = partial(batched, impl="reference")
    wanted = forward_backward(reference, exact, constants, labels)
    calls = {
        name: partial(forward_backward, loss, students, teachers, labels)
        for name, loss in (("fusedacl", batched), ("dense", dense_loop))
    }
    for name, call in calls.items():
        for what, found, value in zip(
            ("loss", "gradient", "label embeddings' gradient"), call(), wanted, strict=True
        ):
            compare(f"ACL-CL, {name}: {what}", found, value, MAX_LOSS_ERROR)
    # One product for the pairs of all rows, one for the gradient of the trained half. This is a
    # formula because PyTorch does not see the products of the C loop.
    num_flops = num_exits * 12 * (BATCH_SIZE + num_labels) ** 2 * EXIT_WIDTH
    flops = dict.fromkeys(calls, num_flops)
    beside: dict[str, Callable[[], object]] = {PRODUCTS: product_turn(EXIT_WIDTH)}
    times = interleave_on(CPU, calls | beside, rounds=rounds)
    rate = add_floors(times, flops, EXIT_WIDTH)
    shape = {"exits": num_exits, "samples": BATCH_SIZE, "labels": num_labels, "width": EXIT_WIDTH}
    print(f"\nACL-CL, {shape}", times_table(times, text_table), sep="\n")
    faster = ratio(times, "dense", "fusedacl")
    return {"shape": shape, **rate, "times": times, "faster_than_dense": faster}


def batched(
    students: list[Tensor], teachers: list[Tensor], labels: Tensor, impl: str = "auto"
) -> Tensor:
    embeddings, label_embeddings = students
    losses = acl_cl_loss(
        embeddings, labels, label_embeddings, *teachers, temperature=TEMPERATURE, impl=impl
    )
    return losses.sum()


def dense_loop(students: list[Tensor], teachers: list[Tensor], labels: Tensor) -> Tensor:
    """One dense loss per exit over the concatenated rows."""
    embeddings, label_embeddings = students
    classes = torch.arange(label_embeddings.shape[1])
    row_labels = torch.cat([labels, classes, labels, classes])
    total = torch.zeros(())
    for samples, rows in zip(embeddings, label_embeddings, strict=True):
        rows = torch.cat([samples, rows, *teachers])
        total = total + dense_supcon(rows, row_labels, TEMPERATURE, denominator="all")
    return total


def forward_backward(
    loss: Loss, students: list[Tensor], teachers: list[Tensor], labels: Tensor
) -> tuple[Tensor, ...]:
    """The loss, and its gradients by the students' rows."""
    value = loss(students, teachers, labels)
    return value.detach(), *torch.autograd.grad(value, students)
