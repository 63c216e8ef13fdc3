"""Time, memory and parts of a training step, float32 on the CPU.

Our trainer (cross-entropy, CE+SCL, ACL with each scope of the gate, under DeepSpeed with one
process) beside the Hugging Face Trainer and a hand-written loop, with the same model, weights,
batches and optimizer. All texts have the same number of tokens. A sample is the time from the end
of one step to the end of the next, including batching. Providers take turns of several steps whose
first ones are dropped. Before anything is timed, losses without dropout are compared: at all steps
between providers that train alike, else at the first step. The parts of our steps are profiled in
a separate turn.
"""

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

from ....engine.runtime.text import text_table
from ....engine.training.profiling import WARM_UP
from ...floors.matrix_products import PRODUCTS, add_floors, flops_of, product_turn
from ...measuring.clock import interleave_samples, ratio, seconds
from ...measuring.environment import Result
from ...measuring.memory import Child, HighWaterMark
from ...measuring.result_file import ResultFile
from ...measuring.times_table import times_table
from ..suite import WrongResult, bar, describe
from .names import (
    ACL,
    ACL_TRAINER,
    BARS,
    CACHED,
    CACHED_BATCH,
    CACHED_WORDS,
    CE,
    COMPILED,
    HUGGING_FACE,
    MAX_MONITORED,
    MONITOR_EVERY,
    MONITORED,
    ONE_CHUNK,
    ONE_SHOT,
    TWO_BACKWARD,
    UNGATED,
    WORDS,
)
from .trainers import ON_TRAINER, OURS, Case, Files, Ours, StepTrainer, make_trainer, obstacle

# Cross-entropy and auxiliary loss of each step.
Losses = list[tuple[float, float | None]]
# Largest relative difference of losses; Adam amplifies rounding errors from step to step.
MAX_ERROR = 1e-4
# The Hugging Face Trainer logs four decimals.
MAX_LOGGED_ERROR = 1e-3
CHECK_STEPS = 3
# Dropped at the start of a turn: memory is allocated, and that of the last provider is released.
WARM_UP_STEPS = 2
# The losses of the second step depend on the gradients of the first.
CACHED_CHECK_STEPS = 2
# Seconds for which the peak memory of one provider is awaited.
CHILD_SECONDS = 900.0
# Provider -> the provider that must have the same losses at every step.
ALIKE = {
    HUGGING_FACE: CE, COMPILED: CE, "deepspeed_ce": CE, TWO_BACKWARD: ACL, "deepspeed_acl": ACL,
    ACL_TRAINER: ACL, MONITORED: "fusedacl_acl_ungated", UNGATED: "fusedacl_acl_ungated",
}  # fmt: skip
MAX_CACHED_MEMORY = 1.3
MAX_CACHED_TIME = 1.45


@dataclass(frozen=True)
class Turns:
    """Rounds of turns, timed and profiled steps per turn, and whether to measure peak memory.

    providers: names, empty for all. has_bars: whether the targets apply to a case of this size.
    """

    rounds: int
    steps: int
    profiled: int
    memory: bool
    providers: tuple[str, ...] = ()
    has_bars: bool = True


# Providers on the large model, whose steps take seconds.
LARGE = tuple(
    WORDS.keys()
    - {"fusedacl_scl", "deepspeed_ce", "deepspeed_acl", COMPILED, ACL_TRAINER, UNGATED, MONITORED}
)
QUICK = (CE, HUGGING_FACE, ACL, "fusedacl_acl_head")
PRESETS: dict[str, list[tuple[Case, Turns]]] = {
    "full": [
        (Case("minilm", 32, 48), Turns(5, 4, 4, memory=True)),
        (Case("bert-base", 8, 64), Turns(5, 3, 2, memory=True, providers=LARGE)),
        (Case("minilm", 32, 64, chunks=32), Turns(1, 2, 0, memory=True)),
    ],
    "quick": [
        (Case("minilm", 8, 24, 3), Turns(1, 2, 1, False, QUICK, has_bars=False)),
        (Case("minilm", 4, 24, 3, chunks=4), Turns(1, 2, 0, False, has_bars=False)),
    ],
}


def run(
    preset: Sequence[tuple[Case, Turns]],
    file: ResultFile,
    *,
    providers: Sequence[str] = (),
    cases: Sequence[str] = (),
    threads: int = 2,
) -> None:
    """Measure the cases of a preset into a file, which is saved after each of them.

    providers: names to run, empty for all; without `ACL` among them CACHED_BATCH is left out.
    cases: names of CASES, empty for all. WrongResult if ours do not train alike.
    """
    wanted = providers or tuple(WORDS)
    chosen = []
    for case, turns in preset:
        names = [name for name in wanted if name in (turns.providers or WORDS)]
        is_wanted = not cases or (CACHED_BATCH if case.chunks else case.model) in cases
        if is_wanted and names and not (case.chunks and ACL not in names):
            chosen.append((case, turns, names))
    if not chosen:
        there = ", ".join(CACHED_BATCH if case.chunks else case.model for case, _ in preset)
        raise ValueError(
            f"cases={','.join(cases) or None} and providers={','.join(providers) or None} leave no "
            f"case of this preset, which has {there}: choose from these, or another preset."
        )
    torch.set_num_threads(threads)
    found = file.result["cases"] = []
    with tempfile.TemporaryDirectory() as temporary, quiet():
        files = Files(Path(temporary))
        for case, turns, names in chosen:
            make = measure_cached if case.chunks else partial(measure, names=names)
            found.append(make(case, turns, files=files, threads=threads))
            print(text(found[-1]))
            file.save()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log: dozens of runs would repeat the same lines."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logger = logging.getLogger("fusedacl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def measure(case: Case, turns: Turns, names: Iterable[str], files: Files, threads: int) -> Result:
    """Measure one case: compare losses, time in turns, profile, measure peak memory."""
    left_out = {name: why for name in names if (why := obstacle(name)) is not None}
    makers = {
        name: partial(make_trainer, name, case, files)
        for name in WORDS
        if name in names and name not in left_out
    }
    running = {name: make() for name, make in makers.items()}
    losses, flops, wrong = check(case, running, files)
    for name in wrong:
        del running[name]
    found = timed(running, makers, flops, case, turns, threads, skip=WARM_UP_STEPS)
    times = found["providers"]
    bars = [
        bar(what, ratio(times, slower, faster), most)
        for what, slower, faster, most in BARS
        if turns.has_bars and slower in times and faster in times
    ]
    if turns.has_bars and MONITORED in times and UNGATED in times:
        value = 1 + (ratio(times, MONITORED, UNGATED) - 1) / MONITOR_EVERY
        bars.append(bar(f"AngleMonitor every {MONITOR_EVERY} steps", value, MAX_MONITORED))
    return found | {"losses": losses, "left_out": left_out | wrong, "bars": bars}


def timed(
    running: Mapping[str, StepTrainer],
    makers: Mapping[str, Callable[[], StepTrainer]],
    flops: Mapping[str, int],
    case: Case,
    turns: Turns,
    threads: int,
    skip: int,
) -> Result:
    """The case, times of its running trainers with floors, parts and peaks, and the products' rate.

    Peaks are measured in a child process: "peak_bytes", or "peak_error" with a message.
    """
    num_steps = turns.steps + skip
    product = product_turn(case.width)
    times = interleave_samples(
        {
            **{name: partial(one.turn, num_steps) for name, one in running.items()},
            PRODUCTS: lambda: [seconds(product) for _ in range(num_steps)],
        },
        rounds=turns.rounds,
        skip=skip,
    )
    rate = add_floors(times, {name: flops[name] for name in running}, case.width)
    for name, one in tqdm(running.items(), desc="profile", leave=False):
        if isinstance(one, Ours) and turns.profiled:
            one.turn(WARM_UP + turns.profiled, profile=turns.profiled)
            times[name]["shares"] = one.shares
    with Child(threads, CHILD_SECONDS) as child:
        for name in running if turns.memory else ():
            peak = child.measure(peak_of_step, makers[name])
            times[name]["peak_error" if isinstance(peak, str) else "peak_bytes"] = peak
    return {"case": asdict(case), "words": case.words, **rate, "providers": times}


def check(
    case: Case, trainers: Mapping[str, StepTrainer], files: Files
) -> tuple[dict[str, Losses], dict[str, int], dict[str, str]]:
    """Losses of some steps, FLOP per step, and why others are not timed; WrongResult for ours."""
    # Trainers that others are compared with run even if nobody asked for them.
    needed = dict.fromkeys([*trainers, CE, *(ALIKE[n] for n in trainers if n in ALIKE)])
    if any(name not in (CE, HUGGING_FACE, COMPILED) for name in trainers):
        needed[ACL] = None
    losses, flops, wrong = {}, {}, {}
    for name in tqdm(needed, desc="check", leave=False):
        one = trainers.get(name) or make_trainer(name, case, files)
        flops[name] = _flops(one, CHECK_STEPS)
        losses[name] = one.losses
    for name in trainers:
        steps = CHECK_STEPS if name in ALIKE else 1
        error = _error(losses[name], losses[ALIKE.get(name, CE)], steps, part=0)
        if losses[name][0][1] is not None and name != "fusedacl_scl":
            error = max(error, _error(losses[name], losses[ACL], steps, part=1))
        if not error <= (MAX_LOGGED_ERROR if name in ON_TRAINER else MAX_ERROR):
            why = f"its losses differ by {error:.1e} (relative): not timed"
            if name in OURS:
                raise WrongResult(f"{case.words}, {name}: {why}")
            wrong[name] = why
    return losses, flops, wrong


def _flops(trainer: StepTrainer, num_steps: int) -> int:
    """FLOP per step of a turn without dropout, which records the losses."""
    return flops_of(partial(trainer.turn, num_steps, dropout=0.0, logging_steps=1), num_steps)


def _error(found: Losses, exact: Losses, steps: int, part: int) -> float:
    """Largest relative difference of the cross-entropies (part 0) or the auxiliary losses (1)."""
    given, wanted = (np.array(losses)[:steps, part].astype(float) for losses in (found, exact))
    return float(np.max(np.abs(given - wanted) / np.abs(wanted)))


def measure_cached(case: Case, turns: Turns, files: Files, threads: int) -> Result:
    """Measure a cached batch beside one chunk and the whole batch; WrongResult if they differ."""
    assert case.chunks is not None
    whole = case.batch * case.chunks
    options: dict[str, dict[str, Any]] = {
        ONE_CHUNK: {},
        CACHED: {"gradient_accumulation_steps": case.chunks, "contrastive_batch_size": whole},
        ONE_SHOT: {"per_device_train_batch_size": whole},
    }
    makers = {
        name: partial(make_trainer, ACL, case, files, **more) for name, more in options.items()
    }
    running = {name: make() for name, make in makers.items()}
    flops = {name: _flops(one, CACHED_CHECK_STEPS) for name, one in running.items()}
    cached, exact = running[CACHED].losses, running[ONE_SHOT].losses
    error = max(_error(cached, exact, CACHED_CHECK_STEPS, part) for part in (0, 1))
    if not error <= MAX_ERROR:
        raise WrongResult(f"{case.words}: the losses differ by {error:.1e} (relative): not timed")
    found = timed(running, makers, flops, case, turns, threads, skip=1)
    times = found["providers"]
    bars = [bar("cached over one shot, time", ratio(times, CACHED, ONE_SHOT), MAX_CACHED_TIME)]
    cached_peak, chunk_peak = (times[name].get("peak_bytes") for name in (CACHED, ONE_CHUNK))
    if cached_peak is not None and chunk_peak is not None:
        what = "cached over one chunk, peak memory"
        bars.append(bar(what, cached_peak / chunk_peak, MAX_CACHED_MEMORY))
    return found | {"left_out": {}, "bars": bars if turns.has_bars else []}


def peak_of_step(make: Callable[[], StepTrainer]) -> int:
    """Bytes by which a step raises this process's memory, gradients and activations included.

    Weights and optimizer state do not count: they exist after the steps before.
    """
    mark, raised = HighWaterMark(), 0

    def after_step(step: int) -> None:
        nonlocal raised
        if step == WARM_UP_STEPS:
            mark.reset()
        elif step > WARM_UP_STEPS:
            raised = mark.raised_bytes()

    with quiet():
        make().turn(WARM_UP_STEPS + 1, after_step=after_step)
    return raised


def text(case: Result) -> str:
    """A case as a table with its targets and the providers that were left out."""
    table = times_table(case["providers"], text_table, WORDS | CACHED_WORDS)
    lines = [f"\n{case['words']}", table, *map(describe, case["bars"])]
    lines += [f"left out: {WORDS[name]}: {why}" for name, why in case["left_out"].items()]
    return "\n".join(lines) + "\n"
